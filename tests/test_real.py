"The debug configuration on real clips: trained, killed, resumed, evaluated, and used on the real UCF-Crime video"
import json, multiprocessing, os, signal, time
from pathlib import Path
import pytest
import vadnb.systems.fgclip
from command import vadnb as command
from toy_system import SPENT
from vadnb import cli
from vadnb.core import read_jsonl

here = Path(__file__).resolve().parent
small = '--model.pretrained false --model.size tiny --data.size [64,64] --data.frames 8 --train.batch_size 2 --train.steps 6 --train.unit step --train.save_every 1 --train.evaluate_every 3 --train.ema 0.9 --train.trackers []'.split()

def start(words):
    "Run a command in a forked child: the imports of this process are paid once"
    def child():
        # a child of pytest writes where nobody looks
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        cli.main(words)
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    return process

def finish(process):
    process.join(600)
    return process.exitcode

def training(shared, runs, name):
    "The words of a command that trains on the real clips"
    annotation = here/'real'/'clips.json'
    words = ['train', '--config', 'fgclip_ucf_debug', '--data_root', shared/'data', '--data.train_json', annotation, '--data.valid_json', annotation,
             '--data.test_json', annotation, '--data.test_annotation', 'null', '--runs', runs, '--name', name, *small]
    return [str(w) for w in words]

def curve(run):
    "What a run logged, without the clock"
    return [{k: v for k,v in r.items() if k not in SPENT} for r in read_jsonl(run/'log.jsonl') if r['kind'] in ('train', 'valid', 'best')]

@pytest.fixture(scope='module')
def runs(shared, tmp_path_factory):
    "One run left alone, and one killed with SIGKILL in the middle and started again"
    folder = tmp_path_factory.mktemp('runs')
    # the first in this process: what it imports, the children have
    code,_,err = command(*training(shared, folder, 'whole'))
    assert code==0, err
    process = start(training(shared, folder, 'killed'))
    deadline = time.time()+600
    while not (folder/'killed'/'checkpoints'/'step-000004').exists() and process.is_alive() and time.time()<deadline: time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)==-signal.SIGKILL, 'the run was over before it could be killed'
    assert finish(start(training(shared, folder, 'killed')))==0
    return folder

def test_a_killed_run_resumes_with_an_identical_curve(runs):
    kinds = [r['kind'] for r in read_jsonl(runs/'killed'/'log.jsonl')]
    assert 'resume' in kinds and kinds[-1]=='end'
    assert curve(runs/'killed')==curve(runs/'whole')
    steps = [r['step'] for r in curve(runs/'whole') if r['kind']=='train']
    assert steps==list(range(1, 7))

def test_the_last_checkpoints_hold_the_same_tensors(runs):
    from safetensors.torch import load_file
    for part in ('model', 'ema', 'state'):
        a,b = (load_file((runs/name/'last'/f'{part}.safetensors').resolve()) for name in ('whole', 'killed'))
        assert a.keys()==b.keys()
        assert [k for k in a if not a[k].equal(b[k])]==[], part

def test_it_evaluates(runs):
    code,_,err = command('eval', '--run', runs/'whole')
    assert code==0, err
    found = json.loads((runs/'whole'/'eval.json').read_text())['metrics']
    logged = [r for r in read_jsonl(runs/'whole'/'log.jsonl') if r['kind']=='valid']
    best = [r for r in read_jsonl(runs/'whole'/'log.jsonl') if r['kind']=='best'][-1]
    assert found['frame_auc']==pytest.approx(best['value'], abs=1e-6)
    assert {'frame_auc', 'anomalous_auc', 'false_alarm_rate', 'baseline/frame_auc/random'} <= set(logged[-1])-{'kind', 'step', 'epoch'} <= set(found)

def test_it_scores_the_real_ucf_crime_clip(runs, shared, tmp_path):
    video = shared/'data'/'ucf_crime'/'clips'/'Fighting033_x264_570_841.mp4'
    code,_,err = command('predict', '--run', runs/'whole', video, '--out', tmp_path)
    assert code==0, err
    found = json.loads((tmp_path/f'{video.stem}.json').read_text())
    assert found['frames']==len(found['scores'])==271 and all(0<=s<=1 for s in found['scores'])
    rows = (tmp_path/f'{video.stem}.csv').read_text().splitlines()
    assert len(rows)==272 and rows[0].startswith('frame,seconds,score,normal')
    assert (tmp_path/f'{video.stem}.png').read_bytes()[:4]==b'\x89PNG'
