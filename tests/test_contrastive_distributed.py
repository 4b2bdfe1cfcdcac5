"Two gloo processes give the loss and the gradients of one process, whatever rows each of them holds"
import math, os
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vadnb.losses.contrastive import bank_info_nce, gather_rows, hard_negative, info_nce, n_candidates, retrieval_at_1, same_key, same_key_as, siglip
from vadnb.models.aggregate import unit
from vadnb.models.memory_bank import MemoryBank

SPLITS = [(3, 1), (2, 0), (0, 2), (1, 0), (0, 0), (2, 2)]
STEPS = [(3, 1), (2, 0), (0, 2), (1, 0), (0, 0), (2, 2), (4, 3), (0, 5), (1, 2)] # rows of each process in a run with a bank of 6
ACCUMULATION,WARMUP = 2,1

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

class Remembering(Towers):
    "Towers, a bias for the sigmoid loss, and a bank that the model holds"
    def __init__(self):
        super().__init__()
        self.bias, self.bank = nn.Parameter(torch.tensor(-3.)), MemoryBank(6, 8, warmup=WARMUP)

def run_with_bank(kind, chunk, rows_of):
    "A few optimizer steps with accumulation: losses, candidates, parameters and the state of the bank"
    gather = dist.is_initialized()
    inner = Remembering()
    model = DistributedDataParallel(inner) if gather else inner
    optimizer, bank, log = torch.optim.SGD(inner.parameters(), lr=.1), inner.bank, []
    for i, split in enumerate(STEPS):
        g = torch.Generator().manual_seed(100+i)
        n = sum(split)
        x, y, keys = torch.randn(n, 6, generator=g), torch.randn(n, 5, generator=g), torch.stack([torch.randint(0, m, (n,), generator=g) for m in (9, 5)], 1)
        x, y, keys = (v[rows_of(split)] for v in (x, y, keys))
        a, b, _, s = model(x, y, y)
        past, past_text, past_keys = bank.read(copy=False) if bank.active else (a[:0], b[:0], keys[:0])
        mask, bank_mask = same_key(keys, gather), same_key_as(keys, past_keys)
        if kind == 'siglip': loss = siglip(a, b, s, inner.bias, mask, past, past_text, bank_mask, gather, chunk)
        else: loss = bank_info_nce(a, b, s, past, past_text, mask, bank_mask, gather, chunk) + 0*inner.bias
        log.append((loss.item(), n_candidates(a, mask, gather, bank_mask).tolist(), retrieval_at_1(a, b, mask, gather, past, past_text, bank_mask).item()))
        bank.push(*(gather_rows(v.detach())[0] for v in (a, b, keys)))
        (loss/ACCUMULATION).backward()
        if i % ACCUMULATION == ACCUMULATION-1:
            optimizer.step(); optimizer.zero_grad(); bank.step()
    return dict(log=log, parameters={k: p.detach().clone() for k, p in inner.named_parameters()}, bank={k: v.clone() for k, v in bank.state_dict().items()})

WITH_BANK = [('info_nce', None), ('info_nce', 2), ('siglip', 2)]

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
    for case in WITH_BANK: results[case] = run_with_bank(*case, lambda split: slice(0, split[0]) if rank==0 else slice(split[0], sum(split)))
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

@pytest.mark.parametrize('case', WITH_BANK)
def test_bank_matches_one_process(two, case):
    want = run_with_bank(*case, lambda split: slice(None))
    assert want['bank']['count'] == 6 and want['bank']['steps'] == len(STEPS)//ACCUMULATION
    for k, v in want['bank'].items():
        assert torch.equal(two[0][case]['bank'][k], two[1][case]['bank'][k]), k # identical, not only close
        torch.testing.assert_close(two[0][case]['bank'][k], v, atol=1e-6, rtol=1e-5)
    for k, v in want['parameters'].items():
        for rank in two: torch.testing.assert_close(rank[case]['parameters'][k], v, atol=1e-6, rtol=1e-5, msg=lambda m: f'{k}: {m}')
    assert any((v-dict(Remembering().named_parameters())[k]).abs().max() > 1e-3 for k, v in want['parameters'].items())
    for i, (split, (loss, n, r1)) in enumerate(zip(STEPS, want['log'])):
        mine = [rank[case]['log'][i] for rank in two]
        assert sum(m[0] for m in mine)/2 == pytest.approx(loss, abs=1e-5) # what DDP averages
        assert mine[0][1]+mine[1][1] == n
        if sum(split): assert sum(c*m[2] for c, m in zip(split, mine) if c)/sum(split) == pytest.approx(r1)
