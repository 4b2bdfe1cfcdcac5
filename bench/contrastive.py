"A memory of 4,096 pairs beside a batch of 64: reading it, finding the false negatives and both directions of the loss, over bare matrix products of the same size"
import math, time
from statistics import median
import torch
from torch.nn import functional as F
from vadnb.losses.contrastive import bank_info_nce, same_key, same_key_as
from vadnb.models.memory_bank import MemoryBank

ENTRIES,BATCH,DIM = 4096,64,512

def unit_rows(n, g): return F.normalize(torch.randn(n, DIM, generator=g), dim=1)

def data():
    g = torch.Generator().manual_seed(0)
    bank = MemoryBank(ENTRIES, DIM, key_columns=2)
    bank.push(unit_rows(ENTRIES, g), unit_rows(ENTRIES, g), torch.randint(0, 2**40, (ENTRIES, 2), generator=g))
    return bank, unit_rows(BATCH, g), unit_rows(BATCH, g), torch.randint(0, 2**40, (BATCH, 2), generator=g)

def lookup_and_loss(bank, a, b, log_scale, keys, copy=False):
    past,past_text,past_keys = bank.read(copy)
    return bank_info_nce(a, b, log_scale, past, past_text, same_key(keys), same_key_as(keys, past_keys))

def seconds_each(ways, rounds=60):
    "Median processor time of each, in turns, on one thread: what neighbours on the machine do does not count"
    for f in ways.values(): [f() for _ in range(5)]
    times = {k: [] for k in ways}
    for _ in range(rounds):
        for k,f in ways.items(): start = time.thread_time(); f(); times[k].append(time.thread_time()-start)
    return {k: median(v) for k,v in times.items()}

def rows():
    "The loss has two directions, each with a product of its own, and its gradients two more"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bank,a,b,keys = data()
        log_scale = torch.tensor(math.log(100))
        x,y,s = (t.clone().requires_grad_() for t in (a,b,log_scale))
        grads = torch.randn(BATCH, ENTRIES)
        @torch.no_grad()
        def forward(copy=False): return lookup_and_loss(bank, a, b, log_scale, keys, copy)
        def training(): return torch.autograd.grad(lookup_and_loss(bank, x, y, s, keys), (x,y,s))
        ways = dict(forward=forward, forward_with_copies=lambda: forward(True), training=training,
                    two_products=lambda: (a@bank.text.T, b@bank.visual.T), four_products=lambda: (a@bank.text.T, b@bank.visual.T, grads@bank.text, grads@bank.visual))
        t = seconds_each(ways)
    finally: torch.set_num_threads(threads)
    ms = {f'{k}_ms': round(v*1e3, 3) for k,v in t.items()}
    size = f'{ENTRIES:,} entries, batch {BATCH}'
    yield dict(work=f'bank lookup + loss, {size}, over its two products', ratio=t['forward']/t['two_products'], limit=1.2, detail=ms)
    yield dict(work=f'bank lookup + loss and gradients, {size}, over their four products', ratio=t['training']/t['four_products'], limit=1.2, detail=ms)

if __name__=='__main__':
    for row in rows(): print(row)
