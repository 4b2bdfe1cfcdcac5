"What a prediction holds in memory: 64 frames of a 4096x2160 clip scored in one process, of a 320x240 clip in another"
import argparse, json, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
from vadnb.data.video_writing import write_video
from bench.frames import held

FRAMES,SMALL,LARGE = 64,(240, 320),(2160, 4096) # (height, width)

def moving_picture(n, size, seed=0):
    "A picture with edges and grain that moves sideways"
    rng = np.random.default_rng(seed)
    height,width = size
    cells = rng.integers(30, 226, (height//8, width//8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    picture = cells+rng.integers(0, 9, size, dtype=np.uint8)[...,None]
    for i in range(n): yield np.roll(picture, 2*i, 1)

def score(path):
    "Predict one clip, every frame of it, with a tiny CLIP; the most memory this process held, in MiB"
    import torch
    from vadnb.systems.registry import load_config
    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = ['--data_root', str(Path(path).parent), '--score.stride', '1', '--score.chunk', str(FRAMES)]
    system = load_config('fgclip_demo', [*words, '--train.device', 'cpu']).build().eval()
    found, = system.predict(path)
    if len(found)!=FRAMES:
        raise RuntimeError(f'{path}: {len(found)} frames were scored')
    return held()

def peak(path):
    "The same in a process of its own, since the peak of a process never falls"
    words = [sys.executable, '-m', 'bench.memory', '--score', str(path)]
    done = subprocess.run(words, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'scoring {path}: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])

def rows():
    with tempfile.TemporaryDirectory() as folder:
        mib = {}
        for name,size in (('small', SMALL), ('large', LARGE)):
            frames = moving_picture(FRAMES, size)
            path = write_video(Path(folder)/f'{name}.mp4', frames, options={'preset': 'ultrafast'})
            mib[name] = peak(path)
    yield dict(work=f'peak memory of scoring {FRAMES} frames of a 4096x2160 clip vs of a 320x240 one',
               ratio=mib['large']/mib['small'], limit=1.2, detail={f'{k}_mib': round(v) for k,v in mib.items()})

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--score', help='measure the scoring of this clip in this process')
    if path := parser.parse_args().score: print(json.dumps(score(path)))
    else:
        for row in rows(): print(row)
