"VideoMAE, its adapters and weights of other programs: golden values, layouts of checkpoints, memory, a GPU that is not there"
import json, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from vadnb.core import CheckpointError
from vadnb.models.adapters import TIA
from vadnb.models.footprint import Footprint
from vadnb.models.video_blocks import sine_table
from vadnb.models.videomae import VideoMAE
from vadnb.models.videomae_weights import SIZES, network_size

TINY = dict(dim=24, depth=3, heads=3, patch_size=4, image_size=16, drop_path=.3, adapters='all')
close = torch.testing.assert_close
def part(gold, start): return {k.removeprefix(start): v for k,v in gold.items() if k.startswith(start)}
def film(*shape): return torch.randint(0, 256, shape, dtype=torch.uint8)

@pytest.fixture(scope='module')
def golden(shared):
    folder = shared/'golden'/'adatad'
    return lambda name: (json.loads((folder/f'{name}.json').read_text()), load_file(folder/f'{name}.safetensors'))

@pytest.fixture(scope='module')
def layouts(shared): return json.loads((shared/'golden'/'adatad'/'checkpoint_layout.json').read_text())['layouts']

@pytest.fixture(scope='module')
def small(): return VideoMAE(**SIZES['S'], adapters='all')

def learned(model):
    "A network whose adapters say something"
    torch.manual_seed(0)
    for n,p in model.named_parameters():
        if n.endswith('up_proj.weight'): nn.init.normal_(p, std=.3)
    return model

# ---------------------------------------------------------------- golden values
@pytest.mark.parametrize('kind', ['tia', 'plain'])
def test_adapter(golden, kind):
    says,gold = golden('adapter_unit')
    c,tol = says['config'],says['tolerances']
    adapter = TIA(c['embed'], c['ratio'], temporal=kind=='tia')
    adapter.load_state_dict(part(gold, f'{kind}/sd/'))
    x = gold[f'{kind}/x'].requires_grad_()
    y = adapter(x, c['chunks'], (c['h'], c['w']))
    close(y, gold[f'{kind}/y'], **tol)
    (y*gold[f'{kind}/R']).sum().backward()
    close(x.grad, gold[f'{kind}/grad_x'], **tol)
    for n,p in adapter.named_parameters(): close(p.grad, gold[f'{kind}/grad/{n}'], **tol)

@pytest.mark.parametrize('cut', [{}, dict(checkpointing=True, chunks_at_once=1)], ids=['whole', 'cut'])
@pytest.mark.parametrize('name', ['vit_adapter', 'vit_ladder'])
def test_network_with_adapters(golden, name, cut):
    says,gold = golden(name)
    c,tol = says['config'],says['tolerances']
    near = dict(atol=tol['forward_atol'], rtol=tol['forward_rtol'])
    model = VideoMAE(c['embed'], c['depth'], c['heads'], c['patch'], c['img_size'], c['num_frames'], c['tubelet'], c['mlp_ratio'],
                     c['drop_path_rate'], c['adapter_index'], c['adapter_mlp_ratio'], side=name=='vit_ladder', **cut).eval()
    unused = model.load_reference(part(gold, 'sd/'))
    assert sorted(unused)==([] if model.side else ['fc_norm.bias', 'fc_norm.weight'])
    frames = gold['frames_u8'][:,0].transpose(1, 2)
    x = model.embed(frames)
    close(x, gold['out/embed_tokens'], **near)
    for i,y in enumerate(model.outputs(x, c['chunks'], model.grid(frames))):
        # the blocks beside a ladder are those without adapters
        close(y, gold[f'out/block{i}'], **near)
    pooled = model(frames)
    close(pooled, gold['out/pooled'], **near)
    close(nn.functional.interpolate(pooled, c['window'], mode='linear'), gold['out/feats'], **near)
    (pooled*gold['loss_weight']).sum().backward()
    learn = {n: p.grad for n,p in model.named_parameters() if p.requires_grad}
    assert learn.keys()==part(gold, 'grad/').keys()
    for n,g in learn.items():
        ref = gold[f'grad/{n}']
        assert (g-ref).abs().max()<=tol['grad_rtol_of_max']*ref.abs().max(), n
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

def spellings(rows, official):
    "The same weights as the three programs write them"
    mmaction = {m: official[o] for o,m,_ in rows}
    hub = {}
    for o,_,h in rows: hub.update(zip(h, official[o].chunk(3)) if isinstance(h, list) else {h: official[o]})
    memory = {k.replace('q_bias', 'query.bias').replace('v_bias', 'value.bias'): v for k,v in hub.items()}
    return dict(official=official, mmaction=mmaction, hub=hub, memory=memory,
                wrapped={'state_dict': {f'module.{k}': v for k,v in mmaction.items()}, 'epoch': 3}, deepspeed={'module': official})

