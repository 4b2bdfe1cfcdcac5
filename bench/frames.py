"Long clips: a training step of a ViT-B/32 CLIP with frames encoded chunk by chunk, its memory over the length of the clip and its time beside the whole clip at once"
import argparse, json, os, resource, subprocess, sys, time
from pathlib import Path
import torch
from vadnb.losses.contrastive import info_nce
from vadnb.models.aggregate import masked_mean, unit
from vadnb.models.clip import CLIP

CHUNK,CLIPS,BOXES = 16,2,16 # a batch of two clips, with boxes on 16 frames of each

def batch(frames):
    "Two clips of `frames`/2 frames each, their captions, and one region caption per clip"
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (frames, 3, 224, 224), dtype=torch.uint8, generator=g)
    where = torch.cat([k*frames//CLIPS+torch.linspace(0, frames//CLIPS-1, BOXES).long() for k in range(CLIPS)])
    corner = torch.rand(len(where), 2, generator=g)*.5
    ids = torch.full((2*CLIPS, 77), 49407); ids[:,0] = 49406; ids[:,1:20] = torch.randint(0, 49000, (2*CLIPS, 19), generator=g)
    return dict(frames=pixels, boxes=torch.cat([corner, corner+.4], 1), frame_of_box=where), ids

def backward(model, frames, ids, chunk):
    "Global and region InfoNCE of the batch, and its gradients"
    out = model.encode_frames(**frames, chunk=chunk)
    pooled = [unit(masked_mean(v.unflatten(0, (CLIPS, -1)), torch.ones(CLIPS, len(v)//CLIPS))) for v in (out.image, out.region)]
    text = unit(model.encode_text(ids)).split(CLIPS)
    loss = sum(info_nce(v, t, s) for v,t,s in zip(pooled, text, model.scales().values()))
    loss.backward()
    return loss.item()

def held():
    "The most memory this process ever held, in MiB"
    # ru_maxrss of a new process starts at the peak of the one that started it; VmHWM does not
    status = Path('/proc/self/status')
    if status.is_file(): return int(status.read_text().split('VmHWM:')[1].split()[0])/2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10)

def one_step(frames, chunk):
    "A whole training step in this process, and its peak of memory"
    torch.manual_seed(0)
    model = CLIP('ViT-B-32').train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    backward(model, *batch(frames), chunk)
    optimizer.step()
    return held()

def peak(frames):
    "The same in a process of its own, since the peak of a process never falls"
    words = [sys.executable, '-m', 'bench.frames', '--peak', str(frames)]
    done = subprocess.run(words, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=True, env=os.environ|{'OMP_NUM_THREADS': '2', 'OMP_WAIT_POLICY': 'passive'})
    return json.loads(done.stdout.splitlines()[-1])

def times(frames=64, rounds=3):
    "Seconds of forward and backward at once and in chunks, in turns, and the largest difference of a gradient over the largest gradient"
    torch.manual_seed(0)
    model,inputs,seconds,grads = CLIP('ViT-B-32').train(), batch(frames), {None: [], CHUNK: []}, {}
    for _ in range(rounds):
        for chunk in seconds:
            model.zero_grad()
            start = time.perf_counter()
            backward(model, *inputs, chunk)
            seconds[chunk].append(time.perf_counter()-start)
            grads[chunk] = {k: p.grad.clone() for k,p in model.named_parameters()}
    top = max(g.abs().max() for g in grads[None].values())
    apart = max((grads[None][k]-grads[CHUNK][k]).abs().max() for k in grads[None])
    # the best of each: a machine that does other things too can only add to a time
    return min(seconds[None]), min(seconds[CHUNK]), (apart/top).item()

def rows():
    short,long = peak(64), peak(256)
    yield dict(work='training step, peak memory at 256 frames vs 64 frames, chunk 16', ratio=long/short, limit=1.3, detail=dict(mib_64=round(short), mib_256=round(long)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try: whole,chunked,apart = times()
    finally: torch.set_num_threads(threads)
    yield dict(work='chunked vs unchunked step time, 64 frames', ratio=chunked/whole, limit=1.4,
               detail=dict(unchunked_s=round(whole, 2), chunked_s=round(chunked, 2), gradient_difference=apart, gradient_limit=1e-5))

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--peak', type=int, help='measure one step with so many frames in this process')
    if frames := parser.parse_args().peak: torch.set_num_threads(2); print(json.dumps(one_step(frames, CHUNK)))
    else:
        for row in rows(): print(row)
