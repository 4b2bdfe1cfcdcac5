"Schedules against the reference's, averages of what trains, and both in a run that is stopped and resumed"
import json, math, random, sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_system import StopAt, Toy, ToyConfig, config, contents, curve, differences, rows
from vadnb.core import CheckpointError, ConfigError
from vadnb.systems import registry
from vadnb.train.callbacks import Averaging
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.system import TrainConfig
from vadnb.train.learner import fit
from vadnb.train.range_test import lr_find
from vadnb.train.optim import AveragedWeights, OptimConfig, averaged_state, lr_at, warmup_in_epochs, warmup_steps

# ---------------------------------------------------------------- schedules

@pytest.fixture(scope='module')
def golden(shared):
    "(facts, tensors) of OpenTAD's schedule and average"
    path = shared/'golden'/'adatad'/'lr_schedule'
    return json.loads(path.with_suffix('.json').read_text()), load_file(path.with_suffix('.safetensors'))

def test_the_rates_of_the_reference(golden):
    "10,000 iterations of three groups; a run of 60 epochs has a cosine of 100"
    facts,tensors = golden
    c,close = facts['config'], facts['tolerances']
    cfg = OptimConfig(warmup_epochs=c['warmup_epoch'], horizon=c['max_epoch'], floor_lr=c['eta_min'],
                      warmup_from_zero=True)
    for total in (c['end_epoch']*c['iters_per_epoch'], c['max_iters']):
        steps = range(c['max_iters']+1)
        found = [[lr_at(cfg, peak, k, c['iters_per_epoch'], total) for peak in c['group_lrs']] for k in steps]
        expected = tensors['lr/per_iteration'][:c['max_iters']+1]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected,
                                   rtol=close['lr_rtol'], atol=close['lr_atol'])
    assert found[0]==[0., 0., 0.] and found[c['warmup_iters']-1]==c['group_lrs'] and set(found[-1])=={c['eta_min']}

