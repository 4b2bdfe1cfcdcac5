"Time is counted in passes over the data: a run that goes on with another batch trains the epochs that remain, at the rates it would have had"
import functools, shlex
from dataclasses import dataclass
import pytest
import line_system # registers itself
from command import vadnb
from test_processes import close, parameters, together, train
from toy_system import Errors, StopAt, Toy, ToyConfig, ToyData, card, config, rows
from vadnb.core import CheckpointError, read_json
from vadnb.train import learner
from vadnb.train.checkpoint import find_checkpoint
from vadnb.train.learner import fit
from vadnb.worlds.street import street_world

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    return street_world(folder, videos=8, valid_videos=2, test_videos=0, frames=(32, 36), size=(48, 64)).root

def words(system, world, runs, name, batch):
    "A training of ten epochs of eight samples each"
    own = dict(fgclip=f"--config fgclip_demo --data_root {world} --data.valid_json valid.json --data.frames 2 --data.size '[32, 32]'",
               line=f'--config {runs}/line.yaml --data.train 8 --data.valid 2 --optim.schedule cosine --optim.warmup 0.1')[system]
    (runs/'line.yaml').write_text('system: line')
    return shlex.split(f"""train {own} --runs {runs} --name {name} --train.steps null --train.epochs 10
        --train.batch_size {batch} --train.log_every 1 --train.evaluate_every 20 --train.save_every 20
        --train.workers 0 --train.device cpu --train.progress false --train.trackers '[]'""")

def rates(run): return {r['epoch']: next(v for k,v in r.items() if k in ('lr/vision', 'lr/slope_no_decay')) for r in rows(run, 'train')}

@pytest.mark.parametrize('system,before,after,epochs', [('fgclip', 2, 8, 6), ('line', 2, 8, 6), ('line', 2, 4, 3)])
def test_another_batch_through_the_command_line(world, tmp_path, monkeypatch, system, before, after, epochs):
    monkeypatch.setattr('vadnb.report.report.write_report', lambda run, *_: run)
    stop = epochs*8//before
    with monkeypatch.context() as m:
        m.setattr(learner, 'fit', functools.partial(learner.fit, callbacks=[StopAt(stop)]))
        assert f'stopped at step {stop} of {80//before}' in vadnb(*words(system, world, tmp_path, 'changed', before))[1]
    end = stop+(10-epochs)*8//after
    code,out,_ = vadnb(*words(system, world, tmp_path, 'changed', after))
    assert code==0 and f'done at step {end} of {end}' in out
    assert vadnb(*words(system, world, tmp_path, 'straight', after))[0]==0
    changed,straight = rates(tmp_path/'changed'), rates(tmp_path/'straight')
    assert max(changed)==max(straight)==10. and len(set(straight.values()))>5
    shared = [e for e in straight if e>epochs]
    assert len(shared)==(10-epochs)*8//after and all(changed[e]==pytest.approx(straight[e], rel=1e-9) for e in shared)
    # said in the log, and by health
    assert rows(tmp_path/'changed', 'resume')[0]['changed']['batch (checkpoint)']==[before, after]
    assert 'resumed_differently' in [f['code'] for f in read_json(tmp_path/'changed'/'health.json')['findings']]

def test_a_length_in_steps_stays(tmp_path):
    some = dict(epochs=None, steps=30, accumulate=1)
    fit(config(tmp_path, 'run', **some), [StopAt(10)])
    fit(config(tmp_path, 'run', batch_size=8, **some))
    assert rows(tmp_path/'run', 'end')[-1]['status']=='done' and rows(tmp_path/'run', 'end')[-1]['step']==30
    fit(config(tmp_path, 'same', **some))
    one,two = ([r['lr/net'] for r in rows(tmp_path/n, 'train')] for n in ('run', 'same'))
    assert one==two

def test_a_second_resume_keeps_the_first_ones_schedule(tmp_path):
    "Stopped, continued with another batch, stopped, continued: as if the second stop had not been"
    fit(config(tmp_path, 'once', accumulate=1), [StopAt(5)])
    fit(config(tmp_path, 'once', accumulate=1, batch_size=2))
    for stop,batch in ((5, 4), (12, 2), (None, 2)):
        fit(config(tmp_path, 'twice', accumulate=1, batch_size=batch), [StopAt(stop)] if stop else [])
    plain = lambda n: [(r['step'], r['epoch'], r['loss'], r['lr/net']) for r in rows(tmp_path/n, 'train')]
    assert plain('once')==plain('twice') and plain('once')[-1][1]==4.

def test_intervals_of_epochs_stay_on_epochs(tmp_path):
    some = dict(points=24, epochs=8, accumulate=1, evaluate_every=2, keep=None, save_every=2)
    fit(config(tmp_path, 'run', batch_size=4, **some), [StopAt(20)])            # in the fourth epoch of six steps
    fit(config(tmp_path, 'run', batch_size=8, **some))
    found = [r['epoch'] for r in rows(tmp_path/'run', 'valid')]
    assert found==[2., 4., 6., 8.]

def test_evaluation_has_a_first_epoch(tmp_path):
    fit(config(tmp_path, 'run', epochs=9, evaluate_from=4, evaluate_every=2))
    assert [r['epoch'] for r in rows(tmp_path/'run', 'valid')]==[4., 6., 8., 9.]

