"An interrupted and resumed run is the uninterrupted one, to the last bit"
import os, signal, time
import numpy as np
import pytest
import torch
from toy_system import FailAt, StopAt, Toy, as_a_program, config, contents, curve, differences, processes, rows
from vadnb.core import CheckpointError, DataError, set_seed
from vadnb.train.callbacks import Averaging, Callback, Evaluate
from vadnb.train.card import beside_parts, system_parts
from vadnb.train.checkpoint import checkpoint_folders, find_checkpoint, save_checkpoint
from vadnb.train.going_on import loop_state, restore
from vadnb.train.feed import EpochBatches
from vadnb.train.learner import fit
from vadnb.train.range_test import lr_find
from vadnb.train.optim import lr_at, make_optimizer, set_lr

# 23 points in batches of 4: 5 micro-batches an epoch, in steps of 2, 2 and 1; 12 steps in 4 epochs
SETTINGS = {
    'plain':    dict(),
    'bf16':     dict(precision='bf16'),
    'workers':  dict(workers=2),
    'sparse':   dict(log_every=5, evaluate_every=2, save_every=5, unit='step'),
    'ragged':   dict(drop_last=False, ema=None, accumulate=4),
    'sgd':      dict(optim=dict(name='sgd', schedule='multistep', milestones=[1, 2]), epochs=None, steps=11),
}

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "The run of each setting that nobody disturbed, made when first asked for"
    folder,made = tmp_path_factory.mktemp('whole'), {}
    def get(name):
        if name not in made: fit(config(folder, name, **SETTINGS[name])); made[name] = folder/name
        return made[name]
    return get

def compare(run, whole):
    "Log rows; weights, moments, averages, random states and all else that a checkpoint holds"
    assert curve(run)==curve(whole)
    assert find_checkpoint(run).name==find_checkpoint(whole).name
    assert differences(run, whole)==[]

@pytest.mark.parametrize('name,steps', [('plain', [1, 3, 4, 5, 9]), ('bf16', [4]), ('workers', [4]), ('sparse', [4, 7]), ('ragged', [3, 4]), ('sgd', [5])])
def test_stopped_and_resumed(uninterrupted, tmp_path, name, steps):
    "Stopped in the middle of an epoch, at its end, between two log rows, before a short group; all in one run"
    whole = uninterrupted(name)
    for step in steps:
        fit(config(tmp_path, name, **SETTINGS[name]), [StopAt(step)])
        assert rows(tmp_path/name, 'end')[-1]['status']=='stopped'
        torch.rand(3)
    fit(config(tmp_path, name, **SETTINGS[name]))
    assert [r['step'] for r in rows(tmp_path/name, 'resume')]==steps
    compare(tmp_path/name, whole)

def test_the_work_after_the_last_checkpoint_is_done_again(uninterrupted, tmp_path):
    "A power cut leaves rows of steps that no checkpoint knows"
    with pytest.raises(RuntimeError, match='power cut'): fit(config(tmp_path, 'sparse', **SETTINGS['sparse']), [FailAt(9)])
    saved = int(checkpoint_folders(tmp_path/'sparse')[-1].name[5:])
    assert saved<9 and 'power cut' in rows(tmp_path/'sparse', 'end')[-1]['reason']
    fit(config(tmp_path, 'sparse', **SETTINGS['sparse']))
    assert rows(tmp_path/'sparse', 'resume')[0]['step']==saved
    compare(tmp_path/'sparse', uninterrupted('sparse'))

def test_what_callbacks_draw_at_the_start_leaves_no_trace(uninterrupted, tmp_path):
    fit(config(tmp_path, 'plain'), [StopAt(4)])
    Evaluate.before_fit = lambda self: torch.rand(5)
    try: fit(config(tmp_path, 'plain'))
    finally: del Evaluate.before_fit
    compare(tmp_path/'plain', uninterrupted('plain'))

def test_patience_and_best_survive(tmp_path):
    script = [5., 3., 4., 3.5, 1., 9., 9.]
    def run(name, stops):
        for k,step in enumerate([*stops, None]):
            # the script belongs to the epochs, wherever the run was interrupted
            done = (stops[k-1] if k else 0)//3
            learner = fit(config(tmp_path, name, script=script[done:], epochs=7, early_stopping=2, keep=1), [StopAt(step)] if step else [])
        return learner
    a,b = run('whole', []), run('parts', [7, 10])
    assert (a.step, a.stop)==(b.step, b.stop)==(12, 'error did not improve in 2 evaluations')
    assert curve(tmp_path/'whole')==curve(tmp_path/'parts')
    assert [(r['step'], r['value']) for r in rows(tmp_path/'parts', 'best')]==[(3, 5.), (6, 3.)]
    assert [p.name for p in checkpoint_folders(tmp_path/'parts')]==['step-000006', 'step-000012']
    assert find_checkpoint(tmp_path/'parts', 'best').name=='step-000006'

