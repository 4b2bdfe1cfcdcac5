"""A system unlike the others, in this one file: ragged targets, segments as results, two files in a checkpoint, two data
sets with a head each. It registers itself, and nothing else knows of it.

    python segments_system.py train --config segments.yaml     the command line, with this system in it

where `segments.yaml` may be as short as

    system: segments
    name: run
    data_root: clips                     # day.json, night.json and the videos that they name
    train: {batch_size: 2, epochs: 12}   # any key of `python segments_system.py train --config segments.yaml --help`
"""
import functools, json, sys, time
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
import torch
from torch import nn
from vadnb.core import DataError
from vadnb.data.video import VideoReader
from vadnb.results.layers import Segments
from vadnb.results.record import Result
from vadnb.systems.registry import register
from vadnb.train.optim import split_decay
from vadnb.train.system import Data, RunConfig, Scan, System

# ---------------------------------------------------------------- config
@dataclass(kw_only=True)
class SetsConfig:
    "Lists of clips: JSON, name of a video → its segments as (start, end, label)"
    day:str = 'day.json' # clips of the first set, relative to data_root
    night:str = 'night.json' # clips of the second one, with labels of its own
    test:str|None = None # clips of the first set that `vadnb eval` measures

@dataclass(kw_only=True)
class Config(RunConfig):
    system:str = 'segments' # which system this configures
    data:SetsConfig = field(default_factory=SetsConfig)
    width:int = 6 # channels of the frozen body
    slow:float = 0. # seconds that a step takes longer
    def make_data(self): return TwoSets(self)
    def build(self, facts=None): return Segmenter(self, facts or self.make_data().facts())

# ---------------------------------------------------------------- data
class Clips:
    "Mean brightness of every frame, and a ragged list of segments"
    def __init__(self, root, file, number):
        self.root,self.number = Path(root), number
        self.clips = list(json.loads((self.root/file).read_text()).items())
    def __len__(self): return len(self.clips)
    def __getitem__(self, i):
        name,segments = self.clips[i]
        return dict(x=brightness(self.root/name), segments=segments, name=name, set=self.number)

class Joined:
    "Two sets one after the other"
    def __init__(self, sets): self.sets = sets
    def __len__(self): return sum(map(len, self.sets))
    def __getitem__(self, i):
        first = len(self.sets[0])
        return self.sets[0][i] if i<first else self.sets[1][i-first]

@functools.cache
def brightness(path):
    frames = VideoReader(path).get_batch(range(len(VideoReader(path))))
    return torch.as_tensor(np.asarray(frames), dtype=torch.float32).mean((1, 2))/255     # (T, 3)

class TwoSets(Data):
    noun,test_keys = 'clips', ('data.test',)
    def __init__(self, cfg): self.cfg,self.found = cfg, {}
    def sets(self):
        if not self.found:
            d = self.cfg.data
            self.found = {k: Clips(self.cfg.data_root, getattr(d, k), n) for n,k in enumerate(('day', 'night'))}
        return list(self.found.values())
    def split(self, name):
        if name=='test': return Clips(self.cfg.data_root, self.cfg.data.test, 0) if self.cfg.data.test else None
        return Joined(self.sets())
    def collate(self, items):
        "Clips may have any length: what is ragged stays a list"
        return {k: [s[k] for s in items] for k in ('x', 'segments', 'name', 'set')}
    def order(self, rng, size):
        "Batches of one set each, both equally often, however small one is"
        day,night = map(len, self.sets())
        n = max(day, night)//size
        pools = [rng.permutation(day), day+rng.permutation(night)]
        return np.concatenate([np.resize(np.roll(p, -k*size), size) for k in range(n) for p in pools])
    def facts(self): return dict(labels=[sorted({s[2] for _,ss in c.clips for s in ss}) for c in self.sets()])
    def rows(self):
        counts = ' and '.join(str(len(c)) for c in self.sets())
        lost = [n for c in self.sets() for n,_ in c.clips if not (c.root/n).is_file()]
        return [('clips', not lost, f'{lost[0]}: no such file' if lost else f'{counts}, all there')]

