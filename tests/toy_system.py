"A small system that holds everything a resumed run has to restore, and ways to train it, in processes that may be killed"
import multiprocessing, os, random, runpy, shutil, sys
from dataclasses import dataclass, field
from pathlib import Path
import accelerate
import numpy as np
import torch
from torch import nn
from vadnb.core import DataError, read_json, read_jsonl
from vadnb.train.callbacks import Callback
from vadnb.train.checkpoint import checkpoint_folders, find_checkpoint, read_part, split_tree
from vadnb.train.learner import Learner, fit
from vadnb.train.system import Data, RunConfig, Scan, System, TrainConfig
from vadnb.train.optim import OptimConfig, split_decay

# a clean server process that has imported everything: its children start in milliseconds and share no threads with the tests
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload([
    'accelerate', 'torch._inductor', 'pytest', 'vadnb.cli', 'vadnb.plots', 'vadnb.train.learner', 'vadnb.train.health',
    'vadnb.report.report', 'vadnb.worlds.street', 'vadnb.worlds.textures',
    'vadnb.systems.fgclip.system', 'vadnb.systems.uniad.system'])

class Points:
    "A function of four numbers, observed with noise that depends on seed, epoch and index alone"
    def __init__(self, n, bad=()): self.n,self.bad,self.x = n,set(bad),np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i in self.bad: raise DataError(f'point{i}.mp4: damaged')
        return dict(x=torch.from_numpy(self.x[i]), y=torch.tensor(float(self.x[i].sum())), name=f'point {i}')
    def draw(self, i, rng):
        item = self[i]
        return item | dict(x=item['x']+torch.from_numpy(.1*rng.standard_normal(4).astype(np.float32)))

@dataclass(kw_only=True)
class ToyConfig(RunConfig):
    system:str = 'toy' # which system this configures
    points:int = 23 # training samples
    bad:list[int] = field(default_factory=list) # samples that cannot be read
    noisy:bool = True # dropout, batch statistics, and a draw from every global generator
    ballast:int = 0 # numbers that only make checkpoints large
    script:list[float] = field(default_factory=list) # what evaluation gives, one value per epoch; empty: the error
    def make_data(self): return ToyData(self)
    def build(self, facts=None): return Toy(self)

class ToyData(Data):
    noun = 'points'
    def __init__(self, cfg): self.splits = dict(train=Points(cfg.points, cfg.bad), valid=Points(7))
    def split(self, name): return self.splits.get(name)
    def collate(self, items):
        return {k: torch.stack([x[k] for x in items]) for k in ('x', 'y')} | dict(name=[x['name'] for x in items])

class Errors(Scan):
    "The error of each point, or what a script says"
    def __init__(self, said=None): self.said,self.seen = said,[]
    def add(self, batch, out):
        torch.rand(3); random.random(); np.random.rand()       # training must not notice
        self.seen += out.tolist()
    def join(self, others):
        for o in others: self.seen += o.seen
        return self
    def metrics(self): return dict(error=float(np.mean(self.seen)) if self.said is None else self.said)

class Toy(System):
    metric,metric_mode = 'error', 'min'
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        norm = [nn.BatchNorm1d(8)] if cfg.noisy else []
        self.net = nn.Sequential(nn.Linear(4, 8), *norm, nn.Tanh(), nn.Dropout(.2 if cfg.noisy else 0.), nn.Linear(8, 1))
        self.ballast = nn.Parameter(torch.randn(cfg.ballast)) if cfg.ballast else None
    def look(self, batch): return (self.net(batch['x'])[:,0]-batch['y'])**2
    def loss(self, batch):
        error = self.look(batch)
        if self.training and self.cfg.noisy: error = error*(1+.1*random.random())*(1+.1*float(np.random.rand()))
        weight = 1e-3*self.ballast.square().mean() if self.ballast is not None else 0.
        return dict(loss=error.mean()+weight, worst=error.max())
    def groups(self): return split_decay('net', self.parameters(), self.cfg.optim.lr, self.cfg.optim.weight_decay)
    def scan(self, data, split):
        if not self.cfg.script: return Errors()
        self.calls = getattr(self, 'calls', 0)+1
        return Errors(self.cfg.script[self.calls-1])

TRAIN = dict(batch_size=4, accumulate=2, epochs=4, workers=0, ema=.9, log_every=1, keep=2, trackers=[], progress=False, device='cpu')

