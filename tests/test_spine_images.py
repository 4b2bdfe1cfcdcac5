"Pictures, TensorBoard's pages, calibration, frozen weights outside of checkpoints, and where a run starts from: none of it moves training"
import json, os, shutil, signal
from dataclasses import dataclass, fields
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from test_processes import together
from toy_system import Errors, FailAt, Points, StopAt, Toy, ToyConfig, ToyData, as_a_program, card, config, curve
from toy_system import different, differences, processes, rows, snapshots
from vadnb.core import CheckpointError, DataError, read_yaml
from vadnb.plots import figure_bytes, new_figure
from vadnb.systems import registry
from vadnb.train import callbacks
from vadnb.train.callbacks import Averaging, Callback
from vadnb.train.checkpoint import checkpoint_folders, find_checkpoint, read_part
from vadnb.train.learner import fit

def figure(n):
    "A figure that says how many evaluations there were"
    fig = new_figure(2, 1)
    fig.subplots().plot(range(n+1))
    return fig

class Shown(Errors):
    "Asks the toy what it shows and what it has found out"
    held = ('system',)
    def pictures(self): return self.system.pictures()
    def calibration(self): return self.system.found_out(self.metrics()['error'])

class Showing(Toy):
    def pictures(self): return {}
    def found_out(self, error): return None
    def scan(self, data, split):
        scan = Shown(super().scan(data, split).said)
        scan.system = self
        return scan

class Drawn(Showing):
    "One picture, for which every generator is asked; and a graph with dropout and batch statistics in it"
    def pictures(self):
        assert not self.training and not torch.is_grad_enabled()
        torch.rand(3); np.random.rand()
        return dict(weights=figure(self.seen))
    def scan(self, data, split):
        self.seen = getattr(self, 'seen', 0)+1
        return super().scan(data, split)
    def graph(self): return nn.Sequential(self.net, Noise()), (torch.rand(2, 4),)

class Noise(nn.Module):
    def forward(self, x): return x+torch.randn_like(x)

class Weights(Showing):
    "A picture of the weights, which are averaged when evaluation sees them"
    def pictures(self):
        fig = new_figure(2, 1)
        fig.subplots().plot(self.net[0].weight.flatten())
        return dict(weights=fig)

class Renamed(Drawn):
    def pictures(self): return {f'picture {self.seen}': figure(self.seen), 'metal_nut v1.2': figure(0)}

class Calibrated(Showing):
    "Finds out the error"
    def found_out(self, error): return dict(limit=error, points=7)

class CalibratedOnce(Calibrated):
    def found_out(self, error): return super().found_out(error) if self.calibration is None else None

class Split(Toy):
    "A frozen body, the same whenever it is built, which no checkpoint holds"
    def __init__(self, cfg):
        super().__init__(cfg)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    def parts(self): return dict(net=self.net)
    def provenance(self): return dict(body='drawn with seed 7')
    def train(self, mode=True): super().train(mode); self.body.eval(); return self
    def look(self, batch): return super().look(batch | dict(x=self.body(batch['x'])))
    def graph(self): return nn.Sequential(self.body, self.net), (torch.ones(2, 4),)

class Memory(Points):
    workers = 0
    asked = []
    def __getitem__(self, i): self.asked.append(os.getpid()); return super().__getitem__(i)

class HeldData(ToyData):
    def __init__(self, cfg): self.splits = dict(train=Memory(23), valid=Memory(7))

@dataclass(kw_only=True)
class KindConfig(ToyConfig):
    kind:str = 'Drawn' # class of the system
    def make_data(self): return HeldData(self) if self.kind=='Held' else ToyData(self)
    def build(self, facts=None): return globals()[self.kind](self)

Held = Toy

def kind(name, *words, **named):
    "The toy's configuration, for another class"
    cfg = config(*words, **named)
    return KindConfig(kind=name, **{f.name: getattr(cfg, f.name) for f in fields(cfg)})

def drawn(run): return {p.name: p.read_bytes() for p in sorted((run/'pictures').iterdir())}

def png(n): return figure_bytes(figure(n), 'png')

# ---------------------------------------------------------------- pictures

