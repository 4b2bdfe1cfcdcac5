"What an update of AdamW costs on a CPU, beside torch's own choice of operations"
from statistics import median
import torch
from bench._clock import cpu
from vadnb.train.optim import OptimConfig, make_optimizer

SHAPES = [(256, 1024)]*25+[(1024, 1024), (1024,), (400,)] # 7.6 million numbers, as in a small transformer
STEPS,ROUNDS = 10,7

def optimizer(ours):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    for p in params: p.grad = torch.randn_like(p)
    group = dict(name='all', params=params, lr=1e-3, weight_decay=.05)
    return make_optimizer(OptimConfig(), [group]) if ours else torch.optim.AdamW(params, lr=1e-3, weight_decay=.05)

def rows():
    "One row"
    torch.manual_seed(0)
    seconds = {ours: [] for ours in (True, False)}
    both = {ours: optimizer(ours) for ours in seconds}
    for opt in both.values(): opt.step() # the moments are made
    for _ in range(ROUNDS):
        for ours,opt in both.items(): seconds[ours].append(cpu(lambda: [opt.step() for _ in range(STEPS)])[0]/STEPS)
    a,b = (median(seconds[k]) for k in (True, False))
    n = sum(p.numel() for p in both[True].param_groups[0]['params'])
    yield dict(work=f"update of {n/1e6:.1f} million numbers by AdamW vs torch's default", ratio=a/b, limit=.4,
               detail=dict(vadnb_ms=round(a*1e3, 1), torch_ms=round(b*1e3, 1)))