def test_the_state_of_the_scaler_is_kept(tmp_path):
    "The scaler of fp16 lives on a GPU; its state takes the same way on a CPU"
    a,b = (fit(config(tmp_path, name, epochs=1)) for name in 'ab')
    for learner in (a, b): learner.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1024., growth_interval=7)
    x = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=.1)
    for value in (1., float('inf'), 1.):
        x.grad = torch.tensor([value]); a.accelerator.scaler.scale(x.sum())
        a.accelerator.scaler.unscale_(optimizer); a.accelerator.scaler.step(optimizer); a.accelerator.scaler.update()
    parts = system_parts(a.system) | dict(ema=a.callback(Averaging).weights.average, state=loop_state(a, []))
    folder = save_checkpoint(tmp_path/'half', a.step, parts, beside=beside_parts(a.system, a.data, 'toy'))
    assert a.accelerator.scaler.state_dict()!=b.accelerator.scaler.state_dict()
    restore(b, folder)
    assert a.accelerator.scaler.state_dict()==b.accelerator.scaler.state_dict()
    assert b.accelerator.scaler.get_scale()==512.

def events(run):
    "What TensorBoard would draw: tag → steps"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run/'tensorboard')); found.Reload()
    return {tag: [e.step for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}

def test_tensorboard_draws_no_step_twice(tmp_path):
    "Cut before the first checkpoint, cut again beyond one, finished"
    some = dict(trackers=['tensorboard'], unit='step', save_every=4, evaluate_every=4)
    for step in (3, 6):
        with pytest.raises(RuntimeError): fit(config(tmp_path, 'run', **some), [FailAt(step)])
        time.sleep(1.1) # TensorBoard orders the files of a folder by the second in their names
    fit(config(tmp_path, 'run', **some))
    found = events(tmp_path/'run')
    assert found['train/loss']==found['train/lr/net']==list(range(1, 13))
    assert found['valid/error']==[4, 8, 12]

def test_a_finished_run_is_left_alone(uninterrupted, tmp_path):
    run = uninterrupted('plain')
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name!='.lock'}
    with pytest.raises(CheckpointError, match=r'is finished \(12 of 12 steps\)'): fit(config(run.parent, 'plain'))
    assert before=={p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name!='.lock'}
    with pytest.raises(CheckpointError, match='holds a run already'): fit(config(run.parent, 'plain', resume='never', epochs=5))

def test_evaluation_leaves_training_alone(uninterrupted, tmp_path):
    "The toy draws from every generator while it is evaluated, in eval mode, with averaged weights swapped in"
    fit(config(tmp_path, 'often', evaluate_every=1, unit='step', save_every=3))
    fit(config(tmp_path, 'seldom', evaluate_every=100, save_every=1))
    a,b = ([r for r in curve(tmp_path/n) if r['kind']=='train'] for n in ('often', 'seldom'))
    assert a==b==[r for r in curve(uninterrupted('plain')) if r['kind']=='train']
    model = [contents(find_checkpoint(tmp_path/n))[1] for n in ('often', 'seldom')]
    assert all(torch.equal(model[0][k], model[1][k]) for k in model[0] if k.startswith(('model.', 'ema.')))

def test_lr_find_leaves_nothing(tmp_path):
    found = lr_find(config(tmp_path, 'none'), low=1e-5, high=1., steps=40)
    assert list(tmp_path.iterdir())==[] and len(found['rates'])==len(found['losses'])>20

def reference(cfg, steps):
    "The first steps of a run, written out: gradients of each group of samples at once, weighted by what the group holds"
    set_seed(cfg.seed)
    toy = cfg.build().train()
    held = cfg.make_data()
    data = held.split('train')
    t,batches = cfg.train, EpochBatches(cfg.points, cfg.train.batch_size, cfg.seed, drop_last=cfg.train.drop_last)
    per_epoch = -(-batches.per_epoch//t.accumulate)
    optimizer,micro,norms = make_optimizer(cfg.optim, toy.groups()), 0, []
    for step in range(steps):
        group = batches.batch(micro)
        micro += 1
        while micro%batches.per_epoch and micro%batches.per_epoch%t.accumulate: group += batches.batch(micro); micro += 1
        batch = held.collate([data.draw(i, np.random.default_rng([cfg.seed, epoch, i])) for epoch,i in group if i not in data.bad])
        toy.loss(batch)['loss'].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(toy.parameters(), cfg.optim.clip or float('inf')).item())
        set_lr(optimizer, lambda peak: lr_at(cfg.optim, peak, step, per_epoch, t.steps))
        optimizer.step(); optimizer.zero_grad()
    return toy.state_dict(), norms

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('clip', [None, .5])
def test_accumulated_steps_are_those_of_one_large_batch(tmp_path, drop_last, clip):
    "Short groups and small last batches included: every sample of a step counts the same"
    cfg = config(tmp_path, 'run', noisy=False, drop_last=drop_last, accumulate=3, epochs=None, steps=9, optim=dict(name='sgd', lr=.05, warmup=0, clip=clip))
    learner = fit(cfg)
    state,norms = reference(cfg, 9)
    for k,v in learner.system.state_dict().items(): torch.testing.assert_close(v, state[k], rtol=1e-5, atol=1e-6)
    if clip: assert [r['grad_norm'] for r in rows(tmp_path/'run', 'train')]==pytest.approx(norms, rel=1e-4)