def test_pictures_are_those_of_the_best_evaluation(tmp_path):
    "And show the weights that were evaluated"
    fit(kind('Drawn', tmp_path, 'run', script=[3., 1., 2., 2.]))
    assert [(r['step'], r['names']) for r in rows(tmp_path/'run', 'pictures')]==[(3, ['weights']), (6, ['weights'])]
    assert drawn(tmp_path/'run')=={'weights.png': png(2)}
    learner = fit(kind('Weights', tmp_path, 'averaged', epochs=1))
    shown = drawn(tmp_path/'averaged')['weights.png']
    assert shown!=figure_bytes(Weights.pictures(learner.system.requires_grad_(False))['weights'], 'png')
    learner.callback(Averaging).weights.swap()
    assert shown==figure_bytes(learner.system.pictures()['weights'], 'png')

def test_where_no_evaluation_is_the_best_the_last_one_is_shown(tmp_path):
    fit(kind('Drawn', tmp_path, 'run', script=[float('nan')]*4))
    assert rows(tmp_path/'run', 'best')==[] and drawn(tmp_path/'run')=={'weights.png': png(4)}

def test_nothing_shown_nothing_written(tmp_path):
    fit(config(tmp_path, 'run', trackers=['tensorboard']))
    assert not (tmp_path/'run'/'pictures').exists() and not rows(tmp_path/'run', 'pictures')+rows(tmp_path/'run', 'note')
    assert card(find_checkpoint(tmp_path/'run'))['calibration'] is None

def test_showing_leaves_training_alone(tmp_path):
    "Pictures, images and a graph, beside a toy without any of them; stopped and resumed too"
    some = dict(trackers=['tensorboard'])
    fit(config(tmp_path, 'plain', **some))
    fit(kind('Drawn', tmp_path, 'drawn', **some))
    assert len(rows(tmp_path/'drawn', 'pictures'))>1
    fit(kind('Drawn', tmp_path, 'parts', **some), [StopAt(7)])
    fit(kind('Drawn', tmp_path, 'parts', **some))
    for name in ('drawn', 'parts'): assert curve(tmp_path/name)==curve(tmp_path/'plain') and differences(tmp_path/name, tmp_path/'plain')==[]

def refuse(*_): raise CheckpointError('weights.png: No space left on device')
def gone(self): raise DataError('bolt/007.png: no such file')

@pytest.mark.parametrize('where,name,how,says', [(Drawn, 'pictures', gone, 'bolt/007.png'), (callbacks, 'save_figure', refuse, 'No space left'), (Drawn, 'pictures', lambda self: {'bolt/7': figure(1)}, "'bolt/7'"),
                                                 (Drawn, 'pictures', lambda self: {'../7': figure(1)}, "'../7'")])
def test_a_picture_that_cannot_be_drawn_costs_no_training(tmp_path, monkeypatch, capsys, where, name, how, says):
    monkeypatch.setattr(where, name, how)
    fit(kind('Drawn', tmp_path, 'run', epochs=1, progress=True))
    noted = rows(tmp_path/'run', 'note')
    assert [(r['step']) for r in noted]==[3] and says in noted[0]['message'] and noted[0]['message'] in capsys.readouterr().err
    assert rows(tmp_path/'run', 'end')[-1]['status']=='done' and not list(tmp_path.rglob('*.png'))
    fit(config(tmp_path, 'plain', epochs=1, progress=True))
    assert curve(tmp_path/'run')==curve(tmp_path/'plain') and differences(tmp_path/'run', tmp_path/'plain')==[]

def test_pictures_of_an_earlier_evaluation_make_room(tmp_path):
    "Only files that the run itself has drawn"
    (tmp_path/'run'/'pictures').mkdir(parents=True); (tmp_path/'run'/'config.yaml').write_text('{}'); (tmp_path/'run'/'pictures'/'mine.png').write_bytes(b'')
    fit(kind('Renamed', tmp_path, 'run', script=[3., 1., 2., 2.]))
    assert list(drawn(tmp_path/'run'))==['metal_nut v1.2.png', 'mine.png', 'picture 2.png']

