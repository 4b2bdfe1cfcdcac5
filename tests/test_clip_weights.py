"Weights in every published layout give the model they came from; what a file lacks has a defined start; what cannot be read is refused in one sentence"
import json, math, warnings
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel
from vadnb.core import CheckpointError, ConfigError
from vadnb.models.clip import CLIP, stretch_positions

encoder = dict(hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, projection_dim=32)
config = dict(projection_dim=32, vision_config=dict(encoder, image_size=32, patch_size=8),
              text_config=dict(encoder, vocab_size=120, max_position_embeddings=77, bos_token_id=118, eos_token_id=119, pad_token_id=119))
turned = {'visual_projection.weight': 'visual.proj', 'text_projection.weight': 'text_projection'}
renamed = [('vision_model.embeddings.class_embedding', 'visual.class_embedding'), ('vision_model.embeddings.patch_embedding', 'visual.conv1'),
           ('vision_model.embeddings.position_embedding.weight', 'visual.positional_embedding'), ('vision_model.pre_layrnorm', 'visual.ln_pre'), ('vision_model.post_layernorm', 'visual.ln_post'),
           ('vision_model.encoder.layers', 'visual.transformer.resblocks'), ('text_model.encoder.layers', 'transformer.resblocks'), ('text_model.embeddings.token_embedding', 'token_embedding'),
           ('text_model.embeddings.position_embedding.weight', 'positional_embedding'), ('text_model.final_layer_norm', 'ln_final'), ('layer_norm1', 'ln_1'), ('layer_norm2', 'ln_2'),
           ('self_attn.out_proj', 'attn.out_proj'), ('mlp.fc1', 'mlp.c_fc'), ('mlp.fc2', 'mlp.c_proj')]

def openai(weights):
    "Hugging Face's names to OpenAI's, with the three numbers that OpenAI's files carry"
    res, weights = {turned[k]: v.T.contiguous() for k, v in weights.items() if k in turned}, {k: v for k, v in weights.items() if k not in turned}
    for k, v in weights.items():
        for a, b in renamed: k = k.replace(a, b)
        if '.q_proj.' in k:
            stem, kind = k.split('self_attn.q_proj.')
            res[f'{stem}attn.in_proj_{kind}'] = torch.cat([weights[name] for q in 'qkv' for name in weights if name.endswith(f'.{q}_proj.{kind}') and same_block(name, k)])
        elif not any(f'.{q}_proj.' in k for q in 'qkv'): res[k] = v
    return res | {'input_resolution': torch.tensor(32), 'context_length': torch.tensor(77), 'vocab_size': torch.tensor(120)}

def same_block(name, renamed_name):
    side = 'vision' if renamed_name.startswith('visual') else 'text'
    return name.startswith(f"{side}_model.encoder.layers.{renamed_name.split('resblocks.')[1].split('.')[0]}.")

def long_text(weights, long=True):
    g = torch.Generator().manual_seed(9)
    tables = {f'text_model.embeddings.position_embedding_{t}.weight': torch.randn(248, 256, generator=g)*.1 for t in ('ori', 'res')}
    return weights | tables | {'text_filip_projection.weight': torch.randn(32, 256, generator=g)*.1, 'logit_scale_finegraind': torch.tensor(2.5), 'logit_scale_hardneg': torch.tensor(3.5)}

@pytest.fixture(scope='module')
def source():
    "A transformers model, its weights, and inputs"
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**config)).eval().requires_grad_(False)
    ids = torch.randint(0, 118, (3, 77)); ids[:, 40:] = 119
    return model, {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 3, 32, 32), ids

