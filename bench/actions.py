"Long videos for action detection: frames decoded for a test, a training clip from the decode cache, an answer to a damaged file"
import os, tempfile, time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
import numpy as np
import torch
from bench._clock import cpu
from bench.video import moving_texture
from vadnb.core import DataError
from vadnb.data import frame_sources
from vadnb.data.action_clips import ActionWindows
from vadnb.data.segments import ActionAnnotation, ActionVideo
from vadnb.data.augmentation import ClipAugmentation
from vadnb.data.clip_frames import VideoSource
from vadnb.data.decode_cache import DecodeCache
from vadnb.data.time_grid import ClipForm
from vadnb.data.video import write_video

class Counted:
    "An opened file that counts the packets it hands to the decoder"
    def __init__(self, container, seen): self.container,self.seen = container,seen
    def __getattr__(self, name): return getattr(self.container, name)
    def demux(self, *args):
        for p in self.container.demux(*args):
            self.seen[0] += bool(p.size)
            yield p

@contextmanager
def counting():
    "Packets that are read for frames, in a list of one number"
    seen,opened = [0],frame_sources.opened
    @contextmanager
    def counted(*args, **how):
        with opened(*args, **how) as (c, s): yield Counted(c, seen), s
    frame_sources.opened = counted
    try: yield seen
    finally: frame_sources.opened = opened

def test_video(path, frames):
    "A video streamed once, and window by window: packets, CPU, and whether the windows are the same"
    a = ActionAnnotation('bench', ['x'], dict(a=ActionVideo('a', 'test', frames=frames)))
    windows = ActionWindows(a, ['a'], VideoSource(dict(a=path), ClipForm(window=192, stride=4, size=(160, 160))))
    n = len(windows)
    with counting() as seen:
        # what a window holds is summed and let go, as a model would
        streamed,once = cpu(lambda: [x['frames'].sum((1, 2, 3), dtype=torch.int64) for x in windows.stream(0)])
        packets = seen[0]
        apart,each = cpu(lambda: [windows[k]['frames'].sum((1, 2, 3), dtype=torch.int64) for k in range(n)])
    if not all(map(torch.equal, once, each)): raise AssertionError('a streamed window is another than the window read by itself')
    detail = dict(windows=n, streamed_cpu_s=round(streamed, 2), apart_cpu_s=round(apart, 2), packets_apart=seen[0]-packets)
    yield dict(work=f'source frames decoded for a test video, {n} windows at half overlap', ratio=packets/frames, limit=1., detail=detail)
    yield dict(work='CPU of a test video streamed vs window by window', ratio=streamed/apart, limit=.6, detail=detail)

def training_clip(path, frames, folder):
    "A clip of 768 positions from the warm cache vs from the file, crop and resize included"
    video,form = ActionVideo('a', 'train', frames=frames),ClipForm(window=768, stride=4, size=(160, 160))
    cache = DecodeCache(folder/'cache', 5., say=lambda line: None)
    plain,kept = (VideoSource(dict(a=path), form, ClipAugmentation(operations=0), cache=c) for c in (None, cache))
    def clip(source, seed): return source.clip(video, 20*seed, rng=np.random.default_rng(seed))['frames']
    if not torch.equal(clip(plain, 0), clip(kept, 0)): raise AssertionError('the cache gives other pixels than the file')
    spent = {name: median(cpu(lambda: clip(source, seed))[0] for seed in (1, 2, 3)) for name,source in (('file', plain), ('cache', kept))}
    yield dict(work='a training clip from the warm decode cache vs from video', ratio=spent['cache']/spent['file'], limit=.2,
               detail={f'{k}_cpu_s': round(v, 3) for k,v in spent.items()})

def damaged():
    "How soon a video that announces 50 frames and has 28 is refused"
    path = Path(os.environ.get('VADNB_SHARED') or Path(__file__).resolve().parents[2]/'shared')/'data/video/decord/corrupted.mp4'
    if not path.is_file(): return
    start = time.perf_counter()
    try: VideoSource(dict(a=path), ClipForm()).lay(ActionVideo('a', 'train', 1.67, 50, None, (('b', 1.1, 1.5),)))
    except DataError: pass
    yield dict(work='answer to a video that stops early', seconds=time.perf_counter()-start, limit=10.)

def rows():
    with tempfile.TemporaryDirectory() as folder:
        folder,frames = Path(folder),3600
        path = write_video(folder/'long.mp4', moving_texture(frames), fps=30)
        yield from test_video(path, frames)
        yield from training_clip(path, frames, folder)
    yield from damaged()

if __name__=='__main__':
    for row in rows(): print(row)
