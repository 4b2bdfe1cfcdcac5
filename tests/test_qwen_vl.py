"The positions of the release, Qwen2.5-VL behind them, and the row of one token"
import json, warnings
import pytest, torch
from safetensors.torch import load_file, save_file
from vadnb.core import CheckpointError, ConfigError, DataError, write_json
from vadnb.models.chat_tokens import ChatTokens
from vadnb.models.lora import LoraOptions
from vadnb.models.mrope import mrope_positions
from vadnb.models.qwen_batch import find_places, pooled
from vadnb.models.qwen_folder import read_tokenizer, tied
from vadnb.models.qwen_text import text_scores
from vadnb.models.qwen_vl import QwenVL
from vadnb.models.tiny_qwen import tiny_config, tiny_folder, tiny_qwen, tiny_tokenizer

@pytest.fixture(scope='module')
def golden(shared):
    path = shared/'golden'/'action_cls'
    return lambda name: (json.loads((path/f'{name}.json').read_text()), load_file(path/f'{name}.safetensors'))

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp('tiny')/'base')

def clips(qwen, counts=(2, 3), left=False, seed=0, answers=None):
    "Questions about clips of as many pairs of 56×56 pixels, of different length, with answers or ending at <ACTION>"
    g,chat = torch.Generator().manual_seed(seed),ChatTokens(qwen.tokenizer)
    rows = [chat('<video>'+'What? '*(i+1), [4*t], answer=answers and answers[i]) for i,t in enumerate(counts)]
    longest = max(len(i) for i,_ in rows)
    def padded(x, by): return [by]*(longest-len(x))+x if left else x+[by]*(longest-len(x))
    return dict(input_ids=torch.tensor([padded(i, 0) for i,_ in rows]), attention_mask=torch.tensor([padded([1]*len(i), 0) for i,_ in rows]),
                labels=torch.tensor([padded(l, -100) for _,l in rows]), second_per_grid=torch.tensor([.5*(i+1) for i in range(len(counts))]),
                video_grid_thw=torch.tensor([[t,4,4] for t in counts]), pixel_values_videos=torch.randn(16*sum(counts), 1176, generator=g))

# ---------------------------------------------------------------- positions
def test_positions_are_those_of_the_release(golden):
    meta,held = golden('mrope')
    words = {k: meta['config'][k] for k in ('vision_start_token_id', 'video_token_id', 'image_token_id')}
    for case in meta['cases']:
        def of(key): return held.get(f"{case['name']}/{key}")
        mask = of('attention_mask').bool()
        positions,delta = mrope_positions(of('input_ids'), of('attention_mask'), of('video_grid_thw'), of('image_grid_thw'),
                                          of('second_per_grid_ts'), tokens_per_second=case['tokens_per_second'], **words)
        assert positions.dtype==torch.int64 and positions.shape==(3, *mask.shape)
        assert torch.equal(positions[:,mask], of('position_ids')[:,mask]), case['name']
        assert torch.equal(delta, of('rope_deltas')), case['name']
        where = of('input_ids')==meta['config']['action_token_id']
        assert [r[w].tolist() for r,w in zip(positions[0], where)]==case['action_position'], case['name']

