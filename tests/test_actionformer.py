"ActionFormer against golden values of OpenTAD, and what the padding must not change"
import json
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from vadnb.core import CheckpointError
from vadnb.losses.detection import DetectionLoss
from vadnb.models.actionformer import ActionFormer
from vadnb.models.actionformer import padding_unit
from vadnb.models.videomae import VideoMAE

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
                                dict(abs_position=True, max_seq_len=512), dict(reference=True, max_seq_len=2304)])
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
    return json.loads((shared/'golden'/'adatad'/'checkpoint_layout.json').read_text())['layouts']

@pytest.fixture(scope='module')
def official(): return ActionFormer(384, 20, max_seq_len=768)

def test_an_official_checkpoint_fits_name_by_name(layout, official, tmp_path):
    stored = {f'module.{k}': torch.full((), 2.).expand(shape) for k,(shape,_) in layout['opentad_adatad']['state_dict'].items()}
    unused = official.load_reference(dict(epoch=59, state_dict=stored))
    outside = [k for k in stored if k.startswith('module.backbone.')]
    assert set(unused)=={*outside, 'module.rpn_head.loss_normalizer'}
    assert all((p==2).all() for p in official.parameters())
    assert sum(p.numel() for p in official.parameters())==26_695_708
    parts = layout['opentad_adatad']['per_part']
    for k in ('projection', 'neck', 'rpn_head'): assert sum(p.numel() for p in getattr(official, k).parameters())==parts[f'{k}.']

def test_a_file_is_read_like_its_tensors(tmp_path):
    net,other = stirred(), stirred()
    for p in other.parameters(): torch.nn.init.zeros_(p)
    torch.save(dict(epoch=3, state_dict={f'module.{k}': v for k,v in net.state_dict().items()}), tmp_path/'epoch_3.pth')
    assert other.load_reference(tmp_path/'epoch_3.pth')==[]
    for a,b in zip(net.parameters(), other.parameters()): assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match='no such file'): other.load_reference(tmp_path/'missing.pth')

def test_what_decays_is_what_decays_in_the_reference(layout, official):
    _,decayed,spared = layout['optimizer_groups']
    own = official.decay_split()
    assert list(own[0])==decayed['names'] and list(own[1])[0]==spared['first'] and list(own[1])[-1]==spared['last']
    for g,want in zip(own, (decayed, spared)):
        assert (len(g), sum(p.numel() for p in g.values()))==(want['tensors'], want['parameters'])

# ---------------------------------------------------------------- a GPU that is not there

def test_on_a_gpu_it_is_the_same_and_nobody_waits(on_cuda):
    kw = dict(arch=(1, 1, 1), window=[5, -1], abs_position=True, max_seq_len=8, path_drop=.5)
    x,mask = torch.randn(2, 8, 24), torch.arange(24)<torch.tensor([24, 13])[:,None]
    def run(net, x, mask):
        torch.manual_seed(2)
        out = net.train()(x, mask)
        sum(v.square().mean() for v in out.logits+out.distances).backward()
        return out, [p.grad for p in net.parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        plain,grads = run(stirred(**kw), x, mask)
        with on_cuda() as there:
            net = stirred(**kw).to('cuda')
            moved = x.to('cuda'), mask.to('cuda')
            there.waits.clear()
            out,found = run(net, *moved)
            assert not there.total, there.listed()
            segments = net.decode(out)
            assert there.total==1, there.listed()
            own = [t.cpu() for t in (*out.logits, *out.distances, *found, *segments[1])]
    for a,b in zip(own, (*plain.logits, *plain.distances, *grads, *stirred(**kw).decode(plain)[1]), strict=True):
        close(a, b, atol=1e-5, rtol=1e-4)

# ---------------------------------------------------------------- the whole detector of AdaTAD

def whole(c, gold):
    "Backbone, detector and loss with the weights of the fixture"
    weights = part(gold, 'sd/')
    backbone = VideoMAE(c['embed'], c['depth'], c['heads'], c['patch'], c['img_size'], c['num_frames'], c['tubelet'],
                        c['mlp_ratio'], 0., c['adapter_index'], c['adapter_mlp_ratio'])
    net = detector(c, reference=True, path_drop=0.)
    backbone.load_reference(weights); net.load_reference(weights)
    return backbone, net, DetectionLoss(c['num_classes'])

def test_end_to_end(golden):
    meta,gold = golden('adatad_e2e')
    c,tol,want = meta['config'], meta['tolerances'], meta['expected']
    backbone,net,loss = parts = whole(c, gold)
    frames = gold['frames_u8'].squeeze(1).transpose(1, 2)
    truth = tuple([gold[f'gt/{k}{i}'] for i in range(c['batch'])] for k in ('segments', 'labels'))
    def answer(): return net(F.interpolate(backbone(frames), c['window'], mode='linear'), gold['masks'])
    def same(got, want, rtol):
        for own,theirs in (('cls', 'cls_loss'), ('reg', 'reg_loss'), ('loss', 'cost')):
            assert got[own].item()==pytest.approx(want[theirs], rel=rtol)
    for m in parts: m.eval()
    with torch.no_grad():
        out = answer()
        same(loss(out, *truth), want['eval_losses'], tol['loss_rtol'])
        for i,(segments,scores) in enumerate(net.decode(out)):
            close(segments, gold[f'eval/proposals{i}'], atol=tol['eval_atol'], rtol=0)
            close(scores, gold[f'eval/scores{i}'], atol=tol['eval_atol'], rtol=0)
    for m in parts: m.train()
    adapters = {f'backbone.model.backbone.{n}': p for n,p in backbone.named_parameters() if p.requires_grad}
    decayed,spared = net.decay_split()
    names = adapters | decayed | spared
    group = lambda params,lr,wd: dict(params=list(params.values()), lr=lr, weight_decay=wd)
    optimizer = torch.optim.AdamW([group(adapters, c['adapter_lr'], .05), group(decayed, c['lr'], .05), group(spared, c['lr'], 0.)])
    for step,(told,rtol) in enumerate(zip(want['train_steps'], tol['step_losses_rtol'])):
        optimizer.zero_grad()
        got = loss(answer(), *truth)
        same(got, told, rtol)
        got['loss'].backward()
        if not step:
            # a bias of the keys shifts all scores of a query alike: its gradient is rounding
            grads = {n: g for n,g in part(gold, 'grad/').items() if not n.endswith('attn.key.bias')}
            for n,g in grads.items(): close(names[n].grad, g, atol=tol['grad_rtol_of_max']*g.abs().max().item()+1e-9, rtol=0)
            assert names.keys()-grads.keys()=={n for n in names if n.endswith(('attn.key.bias', 'attn.key_norm.bias'))}
        norm = torch.nn.utils.clip_grad_norm_(list(names.values()), 1.)
        assert norm.item()==pytest.approx(told['grad_norm'], rel=5e-3)
        optimizer.step()
        assert loss.normalizer.item()==pytest.approx(told['loss_normalizer'], rel=1e-5)
    for n,p in part(gold, 'after/').items(): close(names[n].detach(), p, atol=tol['after_atol'], rtol=0)
