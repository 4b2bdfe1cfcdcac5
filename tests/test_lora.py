"Adapters against peft's own: what they compute, what they count, what they write, and what goes wrong in silence elsewhere"
import json, shutil, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from vadnb.core import CheckpointError, ConfigError, write_atomic, write_json
from vadnb.models.lora import LoraOptions, adapter_parameters, inject, lora_layers, narrow_parameters, targets
from vadnb.models.qwen_vl import ROW, QwenVL
from vadnb.models.tiny_qwen import tiny_config, tiny_folder, tiny_tokenizer

@pytest.fixture(scope='module')
def golden(shared): return shared/'golden'/'action_cls'

@pytest.fixture(scope='module')
def stored(golden):
    "Values of lora_dora, and the batch that they were made of"
    given = load_file(golden/'tiny_model.safetensors')
    batch = {k: given[f'right/{k}'] for k in ('input_ids', 'attention_mask')} | {k: given[k] for k in ('pixel_values_videos', 'video_grid_thw')}
    return json.loads((golden/'lora_dora.json').read_text()), load_file(golden/'lora_dora.safetensors'), batch|dict(second_per_grid=given['second_per_grid_ts'])

ADAPTERS = 'lora','rslora','dora','dora_rslora','lora_token','dora_token'

@pytest.fixture(scope='module')
def adapted(golden):
    "Models with the stored adapters, each read once"
    held = {}
    def get(name):
        if name not in held:
            held[name] = QwenVL.from_folder(golden/'tiny_qwen')
            assert held[name].load_adapter(golden/'lora_adapters'/name)==[]
        return held[name]
    return get

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp('tiny')/'base')

def clip_batch(qwen, n=2, seed=0):
    "Questions about clips of random pixels"
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, 3, *[7]*8, 4, 40, qwen.action_token_id]]).expand(n, -1)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), video_grid_thw=torch.tensor([[2,4,4]]*n),
                second_per_grid=torch.ones(n), pixel_values_videos=torch.randn(n*32, 1176, generator=g))

def moved(qwen, seed=1, size=.1):
    "What trains, a little elsewhere"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name,ps in qwen.groups().items():
            for p in ps: p += size*torch.randn(p.shape, generator=g)*(p if name=='magnitude' else 1)
    return qwen

def written(qwen, folder):
    "What a checkpoint writes of it"
    folder.mkdir(exist_ok=True)
    save_file(qwen.adapter_part().state_dict(), folder/'adapter_model.safetensors')
    for name,v in qwen.files().items(): (write_atomic if isinstance(v, str) else write_json)(folder/name, v)
    return folder

# ---------------------------------------------------------------- stored values
@pytest.mark.parametrize('name', ADAPTERS)
def test_rows_and_gradients_are_those_of_peft(name, stored, adapted, golden):
    _,values,batch = stored
    qwen = adapted(name)
    rows = qwen.rows(batch)
    torch.testing.assert_close(rows, values[f'{name}/hidden_rows'], atol=2e-4, rtol=0)
    qwen.zero_grad()
    (rows*values['cotangent']).sum().backward()
    file = load_file(golden/'lora_adapters'/name/'adapter_model.safetensors')
    own = qwen.adapter_part().tensors
    assert {*file}=={*own}-({ROW} if 'token' not in name else set())
    grads = {n: qwen.action_row.grad[None] if n==ROW else p.grad for n,p in own.items()}
    for key in file: torch.testing.assert_close(grads[key], values[f'{name}/grad/{key}'], atol=2e-3, rtol=1e-3)

@pytest.mark.parametrize('name', ('lora', 'dora_rslora', 'dora_token'))
def test_merged_weights_are_those_of_peft(name, stored, adapted, tmp_path):
    _,values,batch = stored
    qwen = adapted(name)
    qwen.save_merged(tmp_path/'merged')
    merged = QwenVL.from_folder(tmp_path/'merged')
    own,wanted = dict(merged.model.named_parameters()),f'{name}/merged/'
    keys = [k for k in values if k.startswith(wanted)]
    assert keys
    for k in keys: torch.testing.assert_close(own[k.removeprefix(wanted)].detach(), values[k], atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.rows(batch), values[f'{name}/hidden_rows'], atol=2e-4, rtol=0)

def test_names_of_then_find_their_places(golden, stored, tmp_path):
    "peft of today reads this folder as nothing"
    _,values,batch = stored
    qwen = QwenVL.from_folder(golden/'tiny_qwen')
    assert qwen.load_adapter(golden/'lora_adapters'/'lora_legacy_keys')==[]
    torch.testing.assert_close(qwen.rows(batch), values['lora/hidden_rows'], atol=2e-4, rtol=0)
    assert (qwen.rows(batch)-values['base/hidden_rows']).abs().max()>1
    # saved again it has the names of today
    again = QwenVL.from_folder(golden/'tiny_qwen')
    again.load_adapter(written(qwen, tmp_path/'again'))
    torch.testing.assert_close(again.rows(batch), qwen.rows(batch), atol=1e-6, rtol=0)
    assert all('language_model' in k for k in qwen.adapter_part().tensors)