def test_above_two_frames_per_second_time_goes_on(shared):
    case = json.loads((shared/'cases'/'action_cls'/'case_01.json').read_text())
    given,expected = case['input'],case['expected']
    t,h,w = given['grids'][0]
    ids = torch.tensor([[1]*given['text_before']+[151652]+[151656]*(t*h*w//4)+[151653]])
    positions,_ = mrope_positions(ids, video_grid_thw=given['grids'], second_per_grid=given['second_per_grid'],
                                  tokens_per_second=given['tokens_per_second'])
    inside = positions[0,0][ids[0]==151656].reshape(t, -1)
    assert inside[:,0].tolist()==expected['temporal_ids_of_grid_rows'] and (inside==inside[:,:1]).all()
    assert int(positions[0,0,-1])==expected['next_text']

def test_positions_on_a_device_are_on_that_device(on_cuda):
    ids = torch.tensor([[1, 151652, 151656, 151653, 2]])
    host,_ = mrope_positions(ids, torch.ones_like(ids), torch.tensor([[1,2,2]]))
    with on_cuda():
        there,delta = mrope_positions(*(x.to('cuda') for x in (ids, torch.ones_like(ids), torch.tensor([[1,2,2]]))))
        assert there.is_cuda and delta.is_cuda
        assert torch.equal(there.cpu(), host)

# ---------------------------------------------------------------- the stored model
@pytest.fixture(scope='module')
def stored(golden, shared):
    meta,held = golden('tiny_model')
    return meta,held,QwenVL.from_folder(shared/'golden'/'action_cls'/'tiny_qwen')

def side(held, name):
    "A stored batch under the names of a batch"
    return {k: held[f'{name}/{k}'] for k in ('input_ids', 'attention_mask')} | {k: held[k] for k in ('pixel_values_videos', 'video_grid_thw')} | dict(second_per_grid=held['second_per_grid_ts'])

def sample(held, i, end=None):
    "One of the samples alone, without padding, perhaps cut behind <ACTION>"
    videos = held['videos_per_sample'].tolist()
    first,n = sum(videos[:i]),videos[i]
    sizes = held['video_grid_thw'].prod(1).tolist()
    ids = held['right/input_ids'][i][held['right/attention_mask'][i]==1]
    if end is not None: ids = ids[:int((ids==end).nonzero()[0])+1]
    return dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], video_grid_thw=held['video_grid_thw'][first:first+n],
                second_per_grid=held['second_per_grid_ts'][first:first+n], pixel_values_videos=held['pixel_values_videos'][sum(sizes[:first]):sum(sizes[:first+n])])

def test_the_stored_model_gives_the_stored_rows(stored):
    meta,held,qwen = stored
    assert qwen.action_token_id==meta['config']['action_token_id']
    close = dict(atol=meta['tolerances']['hidden_rows']['atol'], rtol=0)
    for name in ('right', 'left'):
        batch = side(held, name)
        torch.testing.assert_close(qwen.rows(batch), held[f'{name}/hidden_rows'], **close)
        torch.testing.assert_close(torch.cat(qwen.visual_tokens(batch)), held['video_embeds'], **close)
    qwen.zero_grad()
    (qwen.rows(side(held, 'right'))*held['cotangent']).sum().backward()
    torch.testing.assert_close(qwen.action_row.grad, held['grad_action_row'], atol=2e-4, rtol=1e-4)

def test_samples_alone_and_cut_behind_the_token_give_the_same(stored):
    meta,held,qwen = stored
    for i in range(len(held['videos_per_sample'])):
        for name,end in (('single', None), ('cut', qwen.action_token_id)):
            row = qwen.rows(sample(held, i, end))[0]
            torch.testing.assert_close(row, held[f'{name}/hidden_rows'][i], atol=5e-5, rtol=0)

def test_what_follows_the_token_cannot_reach_it(base):
    qwen = QwenVL.from_folder(base)
    rows = qwen.rows(clips(qwen))
    for left in (False, True):
        batch = clips(qwen, left=left, answers=['It is a dunk.', 'Somebody opens a door, and closes it.'])
        torch.testing.assert_close(qwen.rows(batch), rows, atol=2e-5, rtol=0)
        assert qwen(batch).text_loss>0
    assert qwen(clips(qwen)).text_loss is None

def test_the_row_of_the_token_is_in_the_embedding_nowhere_else(stored):
    "The frozen matrix stays as it was, and the parameter is what counts"
    _,held,qwen = stored
    matrix = qwen.model.get_input_embeddings().weight
    assert torch.equal(matrix[qwen.action_token_id], qwen.action_row) and not matrix.requires_grad
    before,rows = matrix.clone(),qwen.rows(side(held, 'right')).detach()
    with torch.no_grad(): qwen.action_row += 1
    try: assert (qwen.rows(side(held, 'right'))-rows).abs().amax(1).min()>.1 and torch.equal(matrix, before)
    finally:
        with torch.no_grad(): qwen.action_row -= 1

# ---------------------------------------------------------------- tokens and embedding
@pytest.fixture(scope='module')
def like_qwen(tmp_path_factory):
    "A folder whose tokenizer is described as the published ones are"
    folder = tiny_folder(tmp_path_factory.mktemp('qwen')/'base')
    tok = read_tokenizer(folder)
    listed = {str(i): dict(content=t.content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True) for i,t in tok.added_tokens_decoder.items()}
    write_json(folder/'tokenizer_config.json', dict(added_tokens_decoder=listed, additional_special_tokens=[t['content'] for t in listed.values()][1:], eos_token='<|im_end|>',
                                                    pad_token='<|endoftext|>', tokenizer_class='Qwen2Tokenizer', model_max_length=131072, chat_template='{{ messages }}'))
    write_json(folder/'preprocessor_config.json', dict(min_pixels=3136, max_pixels=12845056))
    return folder

def test_the_token_is_added_beside_the_special_ones(like_qwen, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        qwen = QwenVL.from_folder(like_qwen)
    before,now = read_tokenizer(like_qwen),qwen.tokenizer
    assert {*before.all_special_tokens}<={*now.all_special_tokens} and len(now)==len(before)+1
    assert now.eos_token=='<|im_end|>' and now.pad_token=='<|endoftext|>'
    for t in (*before.all_special_tokens, '<|video_pad|>', '<ACTION>'): assert len(now(t)['input_ids'])==1
    # written, it says the same, and what lay beside it is there
    qwen.save_merged(tmp_path/'merged')
    again = QwenVL.from_folder(tmp_path/'merged')
    assert again.action_token_id==qwen.action_token_id and {*again.tokenizer.all_special_tokens}=={*now.all_special_tokens}
    config = json.loads((tmp_path/'merged'/'tokenizer_config.json').read_text())
    assert config['tokenizer_class']=='Qwen2Tokenizer' and config['added_tokens_decoder']['264']['content']=='<ACTION>'
    assert (tmp_path/'merged'/'preprocessor_config.json').read_bytes()==(like_qwen/'preprocessor_config.json').read_bytes()

def test_the_embedding_is_never_shrunk(base):
    qwen = QwenVL.from_folder(base)
    assert len(qwen.tokenizer)==265 and qwen.model.get_input_embeddings().weight.shape[0]==288
    assert qwen.model.config.text_config.vocab_size==288

def test_the_embedding_grows_when_the_id_does_not_fit(shared, golden):
    case = json.loads((shared/'cases'/'action_cls'/'case_03.json').read_text())
    small = QwenVL.from_config(tiny_config(vocabulary=264), tiny_tokenizer())
    assert small.model.get_input_embeddings().weight.shape[0]>=265
    rows = case['input']['embedding_rows']
    tok = tiny_tokenizer(); tok.add_tokens(['<ACT>'], special_tokens=True)
    assert len(tok)==rows==case['input']['new_token_id']
    qwen = QwenVL.from_config(tiny_config(vocabulary=rows), tok)
    matrix,head = qwen.model.get_input_embeddings().weight,qwen.model.lm_head.weight
    assert qwen.action_token_id==case['input']['new_token_id'] and matrix.shape[0]>=case['expected']['rows_at_least']
    assert qwen.model.config.text_config.vocab_size==matrix.shape[0]==head.shape[0]
    assert tied(qwen.model) and not matrix.requires_grad
    torch.testing.assert_close(qwen.action_row.detach(), matrix[:rows].mean(0))
    batch = clips(qwen, answers=['A dunk.', 'A door.'])
    assert qwen(batch).text_loss.isfinite()

def test_a_token_that_was_trained_keeps_its_row(shared):
    folder = shared/'golden'/'action_cls'/'tiny_qwen'
    for start in ('mean', 'noise', 'an action'):
        qwen = QwenVL.from_folder(folder, action_start=start)
        assert torch.equal(qwen.action_row, qwen.model.get_input_embeddings().weight[264])
    other = QwenVL.from_folder(folder, action_token='<ACT>')
    assert other.action_token_id==265 and torch.allclose(other.action_row, other.model.get_input_embeddings().weight[:265].mean(0))

def test_a_merged_model_of_tied_words_reloads(shared, tmp_path):
    case = json.loads((shared/'cases'/'action_cls'/'case_04.json').read_text())
    folder = shared/'golden'/'action_cls'
    qwen = QwenVL.from_folder(folder/'tiny_qwen')
    qwen.load_adapter(folder/'lora_adapters'/'lora_token')
    qwen.save_merged(tmp_path/'merged')
    again = QwenVL.from_folder(tmp_path/'merged')
    batch = clips(qwen, answers=['A dunk.', 'A door.'])
    a,b = qwen(batch),again(batch)
    torch.testing.assert_close(a.rows, b.rows, atol=2e-4, rtol=0)
    torch.testing.assert_close(a.text_loss, b.text_loss, atol=1e-4, rtol=0)
    assert torch.equal(again.action_row, qwen.action_row)
    assert json.loads((tmp_path/'merged'/'config.json').read_text())['tie_word_embeddings'] is case['expected']['tie_word_embeddings']
    assert any(k.startswith('lm_head') for k in load_file(tmp_path/'merged'/'model.safetensors'))==case['expected']['lm_head_in_file']
    assert not [k for k in load_file(tmp_path/'merged'/'model.safetensors') if 'lora' in k]

# ---------------------------------------------------------------- folders
def test_nothing_is_asked_of_a_network(base, monkeypatch, capfd):
    import socket
    def refuse(*args, **kw): raise AssertionError('the network was asked')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    QwenVL.from_folder(base)
    with pytest.raises(CheckpointError, match='hf download Qwen/Qwen2.5-VL-3B-Nowhere'): QwenVL.from_folder('Qwen/Qwen2.5-VL-3B-Nowhere')
    said = capfd.readouterr()
    assert 'Loading' not in said.err+said.out

@pytest.mark.parametrize('kind', ('qwen3_vl', 'qwen2_5_omni', 'llava'))
def test_other_families_are_refused_by_name(base, tmp_path, kind):
    other = tmp_path/'other'; other.mkdir()
    for p in base.iterdir(): (other/p.name).write_bytes(p.read_bytes())
    write_json(other/'config.json', json.loads((base/'config.json').read_text())|dict(model_type=kind, auto_map=dict(AutoModel='code.Model')))
    with pytest.raises(CheckpointError, match=kind): QwenVL.from_folder(other)

def test_weights_that_are_missing_are_not_drawn(base, tmp_path):
    other = tmp_path/'other'; other.mkdir()
    for p in base.iterdir(): (other/p.name).write_bytes(p.read_bytes())
    tensors = load_file(base/'model.safetensors')
    lost = next(k for k in tensors if 'merger' in k)
    save_file({k: v for k,v in tensors.items() if k!=lost}, other/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(CheckpointError, match='1 missing tensors, such as model.visual.merger'): QwenVL.from_folder(other)
    save_file(tensors|dict(more=torch.zeros(1)), other/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(CheckpointError, match='1 unexpected tensors, such as more'): QwenVL.from_folder(other)

# ---------------------------------------------------------------- one pass
def test_qwen2_vl_counts_pairs_and_not_seconds():
    qwen = tiny_qwen(0, model_type='qwen2_vl')
    batch = clips(qwen)
    rows = qwen.rows(batch)
    assert torch.equal(qwen.rows(batch|dict(second_per_grid=torch.tensor([7., 9.]))), rows)
    times = find_places(qwen, batch).positions[0][batch['input_ids']==7]
    assert times.unique().diff().unique().tolist()==[1]
    other = clips(qwen); other['pixel_values_videos'][:16] += 1
    assert (qwen.rows(other)-rows).abs().amax(1)[0]>1e-3

def test_time_between_frames_is_heard(base):
    qwen = QwenVL.from_folder(base)
    batch = clips(qwen)
    assert (qwen.rows(batch)-qwen.rows(batch|dict(second_per_grid=torch.tensor([2., 1.])))).abs().amax(1)[0]>1e-4

def test_the_last_token_is_the_rightmost_that_counts(shared):
    case = json.loads((shared/'cases'/'action_cls'/'case_13.json').read_text())
    qwen = tiny_qwen(0)
    mask = torch.tensor(case['input']['attention_mask'])
    hidden = torch.tensor(case['input']['hidden'], dtype=torch.float)[...,None]
    for hidden,mask,wanted in ((hidden, mask, case['expected']['rows']), (hidden, mask.flip(1), [20, 30])):
        found = find_places(qwen, dict(input_ids=torch.full(mask.shape, 20), attention_mask=mask))
        assert pooled(hidden, found, 'last').flatten().tolist()==wanted

def test_visual_tokens_computed_before_give_the_same_bits(base):
    qwen = QwenVL.from_folder(base).adapt(LoraOptions(rank=4))
    batch = clips(qwen)
    tokens = qwen.visual_tokens(batch)
    def grads(b): qwen.zero_grad(); qwen.rows(b).square().sum().backward(); return [p.grad.clone() for ps in qwen.groups().values() for p in ps]
    without = {k: v for k,v in batch.items() if k!='pixel_values_videos'}
    for a,b in zip(grads(batch), grads(without|dict(visual_tokens=tokens))): assert torch.equal(a, b)
    assert not tokens[0].requires_grad
    with pytest.raises(DataError, match='belong to another model or size'): qwen.rows(without|dict(visual_tokens=tokens[:1]))

def test_a_trained_tower_gets_gradients_and_a_frozen_one_keeps_no_graph(base):
    qwen = QwenVL.from_folder(base)
    qwen.rows(clips(qwen)).sum().backward()
    assert {n for n,p in qwen.named_parameters() if p.grad is not None}=={'action_row'}
    qwen.unfreeze(vision=True, merger=True)
    qwen.rows(clips(qwen)).square().sum().backward()
    assert all(p.grad is not None for p in qwen.vision.parameters())
    with torch.no_grad(): assert not qwen.visual_tokens(clips(qwen))[0].requires_grad

@pytest.mark.parametrize('change,says', [
    (lambda b: b|{k: b[k][:1] for k in ('video_grid_thw', 'second_per_grid')}, 'have no grid'), (lambda b: b|dict(pixel_values_videos=b['pixel_values_videos'][1:]), 'rows, and the grids have'),
    (lambda b: b|dict(input_ids=b['input_ids'].masked_fill(b['input_ids']==264, 9)), 'has 0 action tokens'),
    (lambda b: b|dict(input_ids=torch.cat([b['input_ids'][:,:1]*0+264, b['input_ids'][:,1:]], 1)), 'has 2 action tokens; exactly one'),
    (lambda b: b|dict(second_per_grid=torch.ones(5)), 'second_per_grid: has 5 values'), (lambda b: b|dict(video_grid_thw=b['video_grid_thw']+torch.tensor([1,0,0])), 'must not be cut')])
def test_a_batch_that_does_not_fit_is_refused(base, change, says):
    qwen = QwenVL.from_folder(base)
    batch = clips(qwen)
    with pytest.raises(DataError, match=says): qwen.rows(change(batch))

def test_checkpointing_recomputes_blocks_and_changes_nothing(base):
    qwen = QwenVL.from_folder(base).adapt(LoraOptions(rank=4, dropout=.1)).train()
    ran = []
    # before it runs: recomputation stops at the last tensor that is needed, inside of it
    qwen.language.layers[0].mlp.register_forward_pre_hook(lambda *a: ran.append(1))
    def grads():
        torch.manual_seed(0); ran.clear(); qwen.zero_grad(); qwen.rows(clips(qwen)).square().sum().backward()
        return [p.grad.clone() for ps in qwen.groups().values() for p in ps],len(ran)
    (kept,once),_ = grads(),qwen.gradient_checkpointing()
    again,twice = grads()
    assert (once,twice)==(1, 2)
    for a,b in zip(kept, again): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

def test_class_names_are_weighed_together_as_one_by_one(base):
    qwen = QwenVL.from_folder(base)
    chat = ChatTokens(qwen.tokenizer)
    names = [chat.ids(n) for n in ('a dunk', 'x', 'opening a door')]
    ids = chat.prompt('<video>What? ', [8])
    batch = dict(input_ids=torch.tensor([ids]), video_grid_thw=torch.tensor([[2,4,4]]), second_per_grid=torch.ones(1), pixel_values_videos=torch.randn(32, 1176, generator=torch.Generator().manual_seed(0)))
    together = text_scores(qwen, batch, names)
    alone = torch.cat([text_scores(qwen, batch, [n]) for n in names], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.shape==(1, 3) and (together<0).all()

def test_on_a_gpu_it_is_the_same(base, on_cuda, monkeypatch):
    # a constant that transformers makes on the device itself asks for a driver before anybody can pretend one
    made = torch.tensor
    monkeypatch.setattr(torch, 'tensor', lambda *a, device=None, **kw: made(*a, **kw) if device is None else made(*a, **kw).to(device))
    qwen = QwenVL.from_folder(base).adapt(LoraOptions(rank=4, dora=True)).unfreeze(merger=True)
    batch = clips(qwen, answers=['A dunk.', 'A door.'])
    def values(qwen, batch):
        qwen.zero_grad()
        out = qwen(batch)
        (out.rows.square().sum()+out.text_loss).backward()
        return [x.detach().cpu() for x in (out.rows, out.text_loss, *[p.grad for ps in qwen.groups().values() for p in ps])]
    # fused attention of the CPU adds up in another order
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel(SDPBackend.MATH): here = values(qwen, batch)
    with on_cuda(), sdpa_kernel(SDPBackend.MATH):
        there = values(qwen.to('cuda'), {k: v.to('cuda') for k,v in batch.items()})
    for a,b in zip(here, there): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
