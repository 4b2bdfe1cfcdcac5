"The background term of two gloo processes is the one of a single process, whatever rows each of them holds"
import os
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vadnb.models.aggregate import unit
from vadnb.losses.background import background_loss

SPLITS = [((2, 5), (1, 3)), ((2, 0), (0, 4)), ((0, 3), (2, 0)), ((0, 2), (0, 2)), ((1, 0), (1, 0))] # (regions, background cells) of each process

class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.vision = nn.Linear(5, 8), nn.Linear(6, 8)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
    def forward(self, text, region, cells): return background_loss(unit(self.text(text)), unit(self.vision(region)), unit(self.vision(cells)), self.log_scale)

def data(regions, cells):
    g = torch.Generator().manual_seed(0)
    return torch.randn(regions, 5, generator=g), torch.randn(regions, 6, generator=g), torch.randn(cells, 6, generator=g)

def worker(rank, port, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    results = []
    for (r0, c0), (r1, c1) in SPLITS:
        text, region, cells = data(r0+r1, c0+c1)
        rows, columns = (slice(0, r0), slice(0, c0)) if rank==0 else (slice(r0, None), slice(c0, None))
        model = DistributedDataParallel(Towers())
        loss = model(text[rows], region[rows], cells[columns])
        loss.backward()
        dist.all_reduce(value := loss.detach())
        results.append(dict(loss=value/2, grads={k: p.grad.clone() for k, p in model.module.named_parameters()}))
    torch.save(results, f'{out}/{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def two(two_processes): return two_processes(worker)

@pytest.mark.parametrize('case', range(len(SPLITS)))
def test_background_of_two_processes(two, case):
    (r0, c0), (r1, c1) = SPLITS[case]
    model = Towers()
    loss = model(*data(r0+r1, c0+c1))
    loss.backward()
    for rank in two:
        torch.testing.assert_close(rank[case]['loss'], loss.detach())
        for k, p in model.named_parameters(): torch.testing.assert_close(rank[case]['grads'][k], p.grad, atol=1e-6, rtol=1e-5)
