"What the learner adds to a step: an empty model trained by it and by a bare PyTorch loop on Accelerate, in turns"
import contextlib, os, tempfile, time
from statistics import median
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from vadnb.train.callbacks import Callback
from vadnb.train.example import ListData
from vadnb.train.learner import Learner
from vadnb.train.system import RunConfig, System, TrainConfig
from vadnb.train.optim import OptimConfig, split_decay

SAMPLES,BATCH,STEPS,SKIP = 512,8,600,100 # SKIP: first steps of a round that are not timed

def samples():
    g = torch.Generator().manual_seed(0)
    return [dict(x=torch.randn(8, generator=g)) for _ in range(SAMPLES)]

class Empty(System):
    "A linear layer: next to nothing to compute, so that what remains is the loop"
    def __init__(self, cfg): super().__init__(); self.cfg,self.fc = cfg,nn.Linear(8, 1)
    def loss(self, batch): return dict(loss=self.fc(batch['x']).square().mean())
    def groups(self): return split_decay('all', self.parameters(), self.cfg.optim.lr, self.cfg.optim.weight_decay)

class Stopwatch(Callback):
    "Seconds per step between step SKIP and the last one"
    order = 100
    def after_step(self):
        L = self.learner
        if L.step==SKIP: self.start = time.perf_counter()
        if L.step==STEPS: self.seconds = (time.perf_counter()-self.start)/(STEPS-SKIP)

def with_vadnb(folder, round):
    "Everything a run has by default: log rows, health checks, TensorBoard, progress; checkpoints only after the clock has stopped"
    cfg = RunConfig(system='empty', name=f'round{round}', runs=folder, optim=OptimConfig(lr=1e-3),
                    train=TrainConfig(batch_size=BATCH, steps=STEPS, workers=0, device='cpu', unit='step', save_every=10*STEPS))
    watch = Stopwatch()
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere): Learner(cfg, Empty(cfg), ListData(samples()), [watch]).fit()
    return watch.seconds

def with_accelerate():
    "The loop everybody writes: no log, no schedule, no checks"
    from accelerate import Accelerator
    engine = Accelerator(cpu=True)
    model = Empty(RunConfig(system='empty', name='bare'))
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-3)
    loader = DataLoader(samples(), batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=default_collate)
    model,optimizer,loader = engine.prepare(model, optimizer, loader)
    model.train()
    step = 0
    while True:
        for batch in loader:
            if step==SKIP: start = time.perf_counter()
            if step==STEPS: return (time.perf_counter()-start)/(STEPS-SKIP)
            loss = model(batch)['loss']
            engine.backward(loss)
            engine.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

def rows(rounds=9):
    "One row: the median over rounds taken in turns, so that a busy moment hits both"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pairs = [(with_vadnb(folder, k), with_accelerate()) for k in range(rounds+1)][1:] # the first round warms up
    finally: torch.set_num_threads(threads)
    ours,bare = (median(s) for s in zip(*pairs))
    yield dict(work='loop overhead per step on an empty model', ratio=ours/bare, limit=1.3, detail=dict(vadnb_us=round(ours*1e6, 1), accelerate_us=round(bare*1e6, 1), steps=STEPS-SKIP, rounds=rounds))

if __name__=='__main__':
    for row in rows(): print(row)