def slow_reference(cfg, peak, step, steps_per_epoch, total):
    "The five plain schedules, written out; without a horizon `lr_at` gives these numbers to the last bit"
    warm = math.ceil(cfg.warmup*total) if cfg.warmup<1 else int(cfg.warmup)
    p,epoch = (step-warm)/max(total-warm, 1), step//steps_per_epoch
    factors = dict(cosine=cfg.floor + (1-cfg.floor)*0.5*(1+math.cos(math.pi*p)), linear=cfg.floor + (1-cfg.floor)*(1-p),
                   step=cfg.gamma**(epoch//cfg.step_epochs), constant=1.,
                   multistep=cfg.gamma**sum(epoch>=m for m in cfg.milestones))
    return peak*((step+1)/warm if step<warm else factors[cfg.schedule])

def test_plain_schedules_to_the_last_bit():
    rng = random.Random(0)
    for k in range(500):
        per_epoch,total = rng.randint(1, 300), rng.randint(2, 1500)
        cfg = OptimConfig(schedule=['cosine', 'linear', 'constant', 'step', 'multistep'][k%5], milestones=[1, 3, 7],
                          warmup=rng.choice([0., .1, .9*rng.random(), rng.randint(1, total-1)]), floor=rng.random()/2,
                          gamma=rng.random()+.1, step_epochs=rng.randint(1, 5))
        if math.ceil(cfg.warmup*total)>=total and cfg.warmup<1: continue
        kept = replace(cfg, warmup=0., warmup_epochs=warmup_in_epochs(cfg, per_epoch, total))
        for step in {0, 1, total//2, total-1, *(rng.randrange(total) for _ in range(20))}:
            peak = rng.random()*1e-3
            place = peak, step, per_epoch, total
            assert lr_at(cfg, *place)==lr_at(kept, *place)==slow_reference(cfg, *place), (cfg, place)

def words(kind): return '-'.join(map(str, kind.values()))
falling = [dict(schedule='cosine'), dict(schedule='linear'), dict(schedule='polynomial', power=2.),
           dict(schedule='polynomial', power=.5)]
others = [dict(schedule='constant'), dict(schedule='step', step_epochs=2),
          dict(schedule='multistep', milestones=[3, 5])]

@pytest.mark.parametrize('kind', falling, ids=words)
@pytest.mark.parametrize('floor', [dict(floor=.1), dict(floor_lr=1e-4)], ids=['share', 'absolute'])
def test_from_the_peak_down_to_the_floor(kind, floor):
    cfg = OptimConfig(warmup_epochs=1, horizon=8, **kind, **floor)
    for peak in (1e-3, 5e-4):
        rates = [lr_at(cfg, peak, k, 10, 60) for k in range(100)]
        low = floor.get('floor_lr') or peak*floor['floor']
        assert rates[9]==rates[10]==peak and rates[0]==peak/10
        assert all(a>b for a,b in zip(rates[10:80], rates[11:81]))
        assert rates[80:]==[pytest.approx(low, rel=1e-12)]*20

@pytest.mark.parametrize('kind', [*falling, *others], ids=words)
def test_a_change_of_the_batch_bends_nothing(kind):
    "After 3 of 10 epochs of 7 steps the run goes on with 20 or 3: its rates are those of a run that always had them"
    cfg = OptimConfig(lr=1., warmup=10, **kind)
    kept = replace(cfg, warmup=0., warmup_epochs=warmup_in_epochs(cfg, 7, 70))
    assert [lr_at(cfg, 1., k, 7, 70) for k in range(70)]==[lr_at(kept, 1., k, 7, 70) for k in range(70)]
    before = lr_at(kept, 1., 21, 7, 70)
    for n in (20, 3):
        assert abs(warmup_steps(kept, n, 10*n)-10/7*n)<=.5
        # half a step of warm-up more or less moves what follows by less than a step
        rate = lambda step: lr_at(kept, 1., step, n, 10*n)
        steepest = max(abs(rate(k)-rate(k+1)) for k in range(3*n, 3*n+2))
        assert abs(rate(3*n)-before)<=steepest+1e-12
        # a place that a rounding moved, and one between two steps
        assert rate(3*n-1e-10)==pytest.approx(rate(3*n), abs=1e-9)
        assert rate(3*n)>=rate(3*n+.5)>=rate(3*n+1)

def test_a_pair_of_keys_is_an_error():
    for one,other in [('warmup', 'warmup_epochs'), ('floor', 'floor_lr')]:
        says = f"'optim.{other}' must be null beside 'optim.{one}', found 0.0; set one of the two"
        with pytest.raises(ConfigError, match=says): OptimConfig(**{one: .1, other: 0.})
    for key,value in [('power', 0.), ('horizon', 0.), ('warmup_epochs', -1.), ('floor_lr', -1.)]:
        with pytest.raises(ConfigError, match=f"'optim.{key}' must be .*, found {value}"): OptimConfig(**{key: value})

def test_what_a_schedule_cannot_do_is_said_before_training(tmp_path):
    for optim,says in [
        (dict(warmup=0, warmup_epochs=4), "'optim.warmup_epochs' of 4 is 12 steps, but the run has only 12"),
        (dict(horizon=2), "'optim.horizon' of 2 epochs is 6 steps, but the run has 12"),
        (dict(horizon=.5, floor=.1), "'optim.warmup' of 2 is 2 steps, but 'optim.horizon' has only 1.5"),
        (dict(floor_lr=.02), "group 'net' has a peak rate of 0.01, below 'optim.floor_lr' of 0.02"),
    ]:
        with pytest.raises(ConfigError, match=says): fit(config(tmp_path, 'run', optim=optim))
    assert not (tmp_path/'run').exists()

def test_a_run_has_the_rates_of_its_schedule(tmp_path):
    "The first step at rate 0 is what was asked for and no finding; the cosine is that of 8 epochs"
    optim = dict(lr=.01, warmup=0, warmup_epochs=1, warmup_from_zero=True, horizon=8, floor_lr=1e-4)
    cfg = config(tmp_path, 'run', optim=optim)
    fit(cfg)
    found = [r['lr/net'] for r in rows(tmp_path/'run', 'train')]
    assert found==[lr_at(cfg.optim, .01, k, 3, 12) for k in range(12)]
    assert found[:3]==[0., .005, .01] and found[-1]>.005
    assert not [r for r in rows(tmp_path/'run', 'health') if r['code']=='zero_rate']
    assert len(lr_find(cfg, low=1e-5, high=1., steps=30)['rates'])>10

# ---------------------------------------------------------------- averages

class Mostly(nn.Module):
    "Two million frozen numbers and 33 that train, statistics of a batch norm, a buffer that no checkpoint holds"
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(1000, 2000).requires_grad_(False)
        self.norm,self.head = nn.BatchNorm1d(8), nn.Linear(16, 1)
        self.register_buffer('scratch', torch.zeros(5), persistent=False)

def test_what_is_frozen_is_not_kept_twice():
    net = Mostly()
    average = AveragedWeights(net, .9)
    held = 'norm.weight norm.bias norm.running_mean norm.running_var norm.num_batches_tracked head.weight head.bias'
    assert set(average.average)==set(held.split())
    assert sum(v.numel() for v in average.average.values())==50<sum(p.numel() for p in net.parameters())
    body = net.body.weight.clone()
    average.update(); average.swap()
    assert torch.equal(net.body.weight, body)

def test_buffers_are_averaged_and_counters_copied():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3).train()
    average,mean,var = AveragedWeights(norm, .75, warmup=False), torch.zeros(3), torch.ones(3)
    for n in range(1, 4):
        norm(torch.randn(10, 3)+n)
        average.update()
        mean,var = .75*mean+.25*norm.running_mean, .75*var+.25*norm.running_var
        counter = average.average['num_batches_tracked']
        assert counter.item()==n and counter.dtype==torch.int64
    torch.testing.assert_close(average.average['running_mean'], mean)
    torch.testing.assert_close(average.average['running_var'], var)
    live = norm.running_mean.clone()
    average.swap(); assert torch.equal(average.average['running_mean'], live)
    average.swap(); assert torch.equal(norm.running_mean, live)

class Reference(nn.Module):
    "The golden module"
    def __init__(self, tensors):
        super().__init__()
        self.a,self.bn = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.frozen = nn.Parameter(tensors['frozen'].clone(), requires_grad=False)
        for name in ('table', 'loss_normalizer'): self.register_buffer(name, tensors[name].clone())

def test_the_average_of_the_reference(golden):
    "A constant decay; its copy of `loss_normalizer` is of whole numbers, a slip that is not repeated here"
    facts,tensors = golden
    part = lambda at: {k.removeprefix(f'ema/{at}/'): v for k,v in tensors.items() if k.startswith(f'ema/{at}/')}
    net = Reference(part('step0_model'))
    net.load_state_dict(part('step0_model'))
    net.loss_normalizer = net.loss_normalizer.float()
    average = AveragedWeights(net, facts['config']['decay'], warmup=False)
    assert 'frozen' not in average.average
    for k in range(1, facts['config']['steps']+1):
        net.load_state_dict(part(f'step{k}_model'))
        average.update()
        for name,expected in part(f'step{k}_ema').items():
            if name in ('frozen', 'loss_normalizer', 'bn.num_batches_tracked'): continue
            torch.testing.assert_close(average.average[name], expected, rtol=0, atol=facts['tolerances']['ema_atol'])
        assert torch.equal(average.average['bn.num_batches_tracked'], net.bn.num_batches_tracked)

def test_the_decay_grows_or_does_not():
    for warmup in (True, False):
        net = nn.Linear(1, 1, bias=False)
        average,expected = AveragedWeights(net, .6, warmup), net.weight.item()
        for u in range(40):
            with torch.no_grad(): net.weight.fill_(float(u))
            average.update()
            d = min(.6, (1+u)/(10+u)) if warmup else .6
            expected = d*expected+(1-d)*u
            assert average.average['weight'].item()==pytest.approx(expected, rel=1e-5)
    assert AveragedWeights(net, .6).warmup and TrainConfig().ema_warmup

# ---------------------------------------------------------------- averages in a run

class Body(Toy):
    "A frozen body in front of the toy, which checkpoints hold"
    def __init__(self, cfg):
        super().__init__(cfg)
        self.body = nn.Linear(4, 4).requires_grad_(False)
    def look(self, batch): return super().look(batch | dict(x=self.body(batch['x'])))

@dataclass(kw_only=True)
class BodyConfig(ToyConfig):
    def build(self, facts=None): return Body(self)

def body(*words, **named): return BodyConfig(**vars(config(*words, **named)))

@pytest.fixture
def registered():
    "The toy with a body, as `load_run` finds a system"
    registry.register('toy', SimpleNamespace(Config=BodyConfig))

def test_a_checkpoint_holds_averages_of_what_trains(tmp_path, registered):
    learner = fit(body(tmp_path, 'run'))
    folder = find_checkpoint(tmp_path/'run')
    model,average = read_part(folder, 'model'), read_part(folder, 'ema')
    assert model.keys()-average.keys()=={'body.weight', 'body.bias'} and not average.keys()-model.keys()
    system,_ = registry.load_run(tmp_path/'run', 'last')
    for k,v in system.state_dict().items(): assert torch.equal(v, average.get(k, model[k])), k
    assert any(not torch.equal(model[k], average[k]) for k in average)
    with torch.no_grad(), learner.evaluating():
        for k,v in learner.system.state_dict().items(): assert torch.equal(v, system.state_dict()[k]), k

def test_a_checkpoint_whose_average_holds_everything_still_loads(tmp_path, registered):
    "As it was written before; resumed to the last bit, and read"
    whole = fit(body(tmp_path, 'whole'))
    fit(body(tmp_path, 'run'), [StopAt(7)])
    folder = find_checkpoint(tmp_path/'run')
    save_file(read_part(folder, 'model') | read_part(folder, 'ema'), folder/'ema.safetensors')
    system,_ = registry.load_run(tmp_path/'run', 'last')
    assert torch.equal(system.body.weight, read_part(folder, 'model')['body.weight'])
    fit(body(tmp_path, 'run'))
    assert curve(tmp_path/'run')==curve(tmp_path/'whole') and differences(tmp_path/'run', tmp_path/'whole')==[]

def test_an_average_that_misses_something_is_refused(tmp_path, registered):
    fit(body(tmp_path, 'run'), [StopAt(7)])
    folder = find_checkpoint(tmp_path/'run')
    kept = read_part(folder, 'ema')
    save_file({k: v for k,v in kept.items() if k!='net.0.weight'}, folder/'ema.safetensors')
    says = r"ema.safetensors: holds no average of 1 tensors .* 'net.0.weight'"
    with pytest.raises(CheckpointError, match=says): fit(body(tmp_path, 'run'))
    with pytest.raises(CheckpointError, match=says): registry.load_run(tmp_path/'run', 'last')
    save_file(kept | {'net.0.weight': torch.zeros(3)}, folder/'ema.safetensors')
    with pytest.raises(CheckpointError, match='holds no average of 1 tensors'): fit(body(tmp_path, 'run'))

def test_a_constant_decay_in_a_run(tmp_path):
    "Stopped and resumed to the last bit; another average than the growing decay gives, of the same weights"
    fit(config(tmp_path, 'whole', ema_warmup=False))
    fit(config(tmp_path, 'run', ema_warmup=False), [StopAt(4)])
    learner = fit(config(tmp_path, 'run', ema_warmup=False))
    assert not learner.callback(Averaging).weights.warmup and learner.callback(Averaging).weights.updates==12
    assert differences(tmp_path/'run', tmp_path/'whole')==[]
    fit(config(tmp_path, 'growing'))
    (_,constant),(_,growing) = (contents(find_checkpoint(tmp_path/n)) for n in ('whole', 'growing'))
    assert all(torch.equal(constant[k], growing[k]) for k in constant if k.startswith('model.'))
    assert not all(torch.equal(constant[k], growing[k]) for k in constant if k.startswith('ema.'))

def test_tied_weights_are_frozen_under_every_name():
    tied = nn.ModuleDict(dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    tied['b'].weight = tied['a'].weight
    assert set(averaged_state(tied))=={'a.weight', 'a.bias', 'b.weight', 'b.bias'}
    tied['b'].weight.requires_grad_(False)
    assert set(averaged_state(tied))=={'a.bias', 'b.bias'}
