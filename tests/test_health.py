"Faults that any system can have, planted in the toy, stopped and continued: named once, and as in a run that was left alone"
import pytest, torch
from toy_system import Errors, Points, StopAt, Toy, ToyData, config, differences, rows
from vadnb.core import VadnbError, read_json
from vadnb.train.callbacks import Averaging
from vadnb.train.learner import Learner, fit
from vadnb.train.motion import MotionCheck

def findings(run): return read_json(run/'health.json')['findings']
def told(run): return [(r['code'], r['key'], r['message'], r['step']) for r in rows(run, 'health')]

class Still(torch.optim.AdamW):
    def step(self, closure=None): return None

def robbed(self):
    for p in self.net[0].parameters(): p.grad = None

def plant(monkeypatch, fault):
    build = Learner.build_model
    if fault=='gradient taken away': monkeypatch.setattr(Toy, 'before_step', robbed)
    if fault=='averages': monkeypatch.setattr(Averaging, 'after_step', lambda self: None)
    def built(self):
        build(self)
        if fault=='no step': self.optimizer.optimizer.__class__ = Still
        if fault=='no clearing': self.optimizer.optimizer.zero_grad = lambda set_to_none=True: None
    monkeypatch.setattr(Learner, 'build_model', built)

@pytest.mark.parametrize('fault,code', [('no step', 'no_motion'), ('gradient taken away', 'no_motion'), ('averages', 'averaged_weights')])
def test_a_fault_is_named_once_however_often_a_run_is_stopped(tmp_path, monkeypatch, fault, code):
    plant(monkeypatch, fault)
    some = dict(noisy=False, epochs=6, unit='step', save_every=2, evaluate_every=100)
    fit(config(tmp_path, 'whole', **some))
    for stop in (3, 8): fit(config(tmp_path, 'parts', **some), [StopAt(stop)])
    fit(config(tmp_path, 'parts', **some))
    # of an optimizer that does nothing the averages have nothing to follow
    assert [f['code'] for f in findings(tmp_path/'whole')]==[code]
    assert findings(tmp_path/'parts')==findings(tmp_path/'whole') and told(tmp_path/'parts')==told(tmp_path/'whole') and len(told(tmp_path/'whole'))==1
    assert differences(tmp_path/'parts', tmp_path/'whole')==[]

def test_gradients_that_nobody_clears_stop_the_run(tmp_path, monkeypatch):
    plant(monkeypatch, 'no clearing')
    with pytest.raises(VadnbError, match='the gradients of that step are still there'): fit(config(tmp_path, 'run', noisy=False))
    assert [(f['code'], f['severity'], f['step']) for f in findings(tmp_path/'run')]==[('gradients_kept', 'fault', 3)]

def test_numbers_are_read_from_the_device_where_a_row_is_due_and_nowhere_else(tmp_path, monkeypatch):
    "A device that has to be waited for: what was seen in between is read with the row"
    read,count = [], MotionCheck.count
    monkeypatch.setattr(Learner, 'reads_device_at', lambda self, step: step%5==0 or step==self.total_steps)
    monkeypatch.setattr(MotionCheck, 'count', lambda self: (read.append((self.learner.step, len(self.waiting))), count(self))[1])
    fit(config(tmp_path, 'run', noisy=False, epochs=4))
    assert read==[(5, 4)] and findings(tmp_path/'run')==[]

def test_many_metrics_below_their_baselines_are_one_finding(tmp_path, monkeypatch):
    def metrics(self): return {'error': 9., 'baseline/error/mean': 1.} | {f'm{k}': .1 for k in range(26)} | {f'baseline/m{k}/chance': .5 for k in range(26)}
    monkeypatch.setattr(Errors, 'metrics', metrics)
    for valid in 40, 7:
        monkeypatch.setattr(ToyData, 'split', lambda self, name: Points(valid) if name=='valid' else self.splits.get(name))
        fit(config(tmp_path, f'run{valid}', noisy=False, epochs=2))
    found, = findings(tmp_path/'run40')
    assert found['code']=='below_baseline' and len(rows(tmp_path/'run40', 'health'))==1 and len(found['evidence']['metrics'])==27
    assert found['message'].startswith('27 metrics are not better') and "error is 9, 'mean' has 1" in found['message']
    # of seven points nothing can be said, and that is said
    assert findings(tmp_path/'run7')==[]
    checked = {c['code']: c for c in read_json(tmp_path/'run7'/'health.json')['checked']}
    assert checked['below_baseline']['state']=='does not apply' and 'on 7 validation points: fewer than 30' in checked['validation']['says']

def test_healthy_runs_have_nothing_to_say(tmp_path):
    for name,some in dict(plain={}, accumulated=dict(accumulate=3), long=dict(epochs=12), sgd=dict(optim=dict(name='sgd', lr=.01)),
                          late=dict(optim=dict(warmup_from_zero=True, warmup=5))).items():
        fit(config(tmp_path, name, **some))
        assert findings(tmp_path/name)==[], name