def test_who_goes_back_takes_the_pictures_of_the_future_away(tmp_path):
    fit(kind('Drawn', tmp_path, 'run', script=[4., 3., 2., 1.], keep=9), [StopAt(10)])
    assert drawn(tmp_path/'run')
    fit(kind('Drawn', tmp_path, 'run', script=[5., 5., 5., 5.], keep=9, resume=str(tmp_path/'run'/'checkpoints'/'step-000003')))
    assert drawn(tmp_path/'run')=={} and find_checkpoint(tmp_path/'run', 'best').name=='step-000003'
    # resumed where they were drawn, they stay
    fit(kind('Drawn', tmp_path, 'stays', script=[4.]), [StopAt(3)])
    fit(kind('Drawn', tmp_path, 'stays', script=[5., 5., 5.]))
    assert drawn(tmp_path/'stays')=={'weights.png': png(1)}

class Near:
    "Operations on a file in `pictures`, and the next one after each"
    before = False
    def __call__(self, event, names):
        if event not in ('open', 'os.rename', 'os.mkdir'): return False
        after,self.before = self.before, any('pictures' in n for n in names)
        return after or self.before

def test_killed_while_drawing(tmp_path):
    fit(kind('Weights', tmp_path, 'whole', epochs=2))
    assert [r['step'] for r in rows(tmp_path/'whole', 'pictures')]==[3, 6]
    (tmp_path/'live').mkdir()
    child = processes.Process(target=snapshots, args=(tmp_path/'live', tmp_path/'kept', Near(), kind('Weights', tmp_path/'live', 'run', epochs=2)))
    child.start(); child.join(300)
    assert child.exitcode==0 and drawn(tmp_path/'live'/'run')==drawn(tmp_path/'whole')
    for number,(folder,new) in enumerate(different(tmp_path/'kept'), 1):
        done = len(checkpoint_folders(folder/'run'))
        if not new: continue
        # no picture lies there that the log does not know
        assert {p.stem for p in folder.rglob('pictures/*.png')}<={name for r in rows(folder/'run', 'pictures') for name in r['names']}
        fit(kind('Weights', shutil.copytree(folder, tmp_path/f'going{number}', symlinks=True), 'run', epochs=2))
        going = tmp_path/f'going{number}'/'run'
        assert curve(going)==curve(tmp_path/'whole') and differences(going, tmp_path/'whole')==[]
        assert drawn(going)==drawn(tmp_path/'whole')
    assert number>6 and done==1

# ---------------------------------------------------------------- TensorBoard

def board(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run/'tensorboard'), size_guidance=dict(images=0)); found.Reload()
    return found

def graphs(run):
    "How many graphs the files hold"
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    return sum(event.HasField('graph_def') for p in (run/'tensorboard').rglob('events*') for event in EventFileLoader(str(p)).Load())

def test_tensorboard_holds_numbers_pictures_and_the_graph(tmp_path):
    fit(kind('Drawn', tmp_path, 'run', script=[3., 2., 2.5, 1.], trackers=['tensorboard']))
    found = board(tmp_path/'run')
    assert [e.step for e in found.Scalars('valid/error')]==[3, 6, 9, 12] and 'train/loss' in found.Tags()['scalars']
    images = found.Images('pictures/weights')
    assert [e.step for e in images]==[3, 6, 12]
    (tmp_path/'last.png').write_bytes(images[-1].encoded_image_string)
    shown,drawn = (np.asarray(Image.open(p).convert('RGB')) for p in (tmp_path/'last.png', tmp_path/'run'/'pictures'/'weights.png'))
    assert shown.shape==(150, 300, 3) and (shown==drawn).all()
    nodes = [n.name for n in found.Graph().node]
    assert any('Linear[0]' in n for n in nodes) and any('BatchNorm1d[1]' in n for n in nodes) and any(n.startswith('input/') for n in nodes)

def test_the_graph_is_drawn_at_the_start_only(tmp_path):
    some = dict(trackers=['tensorboard'])
    fit(kind('Drawn', tmp_path, 'run', **some), [StopAt(4)])
    fit(kind('Drawn', tmp_path, 'run', **some))
    assert graphs(tmp_path/'run')==1
    # a tracker that is asked for later draws it later
    fit(kind('Drawn', tmp_path, 'late'), [StopAt(4)])
    fit(kind('Drawn', tmp_path, 'late', **some))
    assert graphs(tmp_path/'late')==1
    fit(config(tmp_path, 'none', **some))
    assert graphs(tmp_path/'none')==0

class Untraceable(nn.Module):
    def forward(self, x): raise TypeError('this model\nis not to be traced')

