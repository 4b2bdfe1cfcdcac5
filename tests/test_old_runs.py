"Runs that vadnb 0.1.0 wrote: every command says in one line which version can use them, and leaves them as they are"
import pytest
import torch
from command import vadnb
from vadnb.config import to_yaml
from vadnb.core import write_json
from vadnb.systems.registry import load_config
from vadnb.train.checkpoint import write_part

def old_run(folder, system):
    "Weights, state and the architecture beside them, without a card: small, of the old layout"
    run = folder/'old'
    place = run/'checkpoints'/'step-000003'
    place.mkdir(parents=True)
    words = ['--runs', str(folder), '--name', 'old', '--data_root', str(folder)]
    (run/'config.yaml').write_text(to_yaml(load_config(f'{system}_demo', words)))
    (run/'log.jsonl').write_text('{"kind": "start", "step": 0}\n')
    write_json(run/'architecture.json', dict(stored=True))
    write_part(place, 'model', dict(weight=torch.zeros(2)))
    write_part(place, 'state', dict(step=3, micro=3))
    return run, words

def contents(run): return {p.relative_to(run): p.read_bytes() for p in run.rglob('*') if p.is_file() and p.name!='.lock'}

@pytest.mark.parametrize('system', ['fgclip', 'uniad'])
@pytest.mark.parametrize('command', ['eval', 'predict', 'train'])
def test_a_run_of_the_first_layout_is_refused_by_name(tmp_path, monkeypatch, system, command):
    run,words = old_run(tmp_path, system)
    # what it would be trained on is of no interest here
    monkeypatch.setattr(f'vadnb.systems.{system}.Config.make_data', lambda cfg: None)
    before = contents(run)
    given = dict(eval=['--run', run], predict=[tmp_path, '--run', run], train=['--config', f'{system}_demo', *words])
    code,_,err = vadnb(command, *given[command])
    assert code==2 and err.count('\n')==1, err
    assert 'step-000003/card.json: no such file' in err and 'vadnb 0.1.0 wrote it' in err and 'train again' in err
    assert contents(run)==before