def test_an_expression_for_the_paths_of_then(golden, stored, tmp_path):
    _,values,batch = stored
    old = tmp_path/'old'; shutil.copytree(golden/'lora_adapters'/'lora_legacy_keys', old, copy_function=shutil.copyfile); old.chmod(0o755)
    config = json.loads((old/'adapter_config.json').read_text())
    write_json(old/'adapter_config.json', config|dict(target_modules=r'model\.layers\.\d+\..*_proj', exclude_modules=None))
    qwen = QwenVL.from_folder(golden/'tiny_qwen')
    qwen.load_adapter(old)
    torch.testing.assert_close(qwen.rows(batch), values['lora/hidden_rows'], atol=2e-4, rtol=0)

# ---------------------------------------------------------------- counts
def large():
    "The language model of the published 3B, without memory for it"
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[16,24,24]))
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14, temporal_patch_size=2,
                  spatial_merge_size=2, window_size=112, fullatt_block_indexes=[7,15,23,31], tokens_per_second=2, in_channels=3)
    with torch.device('meta'): return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True))

def test_what_trains_of_three_billion():
    counts = {}
    for dora in (False, True):
        model = large().requires_grad_(False)
        base = sum(p.numel() for p in model.parameters())
        with torch.device('meta'): inject(model, LoraOptions(rank=16, dora=dora))
        kinds = adapter_parameters(model)
        counts[dora] = sum(p.numel() for ps in kinds.values() for p in ps.values()), sum(p.numel() for p in kinds['magnitude'].values())
        assert base==3_754_622_976 and len(lora_layers(model))==36*7
        assert not [n for n,p in model.named_parameters() if p.requires_grad and 'lora_' not in n]
    assert counts=={False: (29_933_568, 0), True: (29_933_568+1_032_192, 1_032_192)}

# ---------------------------------------------------------------- precision and mode
@pytest.mark.parametrize('dora', (False, True))
def test_adapters_on_a_bf16_base_are_float32_and_begin_as_nothing(base, dora):
    plain = QwenVL.from_folder(base, dtype=torch.bfloat16)
    qwen = QwenVL.from_folder(base, dtype=torch.bfloat16).adapt(LoraOptions(rank=4, dora=dora))
    assert narrow_parameters(qwen)==[] and qwen.model.dtype==torch.bfloat16
    assert {p.dtype for ps in qwen.groups().values() for p in ps}=={torch.float32}
    batch = clip_batch(qwen)
    # peft's lengths in bf16 are off by one part in 256
    assert (qwen.rows(batch).float()-plain.rows(batch).float()).abs().max()<=(.05 if dora else 0)
    for layer in lora_layers(qwen.model).values():
        for m in getattr(layer, 'lora_magnitude_vector', {}).values():
            torch.testing.assert_close(m.weight.detach(), torch.linalg.norm(layer.base_layer.weight.float(), dim=1), rtol=1e-6, atol=0)

def test_small_steps_are_not_lost(base):
    "A rate of 5e-5 moves what trains, on a bf16 base as well"
    qwen = moved(QwenVL.from_folder(base, dtype=torch.bfloat16).adapt(LoraOptions(rank=4, dora=True)), size=1.)
    optimizer = torch.optim.AdamW([p for ps in qwen.groups().values() for p in ps], lr=5e-5, weight_decay=0)
    before = {n: p.detach().clone() for n,p in qwen.named_parameters() if p.requires_grad}
    qwen.rows(clip_batch(qwen)).float().square().sum().backward()
    optimizer.step()
    still = [n for n,p in qwen.named_parameters() if n in before and (p-before[n]).abs().max()<4e-5]
    assert still==[]

def test_reading_an_adapter_leaves_the_mode_as_it_was(base, tmp_path):
    options = LoraOptions(rank=4, dropout=.5, rslora=True)
    place = written(moved(QwenVL.from_folder(base).adapt(options)), tmp_path/'a')
    qwen = QwenVL.from_folder(base)
    qwen.load_adapter(place)
    assert not any(m.training for m in qwen.modules())
    batch = clip_batch(qwen)
    assert torch.equal(qwen.rows(batch), qwen.rows(batch))
    qwen.train()
    assert not torch.equal(qwen.rows(batch), qwen.rows(batch))
    training = QwenVL.from_folder(base).train()
    training.load_adapter(place)
    assert all(m.training for m in training.modules())
    assert qwen.options==training.options==options