def config(folder, name, optim=None, points=23, bad=(), noisy=True, ballast=0, script=(), **train):
    return ToyConfig(name=name, runs=str(folder), points=points, bad=list(bad), noisy=noisy, ballast=ballast, script=list(script),
                     optim=OptimConfig(**(dict(lr=.01, warmup=2) | (optim or {}))), train=TrainConfig(**(TRAIN | train)))

class StopAt(Callback):
    "Ask for a stop after a step, as a signal does"
    def __init__(self, step, why='asked to'): self.at,self.why = step, why
    def after_step(self):
        if self.learner.step==self.at: self.learner.stop = self.why

class FailAt(Callback):
    "Die after a step, with everything of it logged and saved"
    order = 99
    def __init__(self, step): self.at = step
    def after_step(self):
        if self.learner.step==self.at: raise RuntimeError('power cut')

SPENT = ('seconds', 'data_wait', 'samples_per_second', 'peak_memory') # what a step costs is never the same

def curve(run):
    "What a run logged, without the clock"
    rows = [r for r in read_jsonl(Path(run)/'log.jsonl') if r['kind'] in ('train', 'valid', 'best')]
    return [{k: v for k,v in r.items() if k not in SPENT} for r in rows]

def rows(run, kind): return [r for r in read_jsonl(Path(run)/'log.jsonl') if r['kind']==kind]

def card(folder): return read_json(Path(folder)/'card.json')

def contents(folder):
    "Everything in a checkpoint: (JSON values, tensors by name)"
    values,tensors = {}, {}
    for name in sorted(p.stem for p in Path(folder).glob('*.safetensors')):
        skeleton,found = split_tree(read_part(folder, name))
        values[name] = skeleton
        tensors |= {f'{name}.{k}': v for k,v in found.items()}
    return values | dict(card=card(folder)), tensors

def differences(a, b):
    "What is not the same, to the last bit, in two checkpoints; [] when all is"
    (values,tensors),(others,more) = contents(find_checkpoint(a)), contents(find_checkpoint(b))
    for v in (values, others): v['state'] = {k: {n: c for n,c in x.items() if n not in ('StopAt', 'FailAt')} if k=='callbacks' else x for k,x in v['state'].items()}
    return [k for k in values.keys()|others.keys() if values.get(k)!=others.get(k)] + [k for k in tensors.keys()|more.keys() if k not in tensors or k not in more or not torch.equal(tensors[k], more[k])]

def whole(run):
    "Check that every checkpoint that can be found can be read, and every link leads to one; returns their number"
    found = checkpoint_folders(run)
    for p in found: contents(p)
    for name in ('best', 'last'):
        if (Path(run)/name).is_symlink(): contents(find_checkpoint(run, 'best') if name=='best' else (Path(run)/name).resolve())
    return len(found)

def as_a_program():
    "What a process of its own would have: one thread, and loading processes that are forked"
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)

def run_file(file, words, said=os.devnull):
    "For another process: `python file words`; what it prints goes to a file"
    as_a_program()
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2): os.dup2(out, stream)
    sys.argv = [str(file), *map(str, words)]
    if str(file).endswith('.py'): runpy.run_path(str(file), run_name='__main__')
    else: runpy.run_module(file, run_name='__main__', alter_sys=True)

EVENTS = 'open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.symlink', 'shutil.rmtree'

def snapshots(folder, kept, counts, cfg):
    """For another process: train in `folder`, and keep a copy of it, `kept`/<number>, before each operation on a file of it
    for which `counts(event, names)`. That is what kill -9 would leave at that moment: what was written, and no more"""
    as_a_program()
    seen,busy = [0], [False]
    def watch(event, args):
        if busy[0] or event not in EVENTS: return
        names = [str(a) for a in args if isinstance(a, (str, Path)) and str(folder) in str(a)]
        if not names or not counts(event, names): return
        busy[0] = True
        seen[0] += 1
        shutil.copytree(folder, kept/f'{seen[0]:03d}', symlinks=True)
        busy[0] = False
    os.fsync = lambda fd: None # a kill loses nothing that the system already has
    sys.addaudithook(watch)
    fit(cfg)

def different(kept):
    """The copies of `snapshots` in their order: (folder, whether its files differ from those of the one before).
    A run that goes on from the same files goes on in the same way, so that only one of them need be tried"""
    def files(folder):
        return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes()
                for p in folder.rglob('*')}
    before = None
    for folder in sorted(kept.iterdir()):
        now = files(folder)
        yield folder, now!=before
        before = now

def train(*words, **named):
    "For another process: train the toy"
    as_a_program()
    fit(config(*words, **named))

if __name__=='__main__':
    import json, sys
    *words,named = json.loads(sys.argv[1])
    train(*words, **named)