def test_classifier_in_all_spellings(golden):
    says,gold = golden('videomae_import')
    c = says['config']
    for name,held in spellings(says['key_map']['rows'], part(gold, 'official/')).items():
        model = VideoMAE(c['d'], c['depth'], c['heads'], c['patch'], c['img'], num_classes=c['classes']).eval()
        assert model.load_reference(held)==[], name
        close(model.logits(gold['frames'].transpose(1, 2), normalized=True), gold['out/logits'], **says['tolerances'])
    size = network_size(part(gold, 'official/'))
    assert size==dict(dim=48, depth=2, patch_size=16, tubelet=2, mlp_ratio=4., num_classes=7)

def test_files_and_what_a_configuration_beside_them_says(golden, tmp_path):
    says,gold = golden('videomae_import')
    c,held = says['config'],spellings(says['key_map']['rows'], part(gold, 'official/'))
    (tmp_path/'hub').mkdir()
    save_file({k: v.contiguous() for k,v in held['hub'].items()}, tmp_path/'hub'/'model.safetensors')
    (tmp_path/'hub'/'config.json').write_text(json.dumps(dict(num_attention_heads=16, layer_norm_eps=1e-12)))
    torch.save(held['deepspeed'], tmp_path/'official.pth')
    for path in ('hub', 'official.pth'):
        model = VideoMAE(c['d'], c['depth'], c['heads'], c['patch'], c['img'], num_classes=c['classes']).eval()
        assert model.load_reference(tmp_path/path)==[]
        close(model.logits(gold['frames'].transpose(1, 2), normalized=True), gold['out/logits'], **says['tolerances'])
    with pytest.raises(CheckpointError, match='missing.pth: no such file'): model.load_reference(tmp_path/'missing.pth')

# ---------------------------------------------------------------- layouts of real checkpoints
def zeros(shapes):
    "A state dict of the right names and shapes that costs no memory"
    res = {k: torch.zeros(()).expand(shape) for k,(shape,_) in shapes.items()}
    return {k: sine_table(v.shape[1], v.shape[2])[None] if k.endswith('pos_embed') else v for k,v in res.items()}

def test_counts(small, layouts):
    of = {n: p.numel() for n,p in small.named_parameters()}
    adapters = sum(v for n,v in of.items() if 'adapter' in n)
    assert (sum(of.values())-adapters, adapters)==(21_879_168, 1_006_860)
    frozen = [n for n,p in small.named_parameters() if not p.requires_grad]
    after = layouts['trainable_after_freeze']
    assert sum(of[n] for n in frozen)==after['frozen_parameters']
    theirs = {n.removeprefix('backbone.model.backbone.') for n in layouts['opentad_adatad']['state_dict'] if '.adapter.' in n}
    assert {n for n,p in small.named_parameters() if p.requires_grad}==theirs

CLASSIFIER = 4 # tensors of one, which a network without it does not use
@pytest.mark.parametrize('program,key,unused', [
    ('videomae_official_finetune', 'state_dict', CLASSIFIER), ('videomae_official_pretrain', 'state_dict', 218-158), ('mmaction2', 'state_dict', CLASSIFIER),
    ('hf_transformers', 'classification_state_dict_in_memory', CLASSIFIER), ('hf_transformers', 'hub_file_names', CLASSIFIER),
    ('hf_transformers', 'pretraining_state_dict', 250-182), ('opentad_adatad', 'state_dict', 499-158-108-1)])
def test_layouts(small, layouts, program, key, unused):
    held = zeros(layouts[program][key])
    found = small.load_reference(held)
    assert len(found)==unused and set(found)<=held.keys()
    # every tensor of the network is zero, and the adapters too where the file has them
    inside = [n for n,p in small.named_parameters() if p.any()]
    assert all('adapter' in n for n in inside)
    assert bool(small.met.missing)==(program!='opentad_adatad')
    if program=='opentad_adatad': assert not inside
    if program=='videomae_official_finetune': assert str(small.met).startswith('158 of 162 tensors of the file met 158 of the network; unused: fc_norm.weight')

def test_a_ladder_of_a_real_checkpoint(layouts):
    ladder = layouts['opentad_side_tuning']['ladder_state_dict']
    model = VideoMAE(**SIZES['S'], adapters=range(6, 12), side=True)
    network = {k: v for k,v in layouts['opentad_adatad']['state_dict'].items() if '.blocks.' in k and '.adapter.' not in k or 'patch_embed' in k}
    assert model.load_reference(zeros(network | ladder))==[]
    assert not any(p.any() for p in model.parameters()) and not model.met.missing
    # a ladder of fewer rungs is another model
    with pytest.raises(CheckpointError, match='lacks ladders.adapters.5'): model.load_reference(zeros({k: v for k,v in (network | ladder).items() if 'adapters.5' not in k}))

