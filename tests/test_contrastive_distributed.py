"Two gloo processes give the loss and the gradients of one process, whatever rows each of them holds"
import math, os
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vadnb.losses.contrastive import gather_rows, hard_negative, info_nce, n_candidates, retrieval_at_1, same_key
from vadnb.models.aggregate import unit

SPLITS = [(3, 1), (2, 0), (0, 2), (1, 0), (0, 0), (2, 2)]

class Towers(nn.Module):
    "Two linear encoders and a scale: the smallest model that a contrastive loss can train"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)
        self.log_scale = nn.Parameter(torch.tensor(math.log(5)))
    def forward(self, x, y, texts): return unit(self.a(x)), unit(self.b(y)), unit(self.b(texts)), self.log_scale

def data(n):
    g = torch.Generator().manual_seed(n)
    keys = torch.tensor([1, 2, 1, 3])[:n]
    return torch.randn(n, 6, generator=g), torch.randn(n, 5, generator=g), torch.randn(n, 4, 5, generator=g), keys

def step(model, x, y, texts, keys, masked, gather):
    "Losses, backward, and the figures for the log"
    a, b, t, s = model(x, y, texts)
    mask = same_key(keys, gather) if masked else None
    loss = info_nce(a, b, s, mask, gather) + .5*hard_negative(a, t, s, gather)
    loss.backward()
    return loss.detach(), retrieval_at_1(a, b, mask, gather), n_candidates(a, mask, gather)

def worker(rank, port, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    results = {}
    for split in SPLITS:
        rows = slice(0, split[0]) if rank==0 else slice(split[0], sum(split))
        mine = [v[rows] for v in data(sum(split))]
        everything, first = gather_rows(mine[0])
        assert torch.equal(everything, data(sum(split))[0]) and first==(0 if rank==0 else split[0])
        for masked in (False, True):
            model = DistributedDataParallel(Towers())
            loss, r1, n = step(model, *mine, masked, gather=True)
            dist.all_reduce(loss)
            grads = {k: p.grad.clone() for k, p in model.module.named_parameters()}
            results[split, masked] = dict(loss=loss/2, grads=grads, r1=r1, n=n)
    torch.save(results, f'{out}/{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def two(two_processes): return two_processes(worker)

@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('split', SPLITS)
def test_matches_one_process(two, split, masked):
    model = Towers()
    loss, r1, n = step(model, *data(sum(split)), masked, gather=False)
    for rank in (0, 1):
        got = two[rank][split, masked]
        torch.testing.assert_close(got['loss'], loss, atol=1e-6, rtol=1e-6)
        for k, p in model.named_parameters(): torch.testing.assert_close(got['grads'][k], p.grad, atol=1e-6, rtol=1e-6, msg=lambda m: f'{k}: {m}')
    torch.testing.assert_close(torch.cat([two[r][split, masked]['n'] for r in (0, 1)]), n)
    found = sum(c*two[r][split, masked]['r1'] for r, c in enumerate(split) if c)
    if sum(split): torch.testing.assert_close(found/sum(split), r1)

def test_no_rows_anywhere_gives_zero(two):
    got = two[0][(0, 0), False]
    assert got['loss']==0 and all((g==0).all() for g in got['grads'].values())
