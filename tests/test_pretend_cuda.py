"fgclip and uniad on a GPU that is not there: the numbers of the CPU, no tensor left behind, no further wait"
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
import pytest, torch
import test_fgclip_system as fgclip_tests
import test_uniad_system as uniad_tests
from toy_system import StopAt, curve, rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from pretend_cuda import DEVICE, on_device
from vadnb.core import read_json
from vadnb.systems.uniad.scan import ImageScan
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.feed import look_through, to_device
from vadnb.train.learner import fit
from vadnb.worlds.street import street_world
from vadnb.worlds.textures import texture_world

# every loss and both banks
FGCLIP = '''--data.valid_json valid.json --loss.background_weight 1 --loss.quiet_weight 1 --bank.regions 16
    --bank.clips 16 --bank.warmup 1'''.split()
# dropout of the CPU draws other numbers than that of a GPU
UNIAD = '--model.dropout 0 --score.false_alarm_rate 0.4'.split()
RUN = '--train.steps 3 --train.unit step --train.evaluate_every 3 --train.save_every 2 --train.ema 0.9'.split()


@dataclass
class Subject:
    "A system in its small world"
    name:str
    config:Callable # name of a run and further words → configuration
    example:Path # what is predicted
    waits:int # at which the host may wait in loss and backward pass of a step that reads from everything it can
    close:dict # how far the numbers of the two devices may lie apart

    def build(self, device, *more):
        "System, training batches and data as a run sees them, the system on a device"
        torch.manual_seed(0)
        cfg = self.config('built', *more)
        data = cfg.make_data()
        system = cfg.build(data.facts())
        system.start(True)
        fed = system.feed(data, True)
        train = fed.split('train')
        batches = [fed.collate([train[i] for i in range(k, k+4)]) for k in (0, 2)]
        return system.to(device).train(), batches, fed

@pytest.fixture(scope='module', params=['fgclip', 'uniad'])
def subject(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param=='fgclip':
        world = street_world(folder/'world', videos=6, valid_videos=4, test_videos=2, size=(48, 64), frames=(32, 36))
        def config(name, *more): return fgclip_tests.config(world, folder/'runs', name, *FGCLIP, *more)
        example = Path(world.path(world.names('test')[0]))
        return Subject('fgclip', config, example, 8, dict(rtol=0, atol=0))
    root = texture_world(folder/'world', ['dots'], train=12, good=2, defective=2, size=(64, 64)).root
    def config(name, *more): return uniad_tests.config(root, folder/'runs', name, *UNIAD, *more)
    # on the CPU its products, convolutions and attention take paths of their own
    return Subject('uniad', config, root/'dots'/'test', 0, dict(rtol=1e-4, atol=1e-5))

@pytest.fixture(autouse=True)
def same_sums(monkeypatch):
    "Attention and updates that add up alike on both devices, and no pictures"
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *words, fused=None, **named: adamw(*words, **named))
    monkeypatch.setattr(ImageScan, 'pictures', lambda self: {})
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def same(a, b, close):
    "Assert that two dicts of tensors or numbers are equal within bounds"
    assert a.keys()==b.keys()
    for k in a:
        torch.testing.assert_close(torch.as_tensor(a[k]), torch.as_tensor(b[k]), equal_nan=True,
                                   msg=lambda says: f'{k}: {says}', **close)

def train_step(system, batch, device):
    "One step without the optimizer: losses"
    torch.manual_seed(1)
    system.zero_grad()
    losses = system.loss(to_device(batch, device))
    losses['loss'].backward()
    return losses

def both_steps(subject, device):
    "Losses of two steps, the second of which reads the banks, and its gradients"
    system,batches,_ = subject.build(device)
    res = {}
    for k,batch in enumerate(batches):
        for name,x in train_step(system, batch, device).items():
            assert on_device(x)==(device!='cpu'), name
            res[f'{k} {name}'] = x
        system.after_step()
    res |= {f'gradient {n}': p.grad for n,p in system.named_parameters() if p.grad is not None}
    return {k: x.detach().cpu() for k,x in res.items()}

# ---------------------------------------------------------------- loss, gradients, waits

def test_loss_and_gradients_are_those_of_the_cpu(subject, on_cuda):
    plain = both_steps(subject, 'cpu')
    with on_cuda(): found = both_steps(subject, DEVICE)
    assert sum(k.startswith('gradient') for k in plain)>30
    same(found, plain, subject.close)

def test_a_step_waits_for_the_device_no_more_often(subject, on_cuda):
    with on_cuda() as device:
        # features come from images, not from a cache
        system,batches,_ = subject.build(DEVICE, *(('--data.cache', 'off') if subject.name=='uniad' else ()))
        for batch in batches:
            device.waits.clear()
            train_step(system, batch, DEVICE)
            found,listed = device.total, device.listed()
            system.after_step()
    assert found<=subject.waits, f'{found} waits instead of {subject.waits}:\n{listed}'

# ---------------------------------------------------------------- evaluation and prediction