def test_heads_of_a_published_size_are_those_it_was_published_with(layouts):
    held = zeros(layouts['hf_transformers']['hub_file_names'])
    with pytest.raises(CheckpointError, match='trained with 6 heads, this model has 16.*set heads to 6'): VideoMAE(**(SIZES['S'] | dict(heads=16))).load_reference(held)
    assert network_size(held)['heads']==6

# ---------------------------------------------------------------- what holds in training
def step(model, frames):
    "Features and gradients of a step whose chances are drawn from one seed"
    torch.manual_seed(1)
    y = model(frames)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.device)
    grads = torch.autograd.grad((y.float()*weight).sum(), [p for p in model.parameters() if p.requires_grad])
    return y.detach(), grads

def test_chances_differ_by_chunk_and_stop_in_evaluation():
    model,frames = learned(VideoMAE(**TINY)),film(1, 16, 3, 8, 8).repeat(1, 24, 1, 1, 1)
    model.blocks[0].adapter = model.blocks[1].adapter = model.blocks[2].adapter = None
    chunks = model(frames).unflatten(2, (24, 8))
    assert len({tuple(chunks[0,:,i].flatten().tolist()) for i in range(24)})>3
    chunks = model.eval()(frames).unflatten(2, (24, 8))
    close(chunks, chunks[:,:,:1].expand_as(chunks))
    assert not any(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize('kind', [{}, dict(side=True), dict(adapters=[2]), dict(adapters=[0], temporal=False)], ids=str)
def test_half_precision_and_cuts_agree(kind):
    model,frames = learned(VideoMAE(**(TINY | kind))),film(2, 32, 3, 8, 12)
    full,grads = step(model, frames)
    assert full.isfinite().all() and all(g.any() for g in grads)
    with torch.autocast('cpu', torch.bfloat16):
        half,rough = step(model, frames)
        model.checkpointing,model.chunks_at_once = True,3
        again,cut = step(model, frames)
    assert (half-full).abs().max()<.05*full.abs().max()
    close(again, half); close(cut, rough)
    bare = model.to(torch.bfloat16).eval()(frames)
    assert bare.dtype==torch.bfloat16 and bare.isfinite().all()

def test_a_network_that_is_not_frozen_learns_everywhere():
    model = learned(VideoMAE(**TINY, frozen=False))
    torch.manual_seed(2)
    model(film(4, 32, 3, 8, 8)).square().sum().backward()
    # a bias in front of a softmax apart, nothing stays without a gradient
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(m.training for m in model.modules())

def test_checkpoints_hold_what_blocks_are_given():
    model,frames = VideoMAE(**(TINY | dict(depth=8))),film(1, 64, 3, 16, 16)
    for p in model.parameters(): p.grad = torch.zeros_like(p) if p.requires_grad else None
    held = {}
    for model.checkpointing,model.chunks_at_once in ((False, None), (True, None), (True, 1)):
        with Footprint() as count: model(frames).sum().backward()
        held[model.checkpointing, model.chunks_at_once] = count.peak
    tokens = 4*8*16*24*4 # bytes of the stream between two blocks
    assert held[True,None]<.4*held[False,None] and held[True,1]<.7*held[True,None]
    assert 8*tokens<held[True,1]<24*tokens

def test_frozen_blocks_before_the_first_adapter_keep_nothing():
    model = VideoMAE(**(TINY | dict(depth=8, adapters=[7])))
    with Footprint() as few: model(film(1, 64, 3, 16, 16))
    model = VideoMAE(**(TINY | dict(depth=8)))
    with Footprint() as every: kept = model(film(1, 64, 3, 16, 16))
    assert few.peak<.5*every.now and kept.requires_grad

# ---------------------------------------------------------------- a GPU that is not there
@pytest.mark.parametrize('kind', [dict(chunks_at_once=1), dict(checkpointing=True), dict(side=True), dict(frozen=False)], ids=str)
def test_on_a_gpu(on_cuda, kind):
    frames = film(2, 32, 3, 8, 12)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = learned(VideoMAE(**TINY, **kind))
        features,_ = step(model, frames)
        with on_cuda() as device:
            model,given = model.to('cuda'),frames.to('cuda')
            device.waits.clear()
            # drop path draws what it drew on the CPU
            torch.manual_seed(1)
            y = model(given)
            y.square().sum().backward()
            assert not device.total, device.listed()
            assert all(p.grad.is_cuda for p in model.parameters() if p.requires_grad)
            seen = y.detach().cpu()
    close(seen, features, atol=1e-4, rtol=1e-4)