def test_a_micro_batch_that_cannot_be_read_costs_its_samples_only(tmp_path):
    "All four samples of one micro-batch are bad: its group makes the mean of the others"
    bad = [i for _,i in EpochBatches(24, 4, 42).batch(1)]
    cfg = config(tmp_path, 'run', points=24, bad=bad, noisy=False, accumulate=2, epochs=None, steps=1, on_bad_sample='skip', optim=dict(name='sgd', lr=.05, warmup=0, clip=None))
    learner = fit(cfg)
    state,_ = reference(cfg, 1)
    for k,v in learner.system.state_dict().items(): torch.testing.assert_close(v, state[k], rtol=1e-5, atol=1e-6)
    assert len(learner.skipped)==4 and rows(tmp_path/'run', 'health')[0]['code']=='skipped_samples'

def test_a_step_without_any_sample_moves_nothing(tmp_path):
    bad = [i for _,i in EpochBatches(24, 4, 42).batch(1)]
    kept = {}
    class Keep(Callback):
        def after_step(self): kept[self.learner.step] = {k: v.clone() for k,v in self.learner.system.state_dict().items()}
    fit(config(tmp_path, 'run', points=24, bad=bad, accumulate=1, epochs=1, on_bad_sample='skip'), [Keep()])
    assert all(torch.equal(kept[1][k], kept[2][k]) for k in kept[1]) and not torch.equal(kept[2]['net.0.weight'], kept[3]['net.0.weight'])
    assert [r['step'] for r in rows(tmp_path/'run', 'train')]==[1, 3, 4, 5, 6]

def test_the_newest_and_the_best_are_kept(tmp_path):
    script = [3., 1., 2., 2., 2., 2.]
    fit(config(tmp_path, 'run', script=script, epochs=6, keep=2))
    assert [p.name for p in checkpoint_folders(tmp_path/'run')]==['step-000006', 'step-000015', 'step-000018']
    assert {n: find_checkpoint(tmp_path/'run', n).name for n in ('best', 'last')}=={'best': 'step-000006', 'last': 'step-000018'}

def test_two_runs_of_one_process_may_differ_in_precision(tmp_path):
    for k,precision in enumerate(['fp32', 'bf16', 'fp32']): fit(config(tmp_path, str(k), epochs=1, precision=precision))
    assert curve(tmp_path/'0')==curve(tmp_path/'2')!=curve(tmp_path/'1')

def test_compiled(tmp_path, monkeypatch):
    "The plumbing of `compile`, with the tracer alone: it finds the names of the checkpoint unchanged and the same numbers"
    plain = torch.nn.Module.compile
    used = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *a, **k: used.append(type(self).__name__) or plain(self, *a, backend='eager', **k))
    for name in ('compiled', 'eager'): fit(config(tmp_path, name, noisy=False, epochs=1, compile=name=='compiled'))
    assert used==['Toy'] and differences(tmp_path/'compiled', tmp_path/'eager')==[]

def slow_training(folder, workers):
    "For another process: a run that would take minutes"
    as_a_program()
    class Slow(Callback):
        def after_step(self): time.sleep(.02)
    fit(config(folder, 'run', workers=workers, epochs=None, steps=5000, save_every=1000), [Slow()])

@pytest.mark.parametrize('number,workers', [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_is_answered_with_a_checkpoint(tmp_path, number, workers):
    "Also when it reaches the loading processes, as Ctrl-C does"
    child = processes.Process(target=in_own_group, args=(tmp_path, workers))
    child.start()
    wait_for(lambda: (tmp_path/'run'/'log.jsonl').exists() and len(rows(tmp_path/'run', 'train'))>3, child)
    os.killpg(child.pid, number)
    child.join(300)
    assert child.exitcode==0
    end = rows(tmp_path/'run', 'end')[-1]
    assert (end['status'], end['reason'])==('stopped', f'received {number.name}')
    assert find_checkpoint(tmp_path/'run').name==f"step-{end['step']:06d}"

def in_own_group(folder, workers): os.setpgrp(); slow_training(folder, workers)

def wait_for(done, child, seconds=300):
    deadline = time.time()+seconds
    while not done():
        assert time.time()<deadline and child.is_alive(), 'it did not come so far'
        time.sleep(.02)

def test_an_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    "The checkpoint is not due before step 20; the evaluation of step 5 cannot read a video"
    def broken(self, data, split): raise DataError('valid.mp4: damaged')
    with monkeypatch.context() as m:
        m.setattr(Toy, 'scan', broken)
        with pytest.raises(DataError, match='valid.mp4'): fit(config(tmp_path, 'cut', unit='step', evaluate_every=5, save_every=20))
    assert [p.name for p in checkpoint_folders(tmp_path/'cut')]==['step-000005']
    fit(config(tmp_path, 'cut', unit='step', evaluate_every=5, save_every=20))
    fit(config(tmp_path, 'whole', unit='step', evaluate_every=5, save_every=20))
    assert [r for r in curve(tmp_path/'cut') if r['kind']=='train']==[r for r in curve(tmp_path/'whole') if r['kind']=='train']
