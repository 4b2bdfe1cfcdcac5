"What the image feature of a frame costs where nothing else is asked for, beside the whole last block"
from statistics import median
import torch
from bench._clock import cpu
from vadnb.models.clip import CLIP
from vadnb.models.clip_vision import last_block_input

FRAMES,ROUNDS = 4,7

def rows():
    "One row; both ways must give the same features"
    torch.manual_seed(0)
    model = CLIP('ViT-B-16').eval()
    frames = torch.randint(0, 256, (FRAMES, 3, 224, 224), dtype=torch.uint8)
    vision,project = model.clip.vision_model, model.clip.visual_projection
    def all_tokens():
        x = last_block_input(vision, model.normalise(frames))
        return project(vision.post_layernorm(vision.encoder.layers[-1](x, None)[:,0]))
    ways,seconds = {'class token': lambda: model.encode_frames(frames).image, 'all tokens': all_tokens}, {}
    with torch.no_grad():
        found = [f() for f in ways.values()]
        assert (found[0]-found[1]).abs().max()<1e-5, 'both must give the same features'
        for _ in range(ROUNDS):
            for k,f in ways.items(): seconds.setdefault(k, []).append(cpu(f)[0])
    a,b = (median(seconds[k]) for k in ways)
    yield dict(work=f'image features of {FRAMES} frames, ViT-B-16, the class token alone in the last block vs all tokens',
               ratio=a/b, limit=.95, detail=dict(class_token_s=round(a, 3), all_tokens_s=round(b, 3)))
