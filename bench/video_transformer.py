"What a frozen video transformer with adapters holds in memory: for the backward pass with checkpoints against without, in inference with a few chunks at a time against all at once"
import torch
from vadnb.models.footprint import Footprint
from vadnb.models.videomae import VideoMAE
from vadnb.models.videomae_weights import SIZES

SIDE,TRAINED,SHOWN,AT_ONCE = 64,4,48,8 # pixels; chunks of a training clip; chunks of a window, and how many at a time

def network(**kw):
    "S with an adapter in each of its 12 blocks, none of which is idle"
    torch.manual_seed(0)
    model = VideoMAE(**SIZES['S'], adapters='all', **kw)
    for block in model.blocks: torch.nn.init.normal_(block.adapter.up_proj.weight, std=.02)
    return model

def frames(chunks):
    "A clip of noise, uint8"
    return torch.randint(0, 256, (1, 16*chunks, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def training_row():
    model,clip,bytes_ = network(), frames(TRAINED), {}
    # gradients of the adapters are there before
    for p in model.parameters(): p.grad = torch.zeros_like(p) if p.requires_grad else None
    for model.checkpointing in (False, True):
        with Footprint() as held:
            features = model(clip)
            kept = held.now
            features.sum().backward()
        bytes_[model.checkpointing] = (kept, held.peak)
    (kept,_),(inputs,peak) = bytes_[False],bytes_[True]
    return dict(work='bytes held for the backward pass, S, 12 adapted blocks: checkpointed, the block that is run again included, against all kept',
                ratio=peak/kept, limit=.25, detail=dict(kept_mib=kept/2**20, inputs_of_blocks_mib=inputs/2**20, checkpointed_peak_mib=peak/2**20,
                chunks=TRAINED, pixels=SIDE))

@torch.no_grad()
def inference_row():
    model,clip,peaks,features = network().eval(), frames(SHOWN), {}, {}
    for model.chunks_at_once in (AT_ONCE, None):
        with Footprint() as held: features[model.chunks_at_once] = model(clip)
        peaks[model.chunks_at_once] = held.peak
    off = float((features[AT_ONCE]-features[None]).abs().max())
    if off>1e-5: raise RuntimeError(f'{AT_ONCE} chunks at a time give other features than {SHOWN}: they differ by {off:.1e}')
    return dict(work=f'peak of inference, S, attention and MLP {AT_ONCE} chunks at a time against {SHOWN} at once, features equal to 1e-5',
                ratio=peaks[AT_ONCE]/peaks[None], limit=.7, detail=dict(few_mib=peaks[AT_ONCE]/2**20, all_mib=peaks[None]/2**20,
                largest_difference=off, pixels=SIDE))

def rows():
    yield training_row()
    yield inference_row()

if __name__=='__main__':
    for row in rows(): print(row)