def test_what_dora_with_dropout_costs_is_said(base):
    with pytest.warns(UserWarning, match='DoRA with dropout'): QwenVL.from_folder(base).adapt(LoraOptions(dora=True, dropout=.05))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        QwenVL.from_folder(base).adapt(LoraOptions(dora=True)); QwenVL.from_folder(base).adapt(LoraOptions(dropout=.05))

def test_groups_are_sorted_by_name_and_each_parameter_is_in_one(base):
    qwen = QwenVL.from_folder(base).adapt(LoraOptions(dora=True, targets=targets('language'))).unfreeze(vision=True, merger=True)
    groups = qwen.groups()
    assert {*groups}=={'lora_a', 'lora_b', 'magnitude', 'token', 'vision', 'merger'}
    members = [id(p) for ps in groups.values() for p in ps]
    assert sorted(members)==sorted(id(p) for p in qwen.parameters() if p.requires_grad)
    names = {id(p): n for n,p in qwen.named_parameters()}
    assert all('.lora_B.' in names[id(p)] for p in groups['lora_b'])
    assert all(p.ndim==1 for p in groups['magnitude'])

def test_vision_tower_gets_no_adapters_unless_it_is_named(base):
    for parts,n in ((('language',), 14), (('merger',), 2), (('vision',), 10), (('language', 'vision', 'merger'), 26)):
        qwen = QwenVL.from_folder(base).adapt(LoraOptions(targets=targets(*parts)))
        assert len(lora_layers(qwen.model))==n
        assert {('visual' in k) for k in lora_layers(qwen.model)}==({False} if parts==('language',) else {True} if 'language' not in parts else {True, False})
    old = QwenVL.from_config(tiny_config(model_type='qwen2_vl'), tiny_tokenizer()).adapt(LoraOptions(targets=targets('vision', 'merger')))
    assert len(lora_layers(old.model))==2*4+2

# ---------------------------------------------------------------- files
@pytest.mark.parametrize('options', (LoraOptions(rank=4, rslora=True), LoraOptions(rank=4, dora=True), None))
def test_plain_peft_reads_what_is_written(base, tmp_path, options):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    qwen = QwenVL.from_folder(base)
    moved(qwen.adapt(options) if options else qwen)
    place = written(qwen, tmp_path/'checkpoint')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        # without adapters peft wants the row of a tied lm_head as well, which reads no row here
        if options is None:
            for says in ('Model has `tie_word_embeddings=True`', r"Found missing adapter keys .*: \['base_model.model.lm_head.trainable_tokens_delta.default'\]"):
                warnings.filterwarnings('ignore', says)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, local_files_only=True)
        theirs = PeftModel.from_pretrained(model, place).eval()
    batch = clip_batch(qwen)
    from vadnb.models.qwen_batch import find_places
    hidden = theirs.base_model.model.model(input_ids=batch['input_ids'], pixel_values_videos=batch['pixel_values_videos'], attention_mask=batch['attention_mask'],
                                           video_grid_thw=batch['video_grid_thw'], position_ids=find_places(qwen, batch).positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden[:,-1], qwen.rows(batch), atol=2e-5, rtol=0)
    assert (qwen.rows(batch)-QwenVL.from_folder(base).rows(batch)).abs().max()>.1

def test_what_peft_writes_is_read(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, local_files_only=True)
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=targets('language'), trainable_token_indices={'embed_tokens': [264]}))
    with torch.no_grad():
        for n,p in theirs.named_parameters():
            if p.requires_grad: p += .1*torch.randn_like(p)
    theirs.save_pretrained(tmp_path/'theirs')
    qwen = QwenVL.from_folder(base)
    assert qwen.load_adapter(tmp_path/'theirs')==[]
    own = {k: v for k,v in qwen.adapter_part().state_dict().items()}
    file = load_file(tmp_path/'theirs'/'adapter_model.safetensors')
    assert {*own}=={*file} and all(torch.equal(own[k], file[k]) for k in own)

def test_own_row_and_tokens_of_peft_have_the_same_gradients(base):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration
    from vadnb.models.qwen_batch import find_places
    qwen = QwenVL.from_folder(base).adapt(LoraOptions(rank=4))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, local_files_only=True)
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets('language'), trainable_token_indices={'embed_tokens': [264]})).eval()
    names = {n.removeprefix('base_model.model.'): p for n,p in theirs.named_parameters() if p.requires_grad}
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n,p in qwen.model.named_parameters():
            if 'lora_' in n: p.copy_(.1*torch.randn(p.shape, generator=g)); names[n].copy_(p)
        delta = next(p for n,p in names.items() if 'trainable_tokens_delta' in n)
        delta.copy_(qwen.action_row[None])
    batch = clip_batch(qwen)
    qwen.rows(batch).square().sum().backward()
    hidden = theirs.base_model.model.model(input_ids=batch['input_ids'], pixel_values_videos=batch['pixel_values_videos'], attention_mask=batch['attention_mask'],
                                           video_grid_thw=batch['video_grid_thw'], position_ids=find_places(qwen, batch).positions, use_cache=False).last_hidden_state
    hidden[:,-1].square().sum().backward()
    torch.testing.assert_close(qwen.action_row.grad, delta.grad[0], rtol=1e-4, atol=1e-5)
    for n,p in qwen.model.named_parameters():
        if 'lora_' in n: torch.testing.assert_close(p.grad, names[n].grad, rtol=1e-4, atol=1e-5)

