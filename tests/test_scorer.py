"What scores, alone and as a program: the same as the system says, for any number of rows, without a class of ours"
import io, subprocess, sys
from pathlib import Path
import pytest, torch
from vadnb.core import set_seed
from vadnb.models.scorer import Scorer, exported
from vadnb.systems.registry import load_config, offering

FACTS = dict(adatad=dict(classes=['jump', 'run']), fgclip=None)
MORE = dict(adatad=['--data.size', '[16,16]', '--data.window', '32', '--detector.arch', '[1,1,2]', '--detector.ranges', '[[0,4],[4,8],[8,10000]]'], fgclip=[])

def test_who_offers_a_scorer(): assert {*FACTS}<={*offering('SCORER')}

@pytest.fixture(scope='module', params=sorted(FACTS))
def made(request):
    set_seed(0)
    system = load_config(f'{request.param}_demo', MORE[request.param]).build(FACTS[request.param]).eval()
    scorer = offering('SCORER')[request.param](system)
    return request.param, system, scorer, *exported(scorer)

def test_the_program_says_what_the_module_says(made):
    "For rows that it was not made with, each as if it were alone"
    _,_,scorer,program,worst = made
    assert isinstance(scorer, Scorer) and not scorer.module.training and worst<1e-5
    x = [torch.cat([v, v.flip(0)]) for v in scorer.inputs.values()]
    with torch.no_grad(): found,want = program.module()(*x), scorer.module(*x)
    for a,b in zip(found, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad(): alone = program.module()(*(v[-1:] for v in x))
    for a,b in zip(found, alone): torch.testing.assert_close(a[-1:], b, rtol=1e-4, atol=1e-5)

def test_the_scorer_says_what_the_system_says(made):
    name,system,scorer,*_ = made
    with torch.no_grad(): found = scorer.named(*scorer.inputs.values())
    if name=='fgclip':
        with torch.no_grad(): seen = system.prompts()(next(system.look(dict(frames=scorer.inputs['frames'][None])).clips).frames)
        torch.testing.assert_close(found['heat'], seen.heat, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found['probabilities'], seen.probabilities, rtol=1e-5, atol=1e-6)
    else:
        with torch.no_grad(): out = system.answers(scorer.inputs)
        for i,(segments,scores) in enumerate(system.detector.decode(out)):
            there = torch.cat(out.masks, 1)[i]
            assert torch.equal(found['segments'][i][there], segments) and torch.equal(found['scores'][i][there], scores)

def test_a_program_runs_where_there_is_no_vadnb(made, tmp_path):
    _,_,scorer,program,_ = made
    torch.export.save(program, tmp_path/'scorer.pt2')
    x = tuple(scorer.inputs.values())
    with torch.no_grad(): torch.save((x, [*scorer.module(*x)]), tmp_path/'seen.pt')
    code = '''
import sys, torch
x,want = torch.load('seen.pt', weights_only=True)
found = torch.export.load('scorer.pt2').module()(*x)
for a,b in zip(found, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert not [m for m in sys.modules if m.startswith('vadnb')]
'''
    done = subprocess.run([sys.executable, '-I', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