@pytest.mark.parametrize('graph', [(Untraceable(), (torch.ones(1),)), (nn.Linear(3, 1), (torch.ones(1, 4),)), (nn.Linear(3, 1), ())])
def test_a_model_that_cannot_be_traced_trains(tmp_path, monkeypatch, capsys, recwarn, graph):
    monkeypatch.setattr(Drawn, 'graph', lambda self: graph)
    fit(kind('Drawn', tmp_path, 'run', epochs=1, progress=True, trackers=['tensorboard']))
    said,noted = capsys.readouterr(), rows(tmp_path/'run', 'note')
    assert [r['step'] for r in noted]==[0] and noted[0]['message'].startswith('TensorBoard gets no graph: ') and '\n' not in noted[0]['message']
    assert noted[0]['message'] in said.err and said.out=='' and not [w for w in recwarn if 'trace' in str(w.message).lower()]
    fit(config(tmp_path, 'plain', epochs=1, progress=True, trackers=['tensorboard']))
    assert curve(tmp_path/'run')==curve(tmp_path/'plain') and differences(tmp_path/'run', tmp_path/'plain')==[]
    assert graphs(tmp_path/'run')==0

def test_every_tracker_gets_the_pictures(tmp_path):
    "One that looks like that of Weights & Biases, which has no idea of data formats"
    got = []
    class Other(Callback):
        order = 70
        def before_fit(self):
            self.learner.accelerator.trackers.append(SimpleNamespace(name='wandb', log=lambda values, step=None: None, finish=lambda: None,
                                                                     log_images=lambda values, step: got.extend((k, [v.shape for v in vs], step) for k,vs in values.items())))
    fit(kind('Drawn', tmp_path, 'run', epochs=1, trackers=['tensorboard']), [Other()])
    assert got==[('pictures/weights', [(150, 300, 3)], 3)]

@pytest.mark.parametrize('name,step', [('add_images', 3), ('add_graph', 0)])
def test_trackers_that_cannot_write(tmp_path, monkeypatch, name, step):
    from torch.utils.tensorboard import SummaryWriter
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(SummaryWriter, name, full)
    with pytest.raises(CheckpointError, match='trackers cannot write .No space left on device.*--train.trackers'): fit(kind('Drawn', tmp_path, 'run', trackers=['tensorboard']))
    assert rows(tmp_path/'run', 'end')[-1]['step']==step

# ---------------------------------------------------------------- calibration

EACH = dict(unit='step', save_every=1, evaluate_every=2, keep=None)

def calibration(run, step): return card(run/'checkpoints'/f'step-{step:06d}')['calibration']

