"ActionFormer against golden values of OpenTAD, and what the padding must not change"
import json
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from vadnb.core import CheckpointError
from vadnb.models.actionformer import ActionFormer
from vadnb.models.actionformer import padding_unit

def close(a, b, **tol): torch.testing.assert_close(a, b, **(tol or dict(atol=1e-5, rtol=1e-5)))
def part(gold, start): return {k.removeprefix(start): v for k,v in gold.items() if k.startswith(start)}

@pytest.fixture(scope='module')
def golden(shared):
    folder = shared/'golden'/'adatad'
    return lambda name: (json.loads((folder/f'{name}.json').read_text()), load_file(folder/f'{name}.safetensors'))

def detector(c, **kw):
    "A detector from the official names of its settings"
    own = dict(in_channels=c['in_channels'], num_classes=c['num_classes'], channels=c['out_channels'], heads=c['n_head'],
               arch=c['arch'], window=c['win'], max_seq_len=c['max_seq_len'], abs_position=c['use_abs_pe'],
               ranges=c['regression_range'], head_channels=c['feat_channels'], head_convs=c['num_convs'])
    return ActionFormer(**{**own, **kw})

HEADS = ['actionformer_head', 'actionformer_head_local', 'actionformer_head_abspe']

@pytest.mark.parametrize('name', HEADS)
def test_forward_and_decoded_segments(golden, name):
    meta,gold = golden(name)
    net = detector(meta['config'], reference=True).eval()
    assert net.load_reference(part(gold, 'sd/'))==['rpn_head.loss_normalizer']
    tol = meta['tolerances']
    with torch.no_grad(): out = net(gold['features'], gold['masks'])
    for l in range(len(meta['config']['strides'])):
        torch.testing.assert_close(out.points[l], gold[f'out/points{l}'], atol=0, rtol=0)
        assert torch.equal(out.masks[l], gold[f'out/mask{l}'])
        valid = gold[f'out/mask{l}'][:,None]
        for found,want in ((out.logits[l], gold[f'out/cls{l}']), (out.distances[l], gold[f'out/reg{l}'])):
            assert found.shape==want.shape
            close(found*valid, want*valid, **tol)
    for i,(segments,scores) in enumerate(net.decode(out)):
        close(segments, gold[f'out/proposals{i}'], **tol)
        close(scores, gold[f'out/scores{i}'], **tol)

@pytest.mark.parametrize('name', HEADS)
def test_without_leaks_a_whole_window_is_the_same(golden, name):
    meta,gold = golden(name)
    net = detector(meta['config']).eval()
    net.load_reference(part(gold, 'sd/'))
    whole = gold['masks'].all(1)
    if gold['features'].shape[-1]!=meta['config']['padded_len']: pytest.skip('every sample of this fixture is padded')
    with torch.no_grad(): out = net(gold['features'], gold['masks'])
    assert whole.any() and not whole.all()
    for l,x in enumerate(out.logits): close(x[whole], gold[f'out/cls{l}'][whole], **meta['tolerances'])

# ---------------------------------------------------------------- padding, and what it costs

def stirred(**kw):
    "A small detector whose every part shows, in evaluation"
    torch.manual_seed(0)
    net = ActionFormer(**{**dict(in_channels=8, num_classes=3, channels=16, heads=2, layer_scale=1.), **kw}).eval()
    for p in net.parameters():
        if p.ndim<2: torch.nn.init.normal_(p, 1., .2)
    return net

@pytest.mark.parametrize('kw', [dict(), dict(window=19), dict(window=[19, 9, 19, -1, 5, 3]),
                                dict(abs_position=True, max_seq_len=512), dict(reference=True, max_seq_len=64)])
