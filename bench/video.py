"Reading 256 uniform frames of a long video, beside decord and a plain PyAV loop in the same process; frames of an AVI and of 720p at a model's size"
import tempfile, time, tracemalloc
from pathlib import Path
from statistics import median
import numpy as np
from bench._clock import cpu
from vadnb.data.decoding import known_facts
from vadnb.data.video import VideoReader, write_video

def moving_texture(n, height=240, width=320, seed=0):
    "A camera that wanders over a random texture, with sensor noise: content that x264 cannot reduce to nothing"
    rng = np.random.default_rng(seed)
    world = rng.integers(0, 256, ((height+400)//8, (width+400)//8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    noise = rng.integers(0, 9, (16, height, width, 1), dtype=np.uint8)
    for i in range(n):
        y,x = int(195+190*np.sin(i/90)),int(195+190*np.cos(i/70))
        yield world[y:y+height, x:x+width]//2 + noise[i%16]

def with_decord(path, idx, threads):
    import decord
    reader = decord.VideoReader(str(path), num_threads=threads)
    return reader.get_batch(idx[idx<len(reader)]).asnumpy()

def with_pyav(path, idx, threads):
    "Decode from the start to the last frame wanted, convert only what is wanted"
    import av
    wanted,res = set(idx.tolist()),[]
    with av.open(str(path)) as c:
        s = c.streams.video[0]
        s.thread_type,s.codec_context.thread_count = 'AUTO',threads
        for i,f in enumerate(c.decode(s)):
            if i in wanted: res.append(f.to_ndarray(format='rgb24'))
            if len(res)==len(wanted): break
    return np.stack(res)

def with_vadnb(path, idx, threads):
    "As a data set would: a reader that has never seen the file, its length, its frames"
    known_facts.clear()
    reader = VideoReader(path, threads=threads)
    return reader.get_batch(idx[idx<len(reader)])

def compare(work, path, idx, threads, repeats=5):
    "One row: our median time over the faster rival's, rounds interleaved so that a busy moment hits all alike"
    ways = {'vadnb': with_vadnb, 'pyav': with_pyav, 'decord': with_decord}
    try: import decord
    except ImportError: del ways['decord']
    frames = {k: f(path, idx, threads) for k,f in ways.items()} # warms caches and proves that all do the same work
    for k,x in frames.items():
        off = np.abs(x.astype(np.int16)-frames['pyav']).mean()
        if off>1: raise AssertionError(f'{k} returns other frames than PyAV (mean difference {off:.1f})')
    del frames
    seconds = {k: [] for k in ways}
    for _ in range(repeats):
        for k,f in ways.items():
            start = time.perf_counter(); f(path, idx, threads); seconds[k].append(time.perf_counter()-start)
    seconds = {k: median(v) for k,v in seconds.items()}
    ratio = seconds['vadnb']/min(v for k,v in seconds.items() if k!='vadnb')
    return dict(work=work, ratio=ratio, limit=1.1, detail={'threads': threads, **{f'{k}_s': round(v, 4) for k,v in seconds.items()}})

def scaled_by_pyav(path, size, wanted=None):
    "One pass over a file; swscale converts the frames wanted, all by default, straight to a size, or to RGB where there is none"
    import av
    wanted,res,how = None if wanted is None else set(wanted.tolist()), [], {} if size is None else dict(height=size[0], width=size[1], interpolation='BICUBIC')
    with av.open(str(path)) as c:
        for i,f in enumerate(c.decode(c.streams.video[0])):
            if wanted is None or i in wanted: res.append(f.reformat(format='rgb24', **how).to_ndarray()[::1 if size else 8, ::1 if size else 8])
    return np.stack(res)

def streamed(path, size, idx=None):
    "As a prediction or a data set reads: a reader that has never seen the file, frames at the size of the model"
    known_facts.clear()
    reader = VideoReader(path)
    return np.stack(list(reader.stream(np.arange(len(reader)) if idx is None else idx, size)))

def in_turns(ours, theirs, rounds=5):
    "Medians of CPU-seconds"
    spent = [(cpu(ours)[0], cpu(theirs)[0]) for _ in range(rounds+1)][1:] # the first round warms up
    return [median(t) for t in zip(*spent)]

def avi(folder):
    "A file whose frames can only be read in order"
    path = write_video(folder/'long.avi', moving_texture(4000), fps=30)
    a,b = in_turns(lambda: streamed(path, (64, 64)), lambda: scaled_by_pyav(path, None))
    return dict(work='every frame of a 4,000-frame AVI at 64x64, the pixels that training sees, vs one sequential pass', ratio=a/b, limit=1.3, detail=dict(vadnb_s=round(a, 2), pyav_s=round(b, 2)))

def large(folder):
    "64 frames of 720p, of which a model sees a twentieth of the pixels"
    path,idx,size = write_video(folder/'large.mp4', moving_texture(900, 720, 1280), fps=30), np.linspace(0, 899, 64).astype(int), (224, 224)
    a,b = in_turns(lambda: streamed(path, size, idx), lambda: scaled_by_pyav(path, size, idx))
    yield dict(work='decode + resize of 64 frames of 720p vs decoding straight to size', ratio=a/b, limit=1.15, detail=dict(vadnb_s=round(a, 2), pyav_s=round(b, 2)))
    tracemalloc.start()
    kept = streamed(path, size, idx).nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    yield dict(work='the same: peak memory vs what comes out', ratio=peak/kept, limit=3, detail=dict(peak_mib=round(peak/2**20, 1), kept_mib=round(kept/2**20, 1)))

def rows():
    "One row per thread setting, opening the file included"
    idx = np.linspace(0, 5400, 257)[:-1].astype(int) + 10
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder)/'long.mp4', moving_texture(5400), fps=30)
        for threads,name in ((1, '1 thread'), (0, 'default threads')):
            yield compare(f'256 uniform frames of a 5,400-frame 320x240 H.264 mp4, {name}', path, idx, threads)
        yield avi(Path(folder))
        yield from large(Path(folder))

if __name__=='__main__':
    for row in rows(): print(row)