def same(model, source):
    reference, _, pixels, ids = source
    model.eval().requires_grad_(False)
    torch.testing.assert_close(model.encode_frames(pixels).image, reference.get_image_features(pixels).pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(ids), reference.get_text_features(ids).pooler_output, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
@pytest.mark.parametrize('layout', ['huggingface', 'openai', 'long_text', 'ours'])
def test_layouts_on_disk(source, tmp_path, layout, kind):
    weights = {'huggingface': dict, 'openai': openai, 'long_text': long_text, 'ours': lambda w: {f'clip.{k}': v for k, v in w.items()} | {'roi_projection.weight': torch.ones(32, 256), 'region_logit_scale': torch.tensor(1.)}}[layout](source[1])
    path = tmp_path/f'w.{kind}'
    save_file(weights, path) if kind=='safetensors' else torch.save(weights, path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore' if layout in ('huggingface', 'ours') else 'error')
        model = CLIP.from_weights(path)
    same(model, source)
    assert set(model.unused_weights)=={'huggingface': set(), 'ours': set(), 'openai': {'input_resolution', 'context_length', 'vocab_size'},
                                       'long_text': set(weights)-set(source[1])-{'logit_scale_finegraind'}}[layout]
    own = layout=='ours'
    assert torch.equal(model.roi_projection.weight, torch.ones(32, 256) if own else source[1]['visual_projection.weight'])
    assert model.region_logit_scale.item()==pytest.approx({'long_text': 2.5, 'ours': 1.}.get(layout, source[1]['logit_scale'].item()))

def test_half_precision_and_a_training_checkpoint(source, tmp_path):
    weights = openai(source[1])
    torch.save({'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in weights.items()}, 'optimizer': {'state': {}}}, tmp_path/'epoch_3.pt')
    model = CLIP.from_weights(tmp_path/'epoch_3.pt', activation='quick_gelu')
    same(model, source)
    assert set(model.unused_weights)=={'module.input_resolution', 'module.context_length', 'module.vocab_size'}
    save_file({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path/'half.safetensors')
    half = CLIP.from_weights(tmp_path/'half.safetensors', long_text=True)
    assert {p.dtype for p in half.parameters()}=={torch.float32}
    torch.testing.assert_close(half.clip.visual_projection.weight, source[1]['visual_projection.weight'].half().float(), atol=0, rtol=0)

def test_open_clip_agrees(source, tmp_path):
    "The library whose layout it is, run on the same file; its own models have the exact GELU"
    pytest.importorskip('open_clip')
    from open_clip.model import CLIP as OpenCLIP
    for quick in (True, False):
        torch.manual_seed(1)
        theirs = OpenCLIP(32, dict(image_size=32, patch_size=8, width=256, layers=2, mlp_ratio=1.5), dict(context_length=77, vocab_size=120, width=256, heads=4, layers=2, mlp_ratio=1.5), quick_gelu=quick).eval()
        save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path/'open_clip_model.safetensors')
        (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=dict(embed_dim=32) | (dict(quick_gelu=True) if quick else {}))))
        ours = CLIP.from_weights(tmp_path).eval()
        assert ours.unused_weights==[] or ours.unused_weights==['attn_mask']
        _, _, pixels, ids = source
        with torch.no_grad():
            torch.testing.assert_close(ours.encode_frames(pixels).image, theirs.encode_image(pixels), atol=1e-5, rtol=1e-5)
            # open_clip reads a caption at its largest id, which is the end token's
            torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids), atol=1e-5, rtol=1e-5)

def test_long_captions_as_the_official_embedding_reads_them(source):
    "A text encoder with 248 positions, whose table is masked together from FG-CLIP's two"
    weights = long_text(source[1])
    model = CLIP(config, hard_negative=True, long_text=True).eval()
    assert model.load_reference(weights)==[]
    first = (torch.arange(248)<20).float()[:, None]
    ori, res = (weights[f'text_model.embeddings.position_embedding_{t}.weight'] for t in ('ori', 'res'))
    long = CLIPTextModel(CLIPConfig(**config | dict(text_config=config['text_config'] | dict(max_position_embeddings=248))).text_config).eval()
    stem = {k.removeprefix('text_model.'): v for k, v in weights.items() if k.startswith('text_model.') and 'position_embedding' not in k}
    stem['embeddings.position_embedding.weight'] = ori*first+res*(1-first)
    missing, unexpected = long.load_state_dict({k if k in long.state_dict() else f'text_model.{k}': v for k, v in stem.items()}, strict=False)
    assert not missing and not unexpected
    ids = torch.randint(0, 118, (2, 248)); ids[0, 200:] = 119; ids[1, -1] = 119
    with torch.no_grad():
        want = long(input_ids=ids).pooler_output @ weights['text_filip_projection.weight'].T
        torch.testing.assert_close(model.encode_text(ids, long=True), want, atol=1e-5, rtol=1e-5)
    assert [s.item() for s in model.scales().values()]==pytest.approx([source[1]['logit_scale'].item(), 2.5, 3.5])
    assert 'long_position_embedding.weight' in model.parts()['text'] and 'text_filip_projection.weight' in model.parts()['projections']

@pytest.fixture
def poisoned_memory():
    "Memory that nobody has written holds NaN, so that a parameter left as allocated shows"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)