def test_a_tensor_without_a_place_and_a_place_without_a_tensor(base, tmp_path):
    place = written(moved(QwenVL.from_folder(base).adapt(LoraOptions(rank=4))), tmp_path/'a')
    file = place/'adapter_model.safetensors'
    tensors = load_file(file)
    first = next(k for k in tensors if 'lora_B' in k)
    for held,says in (({k: v for k,v in tensors.items() if k!=first}, f'places without a tensor: 1 ({first})'),
                      (tensors|{'base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight': tensors[first].clone()}, 'tensors without a place: 1 (base'),
                      (tensors|{first: tensors[first][:,:2]}, 'tensors of other shapes: 1')):
        save_file({k: v.contiguous() for k,v in held.items()}, file)
        with pytest.raises(CheckpointError) as e: QwenVL.from_folder(base).load_adapter(place)
        assert says in str(e.value) and str(file) in str(e.value)

def test_embeddings_that_others_saved_hold_the_row(base, tmp_path):
    "LLaMA-Factory resizes the embedding and saves all of it; the row is there, the rest is told"
    qwen = moved(QwenVL.from_folder(base).adapt(LoraOptions(rank=4)))
    place = written(qwen, tmp_path/'a')
    tensors = load_file(place/'adapter_model.safetensors')
    whole = torch.randn(320, 64); whole[264] = tensors.pop(ROW)[0]
    save_file(tensors|{'base_model.model.model.embed_tokens.weight': whole, 'base_model.model.lm_head.weight': whole.clone()}, place/'adapter_model.safetensors')
    write_json(place/'adapter_config.json', qwen.files()['adapter_config.json']|dict(trainable_token_indices=None))
    with pytest.raises(CheckpointError, match='lm_head'): QwenVL.from_folder(base).load_adapter(place)
    other = QwenVL.from_folder(base)
    assert other.load_adapter(place, strict=False)==['base_model.model.lm_head.weight']
    assert torch.equal(other.rows(clip_batch(qwen)), qwen.rows(clip_batch(qwen)))

@pytest.mark.parametrize('change,says', [
    (dict(peft_type='IA3'), 'peft_type'), (dict(use_qalora=True), 'use_qalora'), (dict(modules_to_save=['lm_head']), 'modules_to_save'),
    (dict(target_modules='.*nothing'), 'fits none of the model'), (dict(r=0), "'r' is missing"), (dict(lora_alpha=None), "'lora_alpha' is missing"),
    (dict(trainable_token_indices={'embed_tokens': [3]}), 'the action token is 264'), (dict(layers_to_transform=[0]), 'layers_to_transform')])
def test_configurations_that_mean_something_else_are_refused(base, tmp_path, change, says):
    place = written(QwenVL.from_folder(base).adapt(LoraOptions(rank=4)), tmp_path/'a')
    write_json(place/'adapter_config.json', json.loads((place/'adapter_config.json').read_text())|change)
    with pytest.raises(CheckpointError) as e: QwenVL.from_folder(base).load_adapter(place)
    assert says in str(e.value) and 'adapter_config.json' in str(e.value)

def test_an_adapter_of_another_width_is_refused(base, tmp_path):
    place = written(QwenVL.from_folder(base).adapt(LoraOptions(rank=4)), tmp_path/'a')
    narrow = QwenVL.from_config(tiny_config(hidden=32), tiny_tokenizer())
    with pytest.raises(CheckpointError, match='64 values, the model is 32 wide'): narrow.load_adapter(place)
    for other in (dict(rank=8), dict(rank=4, alpha=1.), dict(rank=4, dora=True)):
        with pytest.raises(CheckpointError, match='was trained with'): QwenVL.from_folder(base).adapt(LoraOptions(**other)).load_adapter(place)

def test_adapters_beside_what_trains_are_refused(base):
    with pytest.raises(ConfigError, match='trains already'): QwenVL.from_folder(base).unfreeze(merger=True).adapt(LoraOptions(targets=targets('merger')))
    with pytest.raises(ConfigError, match='has adapters already'): QwenVL.from_folder(base).adapt(LoraOptions()).adapt(LoraOptions())
