"""A third system, unlike the others, in this one file: ragged targets, segments as results, two files in a checkpoint,
two data sets with a head each. It registers itself, and nothing else knows of it.

    python tests/test_third_system.py train --config segments.yaml     the command line, with this system in it"""
import functools, json, os, signal, sys, time
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from command import vadnb as command
from toy_system import processes, run_file
from vadnb.core import DataError, read_json, read_jsonl, write_atomic
from vadnb.data.video import VideoReader, write_video
from vadnb.results.layers import Segments
from vadnb.results.record import Result, read_record
from vadnb.systems.registry import register
from vadnb.train.checkpoint import find_checkpoint, read_part
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

# ---------------------------------------------------------------- the command line
here = Path(__file__).resolve()

def vadnb(*words, code=0):
    "What a command prints, or what it says on stderr when it ends with another code"
    ended,out,err = command(*words)
    assert ended==code, out+err
    return out if code==0 else err

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Grey clips that turn red or bright (day), blue (night), of unlike lengths"
    root = tmp_path_factory.mktemp('third')
    colours = dict(red=(220, 40, 40), bright=(230, 230, 230), blue=(40, 40, 220))
    lists,rng = dict(day={}, night={}, test={}), np.random.default_rng(0)
    for set_name,n,labels in (('day', 8, ('red', 'bright')), ('night', 3, ('blue',)), ('test', 4, ('red', 'bright'))):
        for i in range(n):
            length,segments = 10+2*i, []
            frames = rng.integers(90, 110, (length, 32, 32, 3)).astype(np.uint8)
            for start,label in zip((2, 6), labels if i%3 else ()):
                frames[start:start+3] = colours[label]
                segments.append((start, start+3, label))
            write_video(root/f'{set_name}{i}.mp4', frames, 10)
            lists[set_name][f'{set_name}{i}.mp4'] = segments
    for name,clips in lists.items(): (root/f'{name}.json').write_text(json.dumps(clips))
    write_atomic(root/'segments.yaml', json.dumps(dict(
        system='segments', name='run', runs=str(root/'runs'), data_root=str(root), data=dict(test='test.json'),
        optim=dict(lr=.05, warmup=2), train=dict(batch_size=2, epochs=12, workers=0, device='cpu', trackers=[], ema=.9, log_every=1))))
    return root

def curve(run): return [(r['step'], r['loss']) for r in read_jsonl(run/'log.jsonl') if r['kind']=='train']

@pytest.fixture(scope='module')
def run(world):
    vadnb('train', '--config', world/'segments.yaml')
    return world/'runs'/'run'

def test_verify(world):
    said = vadnb('verify', '--config', world/'segments.yaml')
    assert '8 and 3, all there' in said and 'ready to train' in said and 'one batch' in said
    (world/'lost.json').write_text(json.dumps({'gone.mp4': []}))
    code,out,_ = command('verify', '--config', world/'segments.yaml', '--data.night', 'lost.json')
    assert code==1 and 'gone.mp4: no such file' in out and 'not ready' in out

def test_it_trains_and_its_checkpoint_is_two_files(run):
    folder = find_checkpoint(run)
    assert {p.name for p in folder.iterdir()}=={'detector.safetensors', 'heads.safetensors', 'ema.safetensors', 'state.safetensors',
                                                'state.json', 'card.json', 'labels.txt', 'detector_sizes.json'}
    card = read_json(folder/'card.json')
    assert card['facts']==dict(labels=[['bright', 'red'], ['blue']]) and card['parts']==['detector', 'heads']
    assert card['calibration']['value']['clips'][:2]==['day0.mp4', 'day1.mp4']
    assert not any(k.startswith('body') for k in read_part(folder, 'ema'))
    assert [r['status'] for r in read_jsonl(run/'log.jsonl') if r['kind']=='end']==['done'] and len(curve(run))==12*8
    assert read_json(run/'health.json')['findings']==[]

def test_killed_and_resumed_to_the_last_bit(world, run):
    "kill -9 of a process of its own at some step; the same command again"
    words = ['train', '--config', world/'segments.yaml', '--name', 'killed', '--slow', '.02', '--train.save_every', '1']
    process = processes.Process(target=run_file, args=(here, words))
    process.start()
    killed,deadline = world/'runs'/'killed', time.time()+300
    while not (killed/'checkpoints'/'step-000016').exists() and process.is_alive() and time.time()<deadline: time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode==-signal.SIGKILL
    vadnb(*words)
    assert [r['kind'] for r in read_jsonl(killed/'log.jsonl') if r['kind'] in ('start', 'resume')]==['start', 'resume']
    assert curve(killed)==curve(run)
    for part in ('detector', 'heads', 'ema'):
        a,b = (read_part(find_checkpoint(r), part) for r in (run, killed))
        assert all(torch.equal(a[k], b[k]) for k in a)

def test_eval_measures_the_test_set(world, run):
    said = vadnb('eval', '--run', run)
    found = read_json(run/'eval.json')['metrics']
    assert '4 clips' in said and found['frame_accuracy']>.9 and 'coin' in said
    assert 'names no test data; set --data.test' in vadnb('eval', '--run', run, '--data.test', 'null', code=2)
    other = vadnb('eval', '--run', run, '--data.test', 'day.json', '--out', world/'other.json')
    assert '8 clips' in other

def test_predict_gives_segments_with_their_source(world, run):
    (world/'clips').mkdir(exist_ok=True)
    for name in ('test1.mp4', 'test2.mp4'): (world/'clips'/name).write_bytes((world/name).read_bytes())
    (world/'clips'/'broken.mp4').write_bytes(b'no video')
    said = vadnb('predict', world/'clips', '--run', run, '--out', world/'out', code=2)
    assert 'broken.mp4' in said and '1 of 3 could not be scored' in said
    result = read_record(next((world/'out').glob('test1*.layers.json')))
    (source,name),layer = next(iter(result.layers().items()))
    assert (source.system, source.run, name)==('segments', 'run', 'detections') and source.checkpoint.startswith('step-')
    assert [(r['start'], r['end'], r['label']) for r in sorted(layer.record()['segments'], key=lambda r: r['start'])]==[(2, 5, 'red'), (6, 9, 'bright')]

def test_report_shows_its_segments(run):
    vadnb('report', '--run', run)
    page = (run/'report.html').read_text()
    assert 'frame accuracy' in page.replace('_', ' ') and page.count('<html')==1

def test_what_it_does_not_offer_is_one_line(run):
    for words in (['demo', '--only', 'segments'], ['pictures', '--run', run]):
        said = vadnb(*words, code=2)
        assert 'Traceback' not in said and len(said.strip().splitlines())==1 and 'segments' in said

def test_another_checkpoint_is_refused(world, run):
    "Other frozen weights, other label maps, other parts, a card of a stranger"
    folder,card = find_checkpoint(run), read_json(find_checkpoint(run)/'card.json')
    text = (folder/'card.json').read_text()
    try:
        for change,says in ((dict(provenance=dict(body='0.5')), 'was trained with body 0.5'), (dict(parts=['detector']), 'is made of detector, heads'),
                            (dict(parts=['../heads']), 'cannot be the name of a part'), (dict(system='other'), 'is of other')):
            (folder/'card.json').write_text(json.dumps(card | change))
            assert says in vadnb('eval', '--run', run, '--which', 'last', code=2)
    finally: (folder/'card.json').write_text(text)
    said = vadnb('train', '--config', world/'segments.yaml', '--train.epochs', '20', '--data.night', 'day.json', code=2)
    assert 'was trained with labels' in said

if __name__=='__main__':
    from vadnb.cli import main
    main()