def test_calibration_is_that_of_the_last_evaluation_and_says_so(tmp_path):
    fit(kind('Calibrated', tmp_path, 'run', **EACH))
    evaluated = {r['step']: r['error'] for r in rows(tmp_path/'run', 'valid')}
    assert calibration(tmp_path/'run', 1) is None
    for step in (2, 3, 4, 11, 12):
        held = calibration(tmp_path/'run', step)
        assert held==dict(step=step//2*2, value=dict(limit=evaluated[step//2*2], points=7))
    # what evaluation did not find out anew stays that of the older weights
    fit(kind('CalibratedOnce', tmp_path, 'once', **EACH))
    assert calibration(tmp_path/'once', 12)['step']==2

@pytest.mark.parametrize('stop', [4, 5])
def test_calibration_survives(tmp_path, stop):
    "Also one that is older than the checkpoint"
    fit(kind('CalibratedOnce', tmp_path, 'whole', **EACH))
    fit(kind('CalibratedOnce', tmp_path, 'run', **EACH), [StopAt(stop)])
    learner = fit(kind('CalibratedOnce', tmp_path, 'run', **EACH))
    assert curve(tmp_path/'run')==curve(tmp_path/'whole') and differences(tmp_path/'run', tmp_path/'whole')==[]
    limit = next(r['error'] for r in rows(tmp_path/'run', 'valid') if r['step']==2)
    assert (learner.system.calibrated_at, learner.system.calibration)==(2, dict(limit=limit, points=7))

def test_a_checkpoint_without_calibration(tmp_path):
    "Of a time when the system had none: it has none until it is evaluated"
    fit(config(tmp_path, 'run'), [StopAt(4)])
    seen = []
    class Look(Callback):
        def before_fit(self): seen.append((self.learner.system.calibration, self.learner.system.calibrated_at))
    class Default(Calibrated): calibration,calibrated_at = dict(limit=1.), 99
    globals()['Default'] = Default
    learner = fit(kind('Default', tmp_path, 'run'), [Look()])
    assert seen==[(None, None)] and learner.system.calibrated_at==12

@pytest.mark.parametrize('harm', ['cut', 'gone', 'other'])
def test_a_damaged_card_is_named(tmp_path, harm):
    fit(kind('Calibrated', tmp_path, 'run', keep=9), [StopAt(7)])
    file = find_checkpoint(tmp_path/'run')/'card.json'
    if harm=='cut': file.write_bytes(file.read_bytes()[:-9])
    if harm=='gone': file.unlink()
    if harm=='other': file.write_text(json.dumps(json.loads(file.read_text()) | dict(calibration=[1])))
    with pytest.raises(CheckpointError) as e: fit(kind('Calibrated', tmp_path, 'run', keep=9))
    assert str(file) in str(e.value) and '\n' not in str(e.value)

# ---------------------------------------------------------------- every checkpoint

def test_every_checkpoint_is_kept(tmp_path):
    some = dict(unit='step', keep=None)
    fit(config(tmp_path, 'run', **some), [StopAt(7)])
    fit(config(tmp_path, 'run', **some))
    assert [p.name for p in checkpoint_folders(tmp_path/'run')]==[f'step-{k:06d}' for k in range(1, 13)]
    assert read_yaml(tmp_path/'run'/'config.yaml')['train']['keep'] is None
    assert registry.load_config('fgclip_demo', ['--train.keep', 'null']).train.keep is None

# ---------------------------------------------------------------- where a run starts from

class KillAt(FailAt):
    def after_step(self):
        if self.learner.step==self.at: os.kill(os.getpid(), signal.SIGKILL)

def killed(*words, at, **named):
    "For another process: train, and die after a step"
    as_a_program()
    fit(config(*words, **named), [KillAt(at)])

def kill(*words, **named):
    child = processes.Process(target=killed, args=words, kwargs=named)
    child.start(); child.join(300)
    assert child.exitcode==-signal.SIGKILL

@pytest.mark.parametrize('form,then', [('first', None), ('first/checkpoints/step-000006', None), ('first/last', None), ('first', 'goes on'), ('first/checkpoints/step-000006', 'is removed')])
def test_a_repeated_command_goes_on_from_the_own_checkpoint(tmp_path, capsys, form, then):
    "Start from another run, kill -9, the same command again, and again"
    fit(config(tmp_path, 'first'), [StopAt(6)])
    some = dict(resume=str(tmp_path/form), optim=dict(lr=.003), progress=True)
    fit(config(tmp_path, 'whole', **some))
    kill(tmp_path, 'second', at=7, **some)                     # before a checkpoint of its own
    assert not checkpoint_folders(tmp_path/'second')
    kill(tmp_path, 'second', at=10, **some)
    if then=='goes on': fit(config(tmp_path, 'first'), [StopAt(9)])
    if then=='is removed': shutil.rmtree(tmp_path/'first')
    fit(config(tmp_path, 'second', **some))
    assert [(r['step'], r['from']) for r in rows(tmp_path/'second', 'resume')][-2:]==[(6, '../first/checkpoints/step-000006'), (9, 'checkpoints/step-000009')]
    assert rows(tmp_path/'second', 'resume')[-1]['changed']=={}
    err = capsys.readouterr().err
    assert str(tmp_path/form) in err and 'continues from its own step-000009' in err
    assert curve(tmp_path/'second')==curve(tmp_path/'whole') and differences(tmp_path/'second', tmp_path/'whole')==[]
    with pytest.raises(CheckpointError, match='is finished'): fit(config(tmp_path, 'second', **some))

def test_another_place_than_the_first_is_refused(tmp_path):
    "Another checkpoint of the same source; and a source from which this run did not start"
    fit(config(tmp_path, 'first', keep=9), [StopAt(6)])
    fit(config(tmp_path, 'second', resume=str(tmp_path/'first')), [StopAt(9)])
    fit(config(tmp_path, 'other'), [StopAt(6)])
    for source in ('first/checkpoints/step-000003', 'other'):
        with pytest.raises(CheckpointError, match='holds checkpoints of its own'): fit(config(tmp_path, 'second', resume=str(tmp_path/source)))
    assert fit(config(tmp_path, 'second', resume=str(tmp_path/'first'))).step==12

def test_going_back_in_the_same_run_is_no_repetition(tmp_path):
    "Its log is lost, and begins with a row that leads to a checkpoint of its own"
    fit(config(tmp_path, 'run', keep=9), [StopAt(6)])
    (tmp_path/'run'/'log.jsonl').unlink()
    back = str(tmp_path/'run'/'checkpoints'/'step-000003')
    for stop in (9, 6): fit(config(tmp_path, 'run', keep=9, resume=back), [StopAt(stop)])
    assert [(r['step'], r['from']) for r in rows(tmp_path/'run', 'resume')]==[(3, 'checkpoints/step-000003')]*2
    assert find_checkpoint(tmp_path/'run').name=='step-000006'

# ---------------------------------------------------------------- frozen weights outside of checkpoints

def test_weights_that_a_system_leaves_out(tmp_path, monkeypatch):
    "Resumed and averaged to the last bit, traced, and back from the run folder"
    some = dict(trackers=['tensorboard'])
    whole = fit(kind('Split', tmp_path, 'whole', **some))
    fit(kind('Split', tmp_path, 'run', **some), [StopAt(7)])
    learner = fit(kind('Split', tmp_path, 'run', **some))
    assert curve(tmp_path/'run')==curve(tmp_path/'whole') and differences(tmp_path/'run', tmp_path/'whole')==[]
    place = find_checkpoint(tmp_path/'run')
    assert read_part(place, 'net').keys()==learner.system.net.state_dict().keys()
    assert read_part(place, 'ema').keys()==Toy(learner.cfg).state_dict().keys()
    assert (card(place)['parts'], card(place)['provenance'])==(['net'], dict(body='drawn with seed 7'))
    assert all(torch.equal(v, whole.system.body.state_dict()[k]) for k,v in learner.system.body.state_dict().items())
    assert rows(tmp_path/'run', 'note')==[] and graphs(tmp_path/'run')==1
    registry.register('toy', SimpleNamespace(Config=KindConfig))
    system,folder = registry.load_run(tmp_path/'run', 'last')
    average = learner.callback(Averaging).weights.average
    assert all(torch.equal(v, average[k]) for k,v in system.state_dict().items() if k in average)
    assert torch.equal(system.body[0].weight, learner.system.body[0].weight)
    data = system.cfg.make_data()
    with torch.no_grad(): errors = system.look(data.collate([data.split('valid')[i] for i in range(7)]))
    assert errors.mean().item()==pytest.approx(learner.metrics['error'], rel=1e-6)
    # other frozen weights than those of training are refused
    monkeypatch.setattr(Split, 'provenance', lambda self: dict(body='drawn with seed 8'))
    with pytest.raises(CheckpointError, match='was trained with body drawn with seed 7'): registry.load_run(tmp_path/'run', 'last')

# ---------------------------------------------------------------- data in memory

def test_data_in_memory_is_not_loaded_elsewhere(tmp_path):
    Memory.asked.clear()
    fit(kind('Held', tmp_path, 'run', workers=2, epochs=1))
    assert len(Memory.asked)>=20+7 and set(Memory.asked)=={os.getpid()}

# ---------------------------------------------------------------- several processes

class Both(Drawn, Calibrated): "Pictures and calibration"

def train(*words, stop=None, **named): fit(kind(*words, **named), [StopAt(stop)] if stop else [])

def test_two_processes_draw_and_calibrate_once(tmp_path):
    some = dict(batch_size=2, trackers=['tensorboard'])
    together(tmp_path/'whole', train, 'Both', tmp_path, 'whole', **some)
    together(tmp_path/'run', train, 'Both', tmp_path, 'run', stop=7, **some)
    together(tmp_path/'run', train, 'Both', tmp_path, 'run', **some)
    assert curve(tmp_path/'run')==curve(tmp_path/'whole') and differences(tmp_path/'run', tmp_path/'whole')==[]
    assert calibration(tmp_path/'run', 12)['step']==12 and list(drawn(tmp_path/'run'))==['weights.png']
    assert len(rows(tmp_path/'whole', 'pictures'))==len(rows(tmp_path/'whole', 'best')) and graphs(tmp_path/'run')==1
