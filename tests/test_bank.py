"Memory bank and the losses that read it against golden values, in both precisions, whole and in blocks"
import json
import pytest
import torch
from safetensors.torch import load_file
from vadnb.losses.contrastive import bank_info_nce, info_nce, n_candidates, row_losses, same_key, same_key_as, siglip
from vadnb.models.memory_bank import MemoryBank

DTYPES = [torch.float32, torch.float64]
CASES = ['empty', 'partial', 'full', 'masked_queue', 'masked_batch', 'all_same_key', 'one_region', 'one_region_empty', 'no_region', 'scale100', 'two_columns',
         *(f'copies{r}_{m}' for r in (1, 4, 8) for m in ('masked', 'unmasked'))]

def golden(shared, name):
    folder = shared/'golden'/'fgclip'
    return json.loads((folder/f'{name}.json').read_text()), load_file(folder/f'{name}.safetensors')

def scalar(got, want, tol, dtype):
    "Scalars are stored in full: float64 has to reach them, float32 the tolerance of the fixture"
    if dtype == torch.float64: assert abs(got.item()-want) < 1e-10
    else: assert abs(got.item()-want) <= tol['loss_atol']+tol['loss_rtol']*abs(want)

def gradients(got, gold, prefix, tol, dtype):
    for g, k in zip(got, ('region', 'text')):
        want = gold[f'{prefix}.grad.{k}']
        assert g.shape == want.shape and g.isfinite().all()
        # in float64 what is left is the rounding of the stored float32
        torch.testing.assert_close(g.to(want.dtype), want, **(dict(atol=1e-6, rtol=1e-6) if dtype == torch.float64 else dict(atol=tol['grad_atol'], rtol=tol['grad_rtol'])))

def leaves(gold, prefix, log_scale, dtype):
    return [gold[f'{prefix}.{k}'].to(dtype).requires_grad_() for k in ('region', 'text')] + [torch.tensor(log_scale, dtype=torch.float64).to(dtype).requires_grad_()]

@pytest.mark.parametrize('chunk', [None, 1, 4, 100])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', CASES)
def test_bank_loss(shared, name, dtype, chunk):
    facts, gold = golden(shared, 'bank_loss')
    case, tol = facts['cases'][name], facts['tolerance']
    region, text, s = leaves(gold, name, case['log_scale'], dtype)
    past, past_text, past_keys = (gold[f'{name}.{k}'][:case['count']] for k in ('queue_region', 'queue_text', 'queue_keys'))
    keys = gold[f'{name}.keys']
    mask, bank_mask = same_key(keys), same_key_as(keys, past_keys)
    loss = bank_info_nce(region, text, s, past, past_text, mask, bank_mask, chunk=chunk)
    scalar(loss, case['loss'], tol, dtype)
    *got, by_scale = torch.autograd.grad(loss, (region, text, s))
    gradients(got, gold, name, tol, dtype)
    assert abs(by_scale.item()-case['grad_log_scale']) <= (1e-10 if dtype == torch.float64 else tol['grad_atol']+tol['grad_rtol']*abs(case['grad_log_scale']))
    if case['loss'] == 0: assert loss.item() == 0 and not any(g.any() for g in (*got, by_scale))
    rows = row_losses(region, text, region, text, s, mask=mask, bank_a=past, bank_b=past_text, bank_mask=bank_mask, chunk=chunk)
    assert rows.shape == (case['n'], 2)
    if len(rows):
        torch.testing.assert_close(rows.float(), gold[f'{name}.per_anchor'], atol=tol['loss_atol'], rtol=tol['loss_rtol'])
        for i, k in enumerate(('loss_region_to_text', 'loss_text_to_region')): scalar(rows[:, i].mean(), case[k], tol, dtype)
    assert n_candidates(region, mask, bank_mask=bank_mask).tolist() == case['n_candidates']

def test_rows_that_were_never_written_are_not_read(shared):
    _, gold = golden(shared, 'bank_loss')
    for name in ('empty', 'one_region_empty'):
        args = [gold[f'{name}.{k}'] for k in ('region', 'text')]+[torch.tensor(2.)]
        bank = MemoryBank(12, 16)
        bank.visual.copy_(gold[f'{name}.queue_region']); bank.text.copy_(gold[f'{name}.queue_text'])
        past, past_text, _ = bank.read()
        assert torch.equal(bank_info_nce(*args, past, past_text), info_nce(*args)) # to the last bit