def test_a_finished_run_goes_on_when_more_epochs_are_asked_for(tmp_path):
    "60 of a horizon of 100, then to 100: the rates are those of one run"
    some = dict(optim=dict(horizon=10., warmup=0.))
    fit(config(tmp_path, 'run', epochs=6, **some))
    fit(config(tmp_path, 'run', epochs=10, **some))
    fit(config(tmp_path, 'straight', epochs=10, **some))
    found = [[r['lr/net'] for r in rows(tmp_path/n, 'train')] for n in ('run', 'straight')]
    assert found[0]==found[1] and rows(tmp_path/'run', 'end')[-1]['status']=='done'

def test_rows_say_what_steps_cost(tmp_path):
    fit(config(tmp_path, 'run', points=23))
    found = rows(tmp_path/'run', 'train')
    assert all(r['samples_per_second']>0 and .05<r['peak_memory']<100 for r in found)
    samples = [r['samples_per_second']*r['seconds'] for r in found[:3]]
    assert samples==pytest.approx([8, 8, 4])                                    # the last step of an epoch has one batch

def test_static_graph_and_compressed_gradients(tmp_path):
    "Two processes with both switches: the same parameters, to what half precision of gradients allows"
    some = dict(noisy=False, optim=dict(name='sgd', lr=.05), batch_size=2)
    together(tmp_path/'plain', train, tmp_path, 'plain', **some)
    together(tmp_path/'static', train, tmp_path, 'static', ddp_static_graph=True, **some)
    together(tmp_path/'half', train, tmp_path, 'half', ddp_fp16_compress=True, **some)
    close(parameters(tmp_path/'static'), parameters(tmp_path/'plain'), 1e-7)
    close(parameters(tmp_path/'half'), parameters(tmp_path/'plain'), 2e-3)
    differ = [k for k,v in parameters(tmp_path/'plain').items() if (v!=parameters(tmp_path/'half')[k]).any()]
    assert differ, 'nothing was compressed'

# ---------------------------------------------------------------- what else may change, or is missing

def test_a_longer_epoch_bends_no_time(tmp_path):
    "The incomplete batch, left out for two epochs, is taken from then on: two epochs of six steps remain"
    some = dict(accumulate=1, epochs=4)
    fit(config(tmp_path, 'run', **some), [StopAt(10)])
    learner = fit(config(tmp_path, 'run', drop_last=False, **some))
    assert (learner.step, learner.epoch)==(10+2*6, 4.)
    assert [r['epoch'] for r in rows(tmp_path/'run', 'valid')]==[1., 2., 3., 4.]
    assert rows(tmp_path/'run', 'resume')[-1]['changed']['per_epoch (checkpoint)']==[5, 6]

def test_a_warmup_in_steps_is_that_of_the_run_as_it_began(tmp_path):
    "20 steps of batch 4 are more than all steps of batch 12, and already behind when that begins"
    some = dict(accumulate=1, epochs=8, points=24, optim=dict(warmup=20))
    fit(config(tmp_path, 'run', batch_size=4, **some), [StopAt(18)])
    learner = fit(config(tmp_path, 'run', batch_size=12, **some))
    assert learner.epoch==8. and learner.step==18+5*2

@dataclass(kw_only=True)
class BlindConfig(ToyConfig):
    def make_data(self):
        data = ToyData(self)
        data.splits['valid'] = None
        return data

def blind(*words, **named): return BlindConfig(**vars(config(*words, **named)))

def test_a_run_without_validation_says_so_and_is_told_of_changes(tmp_path):
    fit(blind(tmp_path, 'run', accumulate=1), [StopAt(7)])
    fit(blind(tmp_path, 'run', accumulate=1, batch_size=8))
    assert [r['message'] for r in rows(tmp_path/'run', 'note')]==['no validation data: the last checkpoint is the chosen one']
    found = read_json(tmp_path/'run'/'health.json')['findings']
    assert [f['code'] for f in found]==['resumed_differently']
    assert not (tmp_path/'run'/'best').exists()

def test_what_was_best_on_data_that_are_gone_is_best_no_more(tmp_path):
    fit(config(tmp_path, 'run', script=[1., 2., 3., 4.]), [StopAt(6)])
    assert (tmp_path/'run'/'best').is_symlink()
    fit(blind(tmp_path, 'run'))
    assert not (tmp_path/'run'/'best').exists() and (tmp_path/'run'/'last').resolve().name=='step-000012'

class Forgetful(Toy):
    "Its ballast trains and is in no part"
    def parts(self): return dict(net=self.net)

@dataclass(kw_only=True)
class ForgetfulConfig(ToyConfig):
    def build(self, facts=None): return Forgetful(self)

def test_a_run_that_would_lose_a_parameter_does_not_begin(tmp_path):
    cfg = ForgetfulConfig(**vars(config(tmp_path, 'run', ballast=3)))
    with pytest.raises(CheckpointError, match="1 trainable parameters are in no part of Forgetful.parts, such as 'ballast'"):
        fit(cfg)
    assert not list(tmp_path.iterdir())
    fit(ForgetfulConfig(**vars(config(tmp_path, 'whole'))))

class Uncertain(Errors):
    def calibration(self): return dict(limit=float('nan'))

class Undecided(Toy):
    def scan(self, data, split): return Uncertain()

@dataclass(kw_only=True)
class UndecidedConfig(ToyConfig):
    def build(self, facts=None): return Undecided(self)

def test_a_calibration_that_no_card_can_hold_is_noted_and_not_kept(tmp_path):
    cfg = UndecidedConfig(**vars(config(tmp_path, 'run')))
    fit(cfg, [StopAt(7)])
    learner = fit(cfg)
    assert learner.step==12 and card(find_checkpoint(tmp_path/'run'))['calibration'] is None
    assert 'the calibration must be plain data with finite numbers' in rows(tmp_path/'run', 'note')[0]['message']