def test_a_video_of_915_positions_is_the_same_however_it_is_padded(kw):
    net,T = stirred(**kw), 915
    x = torch.randn(1, 8, T)
    def valid(n):
        "Logits and distances at valid places, padded with noise to n, or not at all"
        noise = torch.zeros(1, 8, n-T) if net.reference else 100*torch.randn(1, 8, n-T)
        with torch.no_grad(): out = net(torch.cat([x, noise], 2), torch.arange(n)[None]<T)
        assert [m.sum().item() for m in out.masks]==[-(-T//2**l) for l in range(6)]
        return torch.cat([v[...,:-(-T//2**(l%6))].flatten() for l,v in enumerate(out.logits+out.distances)])
    alone = valid(T)
    for n in (960, 1152, 2304): close(valid(n), alone, atol=1e-5, rtol=1e-5)

def test_cost_follows_the_length_of_the_video():
    def length(net, T):
        with torch.no_grad(): return net(torch.zeros(1, 8, T), torch.ones(1, T).bool()).masks[0].shape[1]
    assert [length(stirred(), T) for T in (915, 3, 960)]==[928, 32, 960]
    assert [length(stirred(window=19), T) for T in (915, 3)]==[1152, 576]
    assert [length(stirred(reference=True, max_seq_len=1024), T) for T in (915, 1024, 1030)]==[1024, 1024, 1056]

def test_the_unit_is_a_common_multiple_on_every_level():
    for windows in ([19]*6, [5, 7, -1], [9, -1, 5, 7, 3, 19], [-1]*6):
        unit = padding_unit(windows)
        for l,w in enumerate(windows): assert unit%2**l==0 and (unit//2**l)%max(2*(w//2), 1)==0
    # the largest of the levels' blocks, 12, is no multiple of 8
    net = stirred(arch=(1, 1, 1), window=[9, 7])
    assert net.unit==24
    with torch.no_grad(): assert net(torch.zeros(1, 8, 40), torch.ones(1, 40).bool()).logits[0].shape[2]==48

def test_what_is_behind_the_mask_has_no_gradient_either():
    net = stirred(path_drop=0.).train()
    x = torch.randn(2, 8, 60).requires_grad_()
    mask = torch.arange(60)<torch.tensor([60, 37])[:,None]
    out = net(x, mask)
    sum((v*m[:,None]).square().sum() for v,m in zip(out.logits+out.distances, out.masks*2)).backward()
    assert not x.grad[1,:,37:].any() and x.grad[1,:,36].any() and x.grad[0].abs().sum(0).min()>0

def test_an_empty_sample_leaves_the_others_alone():
    net = stirred(window=5)
    x = torch.randn(2, 8, 40)
    with torch.no_grad():
        both = net(x, torch.tensor([[True], [False]]).expand(2, 40))
        one = net(x[:1], torch.ones(1, 40).bool())
    for a,b in zip(both.logits, one.logits): close(a[:1], b)
    assert all(v.isfinite().all() for v in both.logits+both.distances)
    assert [len(s) for s,_ in net.decode(both)]==[sum(m[0].sum() for m in one.masks), 0]

# ---------------------------------------------------------------- precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_scores_are_float32_under_autocast(dtype):
    net = stirred(num_classes=2)
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype): out = net(torch.randn(1, 8, 64), torch.ones(1, 64).bool())
    assert {v.dtype for v in out.logits+out.distances+out.points}=={torch.float32}
    # a pair that a score of half precision could not tell apart
    near = out._replace(logits=[torch.tensor([4., 4.002]).view(1, 2, 1).expand_as(v) for v in out.logits])
    with torch.autocast('cpu', dtype=dtype): (segments,scores), = net.decode(near)
    assert segments.dtype==scores.dtype==torch.float32 and (scores[:,0]<scores[:,1]).all()

# ---------------------------------------------------------------- checkpoints

@pytest.fixture(scope='module')
def layout(shared):
    return json.loads((shared/'golden'/'adatad'/'checkpoint_layout.json').read_text())['layouts']['opentad_adatad']

@pytest.fixture(scope='module')
def official(): return ActionFormer(384, 20, max_seq_len=768)

def test_an_official_checkpoint_fits_name_by_name(layout, official, tmp_path):
    stored = {f'module.{k}': torch.full((), 2.).expand(shape) for k,(shape,_) in layout['state_dict'].items()}
    unused = official.load_reference(dict(epoch=59, state_dict=stored))
    outside = [k for k in stored if k.startswith('module.backbone.')]
    assert set(unused)=={*outside, 'module.rpn_head.loss_normalizer'}
    assert all((p==2).all() for p in official.parameters())
    assert sum(p.numel() for p in official.parameters())==26_695_708
    parts = layout['per_part']
    for k in ('projection', 'neck', 'rpn_head'): assert sum(p.numel() for p in getattr(official, k).parameters())==parts[f'{k}.']

def test_a_file_is_read_like_its_tensors(tmp_path):
    net,other = stirred(), stirred()
    for p in other.parameters(): torch.nn.init.zeros_(p)
    torch.save(dict(epoch=3, state_dict={f'module.{k}': v for k,v in net.state_dict().items()}), tmp_path/'epoch_3.pth')
    assert other.load_reference(tmp_path/'epoch_3.pth')==[]
    for a,b in zip(net.parameters(), other.parameters()): assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match='no such file'): other.load_reference(tmp_path/'missing.pth')

def test_what_decays_is_what_decays_in_the_reference(layout, official):
    _,decayed,spared = (g['names'] for g in layout['optimizer_groups'])
    own = official.decay_split()
    assert [list(g) for g in own]==[decayed, spared]

# ---------------------------------------------------------------- a GPU that is not there

def test_on_a_gpu_it_is_the_same_and_nobody_waits(on_cuda):
    x,mask = torch.randn(2, 8, 100), torch.arange(100)<torch.tensor([100, 71])[:,None]
    def run(device, kw):
        net = stirred(path_drop=0., **kw).to(device).train()
        out = net(x.to(device), mask.to(device))
        waited = 0 if device=='cpu' else there.total
        sum(v.square().mean() for v in out.logits+out.distances).backward()
        return out, [p.grad for p in net.parameters()], waited, net
    for kw in (dict(), dict(window=[5, -1, 3, -1, 5, 3]), dict(abs_position=True, max_seq_len=32)):
        with sdpa_kernel(SDPBackend.MATH):
            plain,grads,*_ = run('cpu', kw)
            with on_cuda() as there:
                out,found,_,net = run('cuda', kw)
                for batch in (0, 1):
                    there.waits.clear()
                    moved = x.to('cuda', non_blocking=True), mask.to('cuda', non_blocking=True)
                    got = net(*moved)
                    assert not there.total, there.listed()
                net.decode(got)
                assert there.total==1, there.listed()
        for a,b in zip((*out.logits, *out.distances, *found), (*plain.logits, *plain.distances, *grads)):
            close(a.cpu(), b, atol=1e-4, rtol=1e-4)