def test_enqueue(shared):
    facts, gold = golden(shared, 'bank_loss')
    facts = facts['enqueue']
    bank = MemoryBank(facts['capacity'], facts['D'], key_columns=1)
    assert facts['sizes'] == [s['n'] for s in facts['steps']]
    for i, want in enumerate(facts['steps']):
        bank.push(*(gold[f'enqueue.{i}.{k}'] for k in ('region', 'text')), gold[f'enqueue.{i}.keys'][:, None])
        assert (bank.pointer.item(), bank.count.item()) == (want['ptr'], want['count'])
        assert bank.keys.flatten().tolist() == want['slot_keys'] == gold[f'enqueue.{i}.buffer_keys'].tolist()
        assert bank.written.tolist() == want['slot_written']
        assert torch.equal(bank.visual, gold[f'enqueue.{i}.buffer_region']) and torch.equal(bank.text, gold[f'enqueue.{i}.buffer_text'])
        visual, text, keys = bank.read()
        assert len(visual) == len(text) == want['count'] and sorted(keys.flatten().tolist()) == want['keys_oldest_to_newest']
        bank.step()

@pytest.mark.parametrize('copy', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
def test_training_run(shared, dtype, copy):
    facts, gold = golden(shared, 'bank_loss')
    tol, facts = facts['tolerance'], facts['train']
    bank = MemoryBank(facts['capacity'], 16, key_columns=1, warmup=facts['warmup_optimizer_steps'])
    for i, want in enumerate(facts['steps']):
        if i == 6: # a resume in the middle changes nothing
            other = MemoryBank(facts['capacity'], 16, key_columns=1, warmup=facts['warmup_optimizer_steps'])
            other.load_state_dict(bank.state_dict())
            bank = other
        region, text, s = leaves(gold, f'train.{i}', facts['log_scale'], dtype)
        keys = gold[f'train.{i}.keys'][:, None]
        assert bank.active == want['bank_read'] and bank.count.item() == want['count_before'] and bank.steps.item() == want['optimizer_step']
        past, past_text, past_keys = bank.read(copy) if bank.active else (text[:0], text[:0], keys[:0])
        mask, bank_mask = same_key(keys), same_key_as(keys, past_keys)
        loss = bank_info_nce(region, text, s, past, past_text, mask, bank_mask)
        bank.push(region, text, keys)
        *got, by_scale = torch.autograd.grad(loss, (region, text, s)) # after the write, as a step does it
        scalar(loss, want['loss'], tol, dtype)
        gradients(got, gold, f'train.{i}', tol, dtype)
        assert abs(by_scale.item()-want['grad_log_scale']) <= (1e-9 if dtype == torch.float64 else tol['grad_atol']+tol['grad_rtol']*abs(want['grad_log_scale']))
        assert n_candidates(region, mask, bank_mask=bank_mask).tolist() == want['n_candidates']
        assert (bank.pointer.item(), bank.count.item(), bank.written.tolist()) == (want['ptr_after'], want['count_after'], want['slot_written_after'])
        if i % facts['accum'] == facts['accum']-1: bank.step()
    for k, b in (('region', bank.visual), ('text', bank.text), ('keys', bank.keys[:, 0])): assert torch.equal(b, gold[f'train.final_buffer_{k}'])

def infonce_leaves(gold, want, dtype): return [gold['image'].to(dtype).requires_grad_(), gold['text'].to(dtype).requires_grad_(), torch.tensor(want['log_scale'], dtype=torch.float64).to(dtype).requires_grad_()]

def sums_and_gradients(loss, wrt, want, want_grads, tol, dtype):
    atol = tol['float64_atol'] if dtype == torch.float64 else tol['float32_grad_atol']
    if dtype == torch.float64: assert abs(loss.item()-want['loss']) <= atol
    else: assert abs(loss.item()/want['loss']-1) <= tol['float32_loss_rtol']
    grads = torch.autograd.grad(loss, wrt)
    for g, w in zip(grads[:2], want_grads): torch.testing.assert_close(g.double(), w, atol=atol, rtol=0 if dtype == torch.float64 else 1e-5)
    for g, k in zip(grads[2:], ('grad_log_scale', 'grad_bias')): torch.testing.assert_close(g.item(), want[k], atol=atol, rtol=0 if dtype == torch.float64 else 1e-5)
    return grads

@pytest.mark.parametrize('dtype', DTYPES)
def test_infonce_in_blocks(shared, dtype):
    facts, gold = golden(shared, 'siglip_infonce')
    want, tol = facts['expected']['infonce'], facts['tolerance']
    args = infonce_leaves(gold, want, dtype)
    loss = info_nce(*args)
    whole = sums_and_gradients(loss, args, want, (gold['infonce.grad.image'], gold['infonce.grad.text']), tol, dtype)
    for chunk in want['chunk_sizes_to_try']:
        got = info_nce(*args, chunk=chunk)
        grads = sums_and_gradients(got, args, want, (gold['infonce.grad.image'], gold['infonce.grad.text']), tol, dtype)
        if dtype == torch.float64: assert abs(got-loss) <= tol['chunked_vs_full_float64'] and all((g-w).abs().max() <= tol['chunked_vs_full_float64'] for g, w in zip(grads, whole))
    rows = row_losses(args[0], args[1], args[0], args[1], args[2], chunk=16)
    own = args[2].exp()*(args[0]*args[1]).sum(1)
    for i, k in enumerate(('image_to_text', 'text_to_image')):
        torch.testing.assert_close((rows[:, i]+own).double(), gold[f'infonce.lse_{k}'], atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=0)
        assert abs(rows[:, i].mean().item()-want[f'loss_{k}']) < (1e-10 if dtype == torch.float64 else 1e-5)
    assert n_candidates(args[0]).log().mean().item() == pytest.approx(want['chance'])

@pytest.mark.parametrize('chunk', [None, 16])
@pytest.mark.parametrize('dtype', DTYPES)
def test_infonce_of_each_rank(shared, dtype, chunk):
    facts, gold = golden(shared, 'siglip_infonce')
    want, tol = facts['expected']['infonce'], facts['tolerance']
    n = facts['N']//want['ranks']
    for r, mine in enumerate(want['by_rank']):
        image, text, s = args = infonce_leaves(gold, want, dtype)
        rows = slice(r*n, (r+1)*n)
        loss = row_losses(image[rows], text[rows], image, text, s, first=r*n, chunk=chunk).mean()
        sums_and_gradients(loss, args, mine, (gold[f'rank{r}.grad.image'], gold[f'rank{r}.grad.text']), tol, dtype)

def siglip_leaves(gold, want, dtype): return infonce_leaves(gold, want, dtype)+[torch.tensor(want['bias'], dtype=dtype).requires_grad_()]

@pytest.mark.parametrize('chunk', [None, 1, 5, 16, 48, 64, 100])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ['siglip0', 'siglip1'])
def test_siglip(shared, name, dtype, chunk):
    facts, gold = golden(shared, 'siglip_infonce')
    args = siglip_leaves(gold, facts['expected'][name], dtype)
    sums_and_gradients(siglip(*args, chunk=chunk), args, facts['expected'][name], (gold[f'{name}.grad.image'], gold[f'{name}.grad.text']), facts['tolerance'], dtype)

