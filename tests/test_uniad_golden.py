"UniAD golden values: neck, head, gradients, jitter and official checkpoints through the public functions"
import json, random, sys, types
from collections import OrderedDict
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vadnb.core import CheckpointError
from vadnb.losses.reconstruction import FeatureMSELoss
from vadnb.models import uniad
from vadnb.models.uniad import MFCN, FeatureJitter, NeighborAttention, UniAD, neighbor_mask
from vadnb.models.weights import read_weights

def close(a, b, atol=0, rtol=0): torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
def part(gold, start): return {k.removeprefix(start): v for k,v in gold.items() if k.startswith(start)}

@pytest.fixture(scope='module')
def golden(shared):
    folder = shared/'golden'/'uniad'
    return lambda name: (json.loads((folder/f'{name}.json').read_text()), load_file(folder/f'{name}.safetensors'))

def head(c):
    "A model from the official names of its settings"
    same = ('feature_size', 'hidden_dim', 'nhead', 'num_encoder_layers', 'num_decoder_layers', 'dim_feedforward', 'dropout', 'activation', 'normalize_before', 'pos_embed_type')
    return UniAD(c['inplanes'][0], c.get('instrides', [16])[0], **{k: c[k] for k in same}, neighbor_size=c['neighbor_mask']['neighbor_size'], neighbor_masks=c['neighbor_mask']['mask'],
                 jitter_scale=c['feature_jitter']['scale'], jitter_prob=c['feature_jitter']['prob'])

def check(model, gold, tol, noise=None):
    out = model(gold['input.feature_align'], noise)
    for k in ('feature_rec', 'pred'): close(out[k], gold[f'output.{k}'], **tol[k])
    loss = FeatureMSELoss()(out)
    close(loss[None], gold['output.loss'], **tol['loss'])
    loss.backward()
    own = dict(model.named_parameters())
    for k,v in part(gold, 'grad.').items(): close(own[k].grad, v, **tol['grad'])
    return loss.item(), torch.stack([p.grad.norm() for p in own.values()]).norm().item()

@pytest.mark.parametrize('onednn', [False, True])
@pytest.mark.parametrize('name', ['uniad_transformer', 'uniad_transformer_prenorm'])
def test_head_forward_and_gradients(golden, monkeypatch, name, onednn):
    # these sizes are too small for it to be chosen
    if onednn and uniad._product is None: pytest.skip('this build of torch has no oneDNN')
    used = []
    monkeypatch.setattr(uniad, '_use_onednn', lambda x, w: onednn and not used.append(1))
    facts, gold = golden(name)
    model = head(facts['config']).eval()
    assert model.load_reference(part(gold, 'param.')) == []
    s, tol = facts['scalars'], facts['tolerances']
    counts = [p.numel() for p in model.parameters()]
    assert (len(counts), sum(counts)) == (s['num_parameter_tensors'], s['num_parameters'])
    loss, norm = check(model, gold, tol)
    assert loss == pytest.approx(s['loss'], rel=tol['loss']['rtol'])
    assert norm == pytest.approx(s['grad_l2_norm_all_parameters'], rel=tol['grad_l2_norm']['rtol'])
    assert bool(used)==onednn

@pytest.mark.filterwarnings('ignore:TF32')
def test_products_of_the_default_size():
    "oneDNN is chosen there, and gives what torch gives without it"
    torch.manual_seed(0)
    model, align, found = UniAD().eval(), torch.randn(2, 272, 14, 14), []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert uniad._use_onednn(torch.zeros(2, 196, 256), torch.zeros(256, 256))==(enabled and uniad._product is not None)
            out = model(align)
            model.zero_grad()
            FeatureMSELoss()(out).backward()
            with torch.no_grad(): free = model(align)['feature_rec']
            found.append([out['feature_rec'].detach(), free]+[p.grad for p in model.parameters()])
    for a,b in zip(*found): assert (a-b).abs().max() <= 1e-4*b.abs().max()

@pytest.mark.parametrize('size,masks', [((3, 3), (True,)*3), ((3, 5), (True, True, False)), ((3, 5), (False, True, True))])
def test_another_mask_misses_the_golden_values(golden, size, masks):
    facts, gold = golden('uniad_transformer')
    model = head(facts['config'] | dict(neighbor_mask=dict(neighbor_size=size, mask=masks))).eval()
    model.load_reference(part(gold, 'param.'))
    assert (model(gold['input.feature_align'])['feature_rec']-gold['output.feature_rec']).abs().max() > 1e-2

def test_mfcn(golden):
    facts, gold = golden('uniad_mfcn')
    c = facts['config']
    neck = MFCN(c['strides'], c['outstride'])
    assert neck.scales == facts['scale_factors'] and len(neck.state_dict()) == facts['num_state_dict_entries']
    close(neck([gold[f'input.features.{i}'] for i in range(4)]), gold['output.feature_align'], **facts['tolerances']['feature_align'])

def test_jitter_tokens(golden):
    facts, gold = golden('uniad_jitter')
    jitter, tol = FeatureJitter(facts['config']['scale']), facts['tolerances']
    tokens, noise, want = (gold[k].transpose(0, 1) for k in ('input.tokens', 'input.noise', 'output.tokens'))
    close(jitter(tokens, noise), want, **tol['tokens'])
    # the same seed draws the same noise
    torch.manual_seed(facts['torch_seed_noise'])
    close(jitter(tokens), want, **tol['tokens'])
    drawn = torch.stack([jitter(tokens)-tokens for _ in range(facts['statistics']['reps'])])
    ratio = drawn.std((0, -1))/(facts['config']['scale']*tokens.norm(dim=-1)/tokens.shape[-1])
    assert abs(ratio.mean()-1) < tol['std_over_expected']['mean_abs'] and (ratio-1).abs().max() < tol['std_over_expected']['minmax_abs']

