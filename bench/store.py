"What opening a feature cache of many unchanged files costs, beside listing them"
import os, tempfile
from pathlib import Path
from statistics import median
import torch
from bench._clock import cpu
from vadnb.data import contents, shards
from vadnb.train.feature_cache import cached

FILES,ROUNDS = 100_000,5

class Files:
    "Small files, a hundred folders of them"
    augmented,classes = False, ['all']
    def __init__(self, folder):
        self.folder = folder
        self.paths = [str(folder/f'{k%100:02}'/f'{k}.png') for k in range(FILES)]
        for k in range(100): (folder/f'{k:02}').mkdir()
        for k,p in enumerate(self.paths):
            with open(p, 'wb') as f: f.write(b'%d' % k)
    def __len__(self): return FILES
    def __getitem__(self, i): return dict(image=torch.tensor([float(i)]), **self.tags(i))
    def tags(self, i): return dict(name=self.paths[i], cls=0)
    def content(self, i): return contents.content_of(self.paths[i])
    def fingerprint(self): return 'files'

def listed(folder):
    "Files with sizes and times"
    found = []
    for d in os.scandir(folder):
        for f in os.scandir(d.path): s = f.stat(); found.append((f.path, s.st_size, s.st_mtime_ns))
    return found

def rows():
    "One row; every round starts like a process that knows nothing"
    contents.RESTED = -10**18 # files of this moment count as rested
    with tempfile.TemporaryDirectory() as root:
        (Path(root)/'files').mkdir()
        files,cache = Files(Path(root)/'files'), Path(root)/'cache'
        def opened():
            contents.CONTENTS.clear(); shards.VERIFIED.clear()
            return cached(files, lambda x: x+1, 'key', 'disk', cache, 8., lambda line: None, 1024)
        first = cpu(opened)[0]
        spent = [(cpu(opened)[0], cpu(lambda: listed(Path(root)/'files'))[0]) for _ in range(ROUNDS)]
        a,b = (median(t) for t in zip(*spent))
    yield dict(work=f'opening a feature cache of {FILES:,} unchanged files vs listing them with sizes and times', ratio=a/b, limit=2,
               detail=dict(opened_s=round(a, 2), listed_s=round(b, 2), filled_s=round(first, 2)))