def measure(subject, device):
    "Metrics of both kinds, and what prediction says"
    system,_,fed = subject.build(device)
    system.eval()
    def see(split): return look_through(system, fed, split, system.cfg.train, device)
    with torch.no_grad():
        scan = see('valid')
        system.calibration = scan.calibration()
        metrics,full,predicted = scan.metrics(), see('test').metrics(), list(system.predict(subject.example))
    if subject.name=='fgclip': said = dict(scores=predicted[0].scores, heat=predicted[0].heat)
    else: said = {p.name: p.map for p in predicted}
    return metrics, full, said

def test_metrics_and_predictions_are_those_of_the_cpu(subject, on_cuda):
    plain = measure(subject, 'cpu')
    with on_cuda(): found = measure(subject, DEVICE)
    assert len(plain[0])>8 and len(plain[1])>8 and len(plain[2])>1
    for a,b in zip(found, plain): same(a, b, subject.close)

# ---------------------------------------------------------------- a whole run

def run(subject, name, device, *callbacks): return fit(subject.config(name, *RUN, '--train.device', device), callbacks)

def numbers(learner):
    "What a run logged, without words and clock"
    return [{k: v for k,v in r.items() if isinstance(v, (int, float))} for r in curve(learner.run)]

def weights(run):
    "What the last checkpoint holds of the model"
    folder = find_checkpoint(run)
    parts = read_json(folder/'card.json')['parts']
    return {f'{p}.{k}': v for p in parts for k,v in read_part(folder, p).items()}

def test_a_run_that_stops_and_resumes_is_that_of_the_cpu_left_alone(subject, on_cuda):
    plain = run(subject, 'cpu', 'cpu')
    with on_cuda():
        stopped = run(subject, 'cuda', 'cuda', StopAt(2))
        assert stopped.step==2 and stopped.device.type=='cuda'
        resumed = run(subject, 'cuda', 'cuda')
        assert all(map(on_device, resumed.system.state_dict().values()))
    assert resumed.step==3 and rows(resumed.run, 'resume') and rows(resumed.run, 'valid')
    for a,b in zip(numbers(resumed), numbers(plain), strict=True): same(a, b, subject.close)
    same(*(weights(learner.run) for learner in (resumed, plain)), subject.close)

# ---------------------------------------------------------------- what the device itself refuses and counts

def test_devices_do_not_mix(on_cuda):
    here = torch.ones(3)
    with on_cuda():
        there = here.to('cuda')
        assert there.device==DEVICE and there.is_cuda and not there.is_cpu and (there*2).device==DEVICE
        for mix in (lambda: there+here, lambda: torch.cat([there, here]), lambda: here@there, lambda: there.add_(here)):
            with pytest.raises(RuntimeError, match='same device'): mix()
        for read in (there.numpy, there.__array__):
            with pytest.raises(TypeError, match='Tensor.cpu'): read()
        assert there.cpu().numpy().sum()==(there+torch.tensor(0.)).sum().item()==3
        with pytest.raises(RuntimeError, match='same device'): torch.nn.Linear(3, 1)(there)
    assert not torch.cuda.is_available()

@pytest.mark.parametrize('work,kind', [
    (lambda x: x.sum().item(), 'item'), (lambda x: bool((x>0).all()), 'item'), (lambda x: x.tolist(), 'cpu'),
    (lambda x: x.cpu(), 'cpu'), (lambda x: x.nonzero(), 'nonzero'), (lambda x: x[x>0], 'mask'),
    (lambda x: x.unique(), 'unique'), (lambda x: x[[0, 2]], 'upload'), (lambda x: torch.ones(2).to('cuda'), 'upload'),
    (lambda x: x.masked_select(x>0), 'nonzero'), (lambda x: torch.equal(x, x), 'item'),
    (lambda x: torch.ones(2).to('cuda', non_blocking=True), None), (lambda x: x.masked_fill(x>0, 0), None),
    (lambda x: torch.where(x>0, x, 0).sum(), None), (lambda x: x.__setitem__(x>0, 0), None), (lambda x: x[1:], None),
    (lambda x: torch.zeros(3, device=x.device)+x, None)])
def test_waits_are_counted(on_cuda, work, kind):
    with on_cuda() as device:
        x = torch.ones(3).to('cuda', non_blocking=True)
        work(x)
    assert [k for k,_ in device.waits]==([kind] if kind else []), device.listed()

# ---------------------------------------------------------------- colours of a clip
def test_colours_of_clips_wait_for_nothing(on_cuda):
    from vadnb.data.augmentation import OPERATIONS, ColourDraw, recolour
    frames = torch.randint(0, 256, (2, 6, 3, 16, 16), dtype=torch.uint8)
    values = dict(Posterize=3, Solarize=230., Cutout=(.18, .5, .5))
    jitter = (('hue', .05), ('contrast', .7), ('saturation', 1.3), ('brightness', .9))
    draws = [ColourDraw(tuple((n, values.get(n, 1.72)) for n in OPERATIONS[5:]), jitter), ColourDraw()]
    with on_cuda() as device:
        batch = to_device(dict(frames=frames, colour=draws), DEVICE)
        device.waits.clear()
        out = recolour(batch['frames'], batch['colour'])
        assert on_device(out) and device.total==0, device.waits
        out = out.cpu()
    assert torch.equal(out, recolour(frames, draws))
