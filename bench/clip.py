"What a frame's image feature costs beside the whole last block, and a training step of CLIP beside Hugging Face's own"
from statistics import median
import torch
from bench._clock import cpu
from transformers import CLIPModel
from vadnb.losses.contrastive import info_nce
from vadnb.models.aggregate import unit
from vadnb.models.clip import CLIP
from vadnb.models.clip_vision import last_block_input

FRAMES,ROUNDS = 4,7

def in_turns(ways, rounds=ROUNDS):
    "Median CPU-seconds of each way; the first round warms up"
    seconds = {k: [] for k in ways}
    for _ in range(rounds+1):
        for k,f in ways.items(): seconds[k].append(cpu(f)[0])
    return [median(v[1:]) for v in seconds.values()]

def class_token():
    "Both ways must give the same features"
    torch.manual_seed(0)
    model = CLIP('ViT-B-16').eval()
    frames = torch.randint(0, 256, (FRAMES, 3, 224, 224), dtype=torch.uint8)
    vision,project = model.clip.vision_model, model.clip.visual_projection
    def all_tokens():
        x = last_block_input(vision, model.normalise(frames))
        return project(vision.post_layernorm(vision.encoder.layers[-1](x, None)[:,0]))
    ways = {'class token': lambda: model.encode_frames(frames).image, 'all tokens': all_tokens}
    with torch.no_grad():
        found = [f() for f in ways.values()]
        assert (found[0]-found[1]).abs().max()<1e-5, 'both must give the same features'
        a,b = in_turns(ways)
    return dict(work=f'image features of {FRAMES} frames, ViT-B-16, the class token alone in the last block vs all tokens', ratio=a/b, limit=.95, detail=dict(class_token_s=round(a, 3), all_tokens_s=round(b, 3)))

PAIRS = 2 # images and captions of a step

def step():
    "Forward and backward of the global contrast: ours against `CLIPModel` with the same random weights, the same pixels and captions"
    torch.manual_seed(0)
    ours = CLIP('ViT-B-32', log_scale=2.6592).train()
    theirs = CLIPModel(ours.clip.config).train()
    # ours holds one beside parts of its own
    theirs.load_state_dict(ours.clip.state_dict())
    frames = torch.randint(0, 256, (PAIRS, 3, 224, 224), dtype=torch.uint8)
    ids = torch.full((PAIRS, 77), 49407); ids[:,0] = 49406; ids[:,1:20] = torch.randint(0, 49000, (PAIRS, 19))
    pixels = ours.normalise(frames)
    def own():
        ours.zero_grad(set_to_none=True)
        loss = info_nce(unit(ours.encode_frames(frames).image), unit(ours.encode_text(ids)), ours.logit_scale)
        loss.backward()
        return loss.item()
    def rival():
        theirs.zero_grad(set_to_none=True)
        loss = theirs(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        loss.backward()
        return loss.item()
    losses = own(), rival()
    assert abs(losses[0]-losses[1])<1e-3, f'both must give the same loss, found {losses}'
    a,b = in_turns(dict(own=own, rival=rival))
    return dict(work=f'forward and backward of {PAIRS} images and captions, ViT-B-32, vs the CLIPModel of transformers', ratio=a/b, limit=1.1, detail=dict(vadnb_s=round(a, 3), transformers_s=round(b, 3), loss=losses[0]))

def rows():
    "Features without gradients, and a step with them"
    yield class_token()
    yield step()

if __name__=='__main__':
    for row in rows(): print(row)