# ---------------------------------------------------------------- system
class Segmenter(System):
    "A frozen body had elsewhere, a detector, and a head for each data set"
    metric,metric_mode,metrics = 'frame_accuracy', 'max', ('frame_accuracy',)
    def __init__(self, cfg, facts):
        super().__init__()
        self.cfg,self.labels = cfg, facts['labels']
        self.body = nn.Linear(3, cfg.width).requires_grad_(False)
        self.detector = nn.Sequential(nn.Linear(cfg.width, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 1+len(names)) for names in self.labels])
    def start(self, fresh):
        "The frozen body comes from elsewhere, whenever the system is made"
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.body.parameters(): p.copy_(torch.randn(p.shape, generator=g))
    def provenance(self): return dict(body=f'{self.body.weight.sum().item():.6f}')
    def parts(self): return dict(detector=self.detector, heads=self.heads)
    def files(self): return {'labels.txt': '\n'.join(map(', '.join, self.labels)), 'detector_sizes.json': [8, self.cfg.width]}
    def groups(self):
        lr,decay = self.cfg.optim.lr, self.cfg.optim.weight_decay
        return split_decay('detector', self.detector.parameters(), lr, decay)+split_decay('heads', self.heads.parameters(), 2*lr, decay)
    def look(self, batch):
        return [self.heads[s](self.detector(self.body(x))) for x,s in zip(batch['x'], batch['set'])]
    def target(self, segments, number, n):
        res = torch.zeros(n, dtype=torch.long)
        for start,end,label in segments: res[start:end] = 1+self.labels[number].index(label)
        return res
    def loss(self, batch):
        assert len(set(batch['set']))==1
        time.sleep(self.cfg.slow)
        truth = [self.target(ss, s, len(x)).to(x.device) for ss,s,x in zip(batch['segments'], batch['set'], batch['x'])]
        loss = nn.functional.cross_entropy(torch.cat(self.look(batch)), torch.cat(truth))
        return {'loss': loss, f"loss/{('day', 'night')[batch['set'][0]]}": loss} if self.cfg.slow else dict(loss=loss)
    def scan(self, data, split): return FrameAccuracy(self.target)
    @torch.no_grad()
    def predict(self, source, mine=list):
        "A video, or every video of a folder"
        source = Path(source)
        for path in mine(sorted(source.glob('*.mp4')) if source.is_dir() else [source]):
            try: yield self.say(path)
            except DataError as e: yield e
    def say(self, path):
        reader,x = VideoReader(path), brightness(path).to(self.body.weight.device)
        classes = self.look(dict(x=[x], set=[0]))[0].softmax(-1)
        best,rows = classes.argmax(-1).tolist(), []
        for label in range(1, classes.shape[1]):
            edges = np.flatnonzero(np.diff([0, *(b==label for b in best), 0]))
            rows += [dict(start=int(a), end=int(b), label=self.labels[0][label-1], score=classes[a:b,label].mean().item())
                     for a,b in edges.reshape(-1, 2)]
        return Result(name=path.name, path=path, frames=len(reader), fps=float(reader.fps), layers=dict(detections=Segments(rows)))

class FrameAccuracy(Scan):
    held = ('target',)
    def __init__(self, target): self.target,self.right,self.names = target, [], []
    def add(self, batch, out):
        for o,ss,s,name in zip(out, batch['segments'], batch['set'], batch['name']):
            self.right += (o.argmax(-1).cpu()==self.target(ss, s, len(o))).tolist()
            self.names.append(name)
    def join(self, others):
        for o in others: self.right += o.right; self.names += o.names
        return self
    def metrics(self): return {'frame_accuracy': float(np.mean(self.right)), 'baseline/frame_accuracy/coin': .5}
    def calibration(self): return dict(clips=self.names)

register('segments', sys.modules[__name__])

if __name__=='__main__':
    from vadnb.cli import main
    main()
