"Reading 256 uniform frames of a long video, beside decord and a plain PyAV loop in the same process"
import tempfile, time
from pathlib import Path
from statistics import median
import numpy as np
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

def rows():
    "One row per thread setting, opening the file included"
    idx = np.linspace(0, 5400, 257)[:-1].astype(int) + 10
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder)/'long.mp4', moving_texture(5400), fps=30)
        for threads,name in ((1, '1 thread'), (0, 'default threads')):
            yield compare(f'256 uniform frames of a 5,400-frame 320x240 H.264 mp4, {name}', path, idx, threads)

if __name__=='__main__':
    for row in rows(): print(row)