@pytest.mark.parametrize('dtype', DTYPES)
def test_siglip_of_each_rank(shared, dtype, monkeypatch):
    "What a rank adds: its images against the texts of all, with the gather replaced by a list of what the others hold"
    facts, gold = golden(shared, 'siglip_infonce')
    values = facts['expected']['siglip_by_rank']
    image, text, s, bias = siglip_leaves(gold, facts['expected']['siglip0'], dtype)
    n = facts['N']//len(values)
    for r, want in enumerate(values):
        monkeypatch.setattr('vadnb.losses.contrastive.gather_rows', lambda x: (text, r*n))
        monkeypatch.setattr('vadnb.losses.contrastive.world_size', lambda: len(values))
        rows = slice(r*n, (r+1)*n)
        got = siglip(image[rows], text[rows], s, bias, gather=True).item()
        assert abs(got-want) <= (1e-10 if dtype == torch.float64 else facts['tolerance']['float32_loss_rtol']*want)

def test_a_written_row_has_no_graph():
    bank = MemoryBank(4, 3, key_columns=1)
    x = torch.eye(3).requires_grad_()
    bank.push(x, x, torch.arange(3)[:, None])
    assert not bank.visual.requires_grad and not any(r.requires_grad for r in bank.read())

def test_a_bank_in_half_precision_features_and_autocast():
    "Autocast changes nothing: products with the bank are taken in float32"
    g = torch.Generator().manual_seed(0)
    a, b, past, past_text = (torch.nn.functional.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (4, 4, 9, 9))
    s = torch.tensor(4.6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = bank_info_nce(a, b, s, past, past_text, chunk=4), siglip(a, b, s, torch.tensor(-10.), bank_a=past, bank_b=past_text)
        half = bank_info_nce(a.bfloat16(), b.bfloat16(), s, past, past_text)
    outside = bank_info_nce(a, b, s, past, past_text, chunk=4), siglip(a, b, s, torch.tensor(-10.), bank_a=past, bank_b=past_text)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(inside, outside))
    assert half.dtype == torch.float32 and abs(half-outside[0]) < .5
