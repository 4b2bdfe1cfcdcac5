"A system in a file of its own, outside of the package: the slope of a line, learned from numbers, applied to text files"
import sys
from dataclasses import dataclass, field
from pathlib import Path
import torch
from torch import nn
from vadnb.core import DataError, write_atomic
from vadnb.systems.registry import register
from vadnb.train.optim import split_decay
from vadnb.train.system import Data, RunConfig, Scan, System

@dataclass(kw_only=True)
class DataConfig:
    "Which numbers"
    train:int = 12 # numbers to learn from
    valid:int = 0 # numbers that choose the checkpoint
    test:int = 0 # numbers for `vadnb eval`

@dataclass(kw_only=True)
class Config(RunConfig):
    "A run of the line"
    system:str = 'line' # which system this configures
    name:str = 'line' # name of the run folder
    factor:float = 1. # what a prediction is multiplied by
    data:DataConfig = field(default_factory=DataConfig)
    def make_data(self): return Numbers(self.data)
    def build(self, facts=None): return Line(self)

class Numbers(Data):
    noun,test_keys = 'numbers', ('data.test', 'data.more')
    def __init__(self, cfg): self.cfg = cfg
    def split(self, name):
        n = getattr(self.cfg, name)
        return [dict(x=torch.tensor([(k+1)/n])) for k in range(n)] or None
    def rows(self): return [('numbers', True, f'{self.cfg.train} to learn from')]

class Errors(Scan):
    def __init__(self): self.seen = []
    def add(self, batch, out): self.seen += out.flatten().tolist()
    def join(self, others): self.seen += sum((o.seen for o in others), []); return self
    def metrics(self):
        weights = range(1, len(self.seen)+1) # the order counts
        return {'error': sum(w*e for w,e in zip(weights, self.seen))/sum(weights), 'halves/first': self.seen[0]}

class Said:
    "The numbers of a file, scaled"
    def __init__(self, path, values): self.name,self.values,self.source = Path(path).name, values, None
    def from_source(self, **source): self.source = source; return self
    def place(self, folder): return Path(folder)
    def files(self, folder, overlay): return [Path(folder)/f'{Path(self.name).stem}.said']
    def save(self, folder, overlay):
        return [write_atomic(f, ' '.join(f'{v:.3f}' for v in self.values)) for f in self.files(folder, overlay)]
    def summary(self): return [f"{self.name}: {len(self.values)} numbers, of {self.source['run']} {self.source['checkpoint']}"]

class Line(System):
    metric,metrics = 'error', ('error',)
    def __init__(self, cfg):
        super().__init__()
        self.cfg,self.slope = cfg, nn.Parameter(torch.tensor(1.))
    def look(self, batch): return (self.slope*batch['x']-2*batch['x']).abs()
    def loss(self, batch): return dict(loss=self.look(batch).mean())
    def groups(self): return split_decay('slope', self.parameters(), self.cfg.optim.lr, 0.)
    def scan(self, data, split): return Errors()
    def rows(self, data): return [('slope', True, f'{self.slope.item():g}')]
    def predict(self, source, mine=list):
        for path in mine(sorted(Path(source).glob('*.txt')) if Path(source).is_dir() else [Path(source)]):
            try: values = [float(w) for w in path.read_text().split()]
            except ValueError as e: yield DataError(f'{path}: {e}'); continue
            yield Said(path, [self.cfg.factor*self.slope.item()*v for v in values])

def count_words(
    source:str, # text file
    target:str, # file to write
    *,
    least:int=1, # words that must be there
)->list: # lines
    "Words of a text → their number"
    n = len(Path(source).read_text().split())
    if n<least: raise DataError(f'{source}: has {n} words, and {least} are needed')
    return [f'{write_atomic(target, str(n))}: {n}']

def times(value):
    "whole number that every prediction is multiplied by"
    return ['--factor', str(int(value))]

CONVERTERS = {'words': count_words}
PREDICT_OPTIONS = dict(times=times)
MEMORY = "'data.train'"
METRIC_TABLES = [lambda metrics: [f"first error {metrics['halves/first']:.3f}"]]

register('line', sys.modules[__name__])

if __name__=='__main__':
    from vadnb.cli import main
    main()