def test_jitter_probability(golden):
    p = golden('uniad_jitter')[0]['probability']
    random.seed(0)
    jitter, x = FeatureJitter(prob=p['prob']), torch.ones(4, 2, 3)
    hit = [(jitter(x) != x).flatten(1).any(1) for _ in range(p['calls'])]
    # one draw for the whole batch
    assert all(h.all() or not h.any() for h in hit)
    assert abs(sum(h.all().item() for h in hit)-p['prob']*p['calls']) < p['tolerance_4_sigma']

def test_training_step_with_jitter(golden):
    facts, gold = golden('uniad_jitter')
    gold = part(gold, 'train.')
    model = head(facts['config']['train_head']).train()
    assert model.load_reference(part(gold, 'param.')) == []
    check(model, gold, facts['tolerances']['train'], gold['input.noise'].transpose(0, 1))

class EasyDict(dict):
    "What the official configuration is made of, as far as a file shows it"
EasyDict.__module__, EasyDict.__qualname__ = 'easydict', 'EasyDict'

@pytest.fixture(scope='module')
def layout(shared): return json.loads((shared/'golden'/'uniad'/'uniad_checkpoint_layout.json').read_text())

def official(layout, path, legacy=False, **extra):
    "A file with the names, shapes and pickled oddities of an official checkpoint, filled with random numbers"
    g = torch.Generator().manual_seed(0)
    fill = lambda e: torch.zeros(e['shape'], dtype=torch.int64) if e['dtype'] == 'int64' else torch.randn(e['shape'], generator=g)
    state = OrderedDict((e['name'], fill(e)) for e in layout['state_dict'])
    easy = lambda x: EasyDict({k: easy(v) for k,v in x.items()}) if isinstance(x, dict) else [easy(v) for v in x] if isinstance(x, list) else x
    held = dict(epoch=11, arch=easy(layout['config']['net']), state_dict=state, best_metric=np.float64(.97), optimizer={}) | extra
    module = types.ModuleType('easydict'); module.EasyDict = EasyDict
    kept = sys.modules.get('easydict')
    sys.modules['easydict'] = module
    try: torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    finally: sys.modules.pop('easydict') if kept is None else sys.modules.update(easydict=kept)
    return state

@pytest.mark.parametrize('legacy', [False, True])
def test_official_checkpoint(layout, tmp_path, legacy):
    state = official(layout, tmp_path/'ckpt.pth.tar', legacy)
    model = UniAD()
    names = [e['name'] for e in layout['state_dict']]
    assert len(names) == layout['counts']['num_entries']
    unused = model.load_reference(tmp_path/'ckpt.pth.tar')
    assert unused == [n for n in names if n.startswith('module.backbone.')] and len(unused) == layout['counts']['backbone_entries']
    own = model.state_dict()
    assert list(own) != [] and {f'module.reconstruction.{k}' for k in own} == set(names)-set(unused)
    for k,v in own.items(): assert torch.equal(v, state[f'module.reconstruction.{k}'])
    assert sum(p.numel() for p in model.parameters()) == layout['counts']['reconstruction_parameters'] == 7_717_392
    assert len(list(model.parameters())) == layout['counts']['reconstruction_entries'] == 132

class Runs:
    def __reduce__(self): return (exec, ('raise SystemExit("ran")',))

def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(dict(state_dict=OrderedDict(a=torch.zeros(1)), arch=Runs()), tmp_path/'evil.pth.tar')
    with pytest.raises(CheckpointError, match='names code that is not run here'): read_weights(tmp_path/'evil.pth.tar')

def test_weights_of_another_grid_change_nothing(golden):
    facts, gold = golden('uniad_transformer')
    model = head(facts['config'] | dict(feature_size=(6, 9)))
    before = {k: v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'pos_embed.col_embed.weight.*\(8, 16\).*\(9, 16\)'): model.load_reference(part(gold, 'param.'))
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])

def test_dropout_leaves_attention_right_on_average():
    torch.manual_seed(0)
    attention, x, pos, mask = NeighborAttention(16, 2, .3), torch.randn(1, 12, 16), torch.randn(12, 16), neighbor_mask((3, 4), (1, 1))
    with torch.no_grad():
        want = attention.eval()(x, x, pos, mask)
        got = attention.train()(x.expand(20_000, -1, -1), x.expand(20_000, -1, -1), pos, mask)
    assert got.std(0).max() > .01
    assert ((got.mean(0)-want[0])/(got.std(0)/20_000**.5)).abs().max() < 5

def test_no_buffer_is_stored_and_all_of_them_move():
    model = UniAD(6, 4, (4, 5), 16, 2, 1, 1, 24, pos_embed_type='sine', neighbor_size=(3, 3))
    assert set(model.state_dict()) == {k for k,_ in model.named_parameters()}
    meta = model.to('meta')
    assert all(t.is_meta for t in meta(torch.randn(2, 6, 4, 5, device='meta')).values())
    assert meta.mask.is_meta and meta.pos_embed.pos.is_meta
