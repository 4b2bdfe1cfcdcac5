"Frames encoded in chunks: the gradient of the whole clip under checkpointed blocks, bf16, frozen parts, float input and two processes"
import os
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vadnb.models.clip import CLIP

encoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, projection_dim=16)
config = dict(projection_dim=16, vision_config=dict(encoder, image_size=32, patch_size=8), text_config=dict(encoder, vocab_size=50, bos_token_id=48, eos_token_id=49, pad_token_id=49))

def model(**kw):
    torch.manual_seed(0)
    return CLIP(dict(config, **kw)).train()

def inputs(n=11):
    g = torch.Generator().manual_seed(3)
    corner = torch.rand(6, 2, generator=g)*.4
    return dict(frames=torch.randint(0, 256, (n, 3, 40, 24), dtype=torch.uint8, generator=g), boxes=torch.cat([corner, corner+.5], 1), frame_of_box=torch.tensor([n-1, 0, 4, 4, 1, n-1]))

def gradients(m, chunk, loss=lambda out: sum((v.float()*torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in out if v is not None), **kw):
    m.zero_grad()
    out = m.encode_frames(**inputs() | kw, chunk=chunk)
    loss(out).backward()
    return out, {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}

def apart(a, b):
    assert a.keys()==b.keys()
    return max((a[k]-b[k]).abs().max() for k in a)/max(v.abs().max() for v in a.values())

@pytest.mark.parametrize('chunk', [1, 3, 4, 10, 11, 100])
@pytest.mark.parametrize('kw', [{}, dict(dense=True), dict(dense=True, dense_rows=torch.tensor([7, 2, 2])), dict(image=False, dense_rows=torch.tensor([], dtype=torch.long)), dict(head='visual', reference=True),
                                dict(boxes=None, frame_of_box=None)], ids=str)
def test_same_features_and_gradients(chunk, kw):
    m = model()
    (want, g), (got, h) = gradients(m, None, **kw), gradients(m, chunk, **kw)
    for a, b in zip(want, got):
        assert (a is None)==(b is None)
        if a is not None: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert apart(g, h)<1e-5

def test_inside_checkpointed_blocks():
    m = model()
    want = gradients(m, None)[1]
    m.checkpoint_gradients()
    assert apart(want, gradients(m, 4)[1])<1e-5

def test_frozen_vision_and_float_frames():
    m = model()
    m.clip.vision_model.requires_grad_(False)
    assert apart(gradients(m, None)[1], gradients(m, 4)[1])<1e-5
    m = model()
    grads = []
    for chunk in (None, 4):
        pixels = m.normalise(inputs()['frames']).requires_grad_()
        gradients(m, chunk, frames=pixels)
        grads.append(pixels.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)

def test_bf16_is_no_further_from_float32_than_the_whole_clip():
    m = model()
    exact = gradients(m, None)[1]
    with torch.autocast('cpu', torch.bfloat16): outs, grads = zip(*(gradients(m, chunk) for chunk in (None, 1)))
    for a, b in zip(*outs): assert a is b is None or a.dtype==b.dtype
    whole, chunked = (sum((g[k]-exact[k]).square().sum() for k in exact).sqrt() for g in grads)
    assert 0<chunked<1.1*whole

def test_dropout_is_repeated():
    m = model(vision_config=dict(config['vision_config'], attention_dropout=.5))
    torch.manual_seed(5)
    out = m.encode_frames(**inputs(), chunk=4)
    total = out.image.square().sum()
    total.backward()
    # the gradient along a parameter that scales the output belongs to the features that were returned, not to other draws
    w = m.clip.visual_projection.weight
    torch.testing.assert_close((w.grad*w).sum(), 2*total.detach(), atol=1e-3, rtol=1e-4)

def test_nothing_is_encoded_twice_without_gradients():
    m, runs = model(), []
    m.clip.vision_model.pre_layrnorm.register_forward_hook(lambda *a: runs.append(len(a[1][0])))
    with torch.no_grad(): out = m.encode_frames(**inputs(), dense=True, chunk=4)
    assert runs==[4, 4, 3] and not out.image.requires_grad
    runs.clear()
    gradients(m, 4)
    assert sorted(runs)==[3, 3, 4, 4, 4, 4]

def test_uint8_until_its_chunk():
    m, sizes = model(), []
    m.clip.vision_model.embeddings.patch_embedding.register_forward_pre_hook(lambda mod, args: sizes.append(tuple(args[0].shape)))
    with torch.no_grad(): m.encode_frames(**inputs(), chunk=4)
    assert {s[0] for s in sizes}=={4, 3}

class Step(nn.Module):
    "What a process does with its clips: features in chunks, one number per process"
    def __init__(self, clip): super().__init__(); self.clip = clip
    def forward(self, chunk, **batch):
        out = self.clip.encode_frames(**batch, chunk=chunk)
        return out.image.square().mean()+out.region.square().sum()/12

def half(rank):
    "Five or six of the eleven frames, with the boxes that lie in them"
    b = inputs(12)
    mine = (b['frame_of_box']>=6)==bool(rank)
    return dict(frames=b['frames'][6*rank:6*rank+6], boxes=b['boxes'][mine], frame_of_box=b['frame_of_box'][mine]-6*rank)

def worker(rank, port, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    results = {}
    for blocks in (False, True):
        m = model()
        if blocks: m.checkpoint_gradients()
        step = DistributedDataParallel(Step(m), find_unused_parameters=True)
        step(4, **half(rank)).backward()
        results[blocks] = {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}
    torch.save(results, f'{out}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes(two_processes):
    ranks = two_processes(worker)
    m = model()
    (sum(Step(m)(None, **half(rank)) for rank in (0, 1))/2).backward()
    want = {k: p.grad for k, p in m.named_parameters() if p.grad is not None}
    for blocks in (False, True):
        for got in ranks: assert apart(want, {k: v for k, v in got[blocks].items() if k in want})<1e-5