@pytest.mark.parametrize('layout', [None, dict, openai, long_text])
def test_nothing_is_left_uninitialised(source, tmp_path, poisoned_memory, layout):
    "First trap of subclassing with `from_pretrained`: what the weights lack stays as allocated, or has a spread of 1"
    if layout is None: model = CLIP(config, hard_negative=True, long_text=True)
    else:
        save_file(layout(source[1]), tmp_path/'w.safetensors')
        model = CLIP.from_weights(tmp_path/'w.safetensors', activation='quick_gelu', hard_negative=True, long_text=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    assert len(named)>80
    for name, v in named: assert v.isfinite().all() and not v.is_meta, name
    for name, p in model.named_parameters():
        if name.endswith('_projection.weight'): assert .01<p.std()<.2, name
    assert all(0<s<=math.log(100)+1e-6 for s in model.scales().values())
    if layout in (dict, openai):
        w = source[1]
        torch.testing.assert_close(torch.stack([*model.scales().values()]), w['logit_scale'].expand(3), atol=1e-6, rtol=0)
        for mine, theirs in (('roi_projection.weight', w['visual_projection.weight']), ('text_filip_projection.weight', w['text_projection.weight']),
                             ('long_position_embedding.weight', stretch_positions(w['text_model.embeddings.position_embedding.weight']))):
            assert torch.equal(model.state_dict()[mine], theirs), mine

def test_nothing_is_left_on_the_meta_device(source, tmp_path):
    "Second trap: plain tensors and buffers outside the state dict; they have to move with the model and come back"
    save_file(source[1], tmp_path/'w.safetensors')
    model = CLIP.from_weights(tmp_path/'w.safetensors', activation='quick_gelu', long_text=True)
    stray = [(type(m).__name__, k) for m in model.modules() for k, v in vars(m).items() if isinstance(v, torch.Tensor)]
    assert stray==[]
    model = model.to(torch.float64)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()}=={torch.float64}
    frames = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert model.encode_frames(frames).image.dtype==torch.float64
    again = CLIP(config, long_text=True)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.float().eval().encode_frames(frames).image, model.float().eval().encode_frames(frames).image)

def test_a_torchscript_archive_is_refused_with_the_way_out(source, tmp_path, monkeypatch):
    class Holder(nn.Module):
        def forward(self, x): return x
    holder = Holder()
    for k, v in openai(source[1]).items(): holder.register_buffer(k.replace('.', '_'), v)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.script(holder), tmp_path/'ViT-B-32.pt')
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as e:
        warnings.simplefilter('error')
        CLIP.from_weights(tmp_path/'ViT-B-32.pt')
    said = str(e.value)
    assert f'{tmp_path}/ViT-B-32.pt: a TorchScript archive' in said and '\n' not in said
    # the line it gives is Python that works
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(said.split('safetensors: ')[1], dict(torch=torch, save_file=save_file))
    assert (tmp_path/'model.safetensors').is_file()

def test_refusals(source, tmp_path):
    weights = source[1]
    def refuse(w, error=CheckpointError, **kwargs):
        save_file(w, tmp_path/'w.safetensors')
        with pytest.raises(error) as e: CLIP.from_weights(tmp_path/'w.safetensors', activation='quick_gelu', **kwargs)
        assert '\n' not in str(e.value)
        if error is CheckpointError: assert f'{tmp_path}/w.safetensors: ' in str(e.value)
        return str(e.value)
    assert 'known layouts: huggingface' in refuse({'backbone.weight': torch.ones(1)})
    assert 'SigLIP' in refuse(weights | {'logit_bias': torch.ones(1)})
    assert 'ResNet' in refuse({'visual.layer1.0.conv1.weight': torch.ones(1), 'transformer.resblocks.0.ln_1.weight': torch.ones(1)})
    assert '(2 of 80 tensors)' in refuse({k: v for k, v in weights.items() if 'final_layer_norm' not in k})
    assert 'from which the architecture is read' in refuse({k: v for k, v in weights.items() if k!='visual_projection.weight'})
    assert 'post_layernorm.weight (1 of 80 tensors) has shape (7,), the model needs (256,)' in refuse(weights | {'vision_model.post_layernorm.weight': torch.ones(7)})
    assert 'lacks vision_model.encoder.layers.2.' in refuse(weights, size='tiny')
    assert "model size 'ViT-B32' is unknown" in refuse(weights, ConfigError, size='ViT-B32')
    with pytest.raises(ConfigError, match="activation: 'relu' is unknown"): CLIP.from_weights(tmp_path/'w.safetensors', activation='relu')
    with pytest.raises(CheckpointError, match='no such model folder or file'): CLIP.from_weights(tmp_path/'none')
    (tmp_path/'empty').mkdir()
    with pytest.raises(CheckpointError, match='holds no weights'): CLIP.from_weights(tmp_path/'empty')
