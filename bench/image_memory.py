"What a memory of good images costs beside the backbone that it looks through, and greedy k-centre beside a plain loop"
import timm, torch
from statistics import median
from vadnb.models.memory_head import greedy_centres
from vadnb.systems.registry import load_config
from bench._clock import cpu

BACKBONE,IMAGES,SIDE = 'tf_efficientnet_lite0',48,224
TOKENS,CHANNELS,SHARE = 60_000,152,.02 # of a class; of a token; that is kept

def in_turns(rounds, *work):
    "Median CPU-seconds of each, taken in turns; the first round warms up"
    return [median(t[1:]) for t in zip(*[[cpu(f)[0] for f in work] for _ in range(rounds+1)])]

def pictures(n, seed=0):
    "Smooth pictures, (n, 3, SIDE, SIDE) uint8"
    noise = torch.rand(n, 3, SIDE//16, SIDE//16, generator=torch.Generator().manual_seed(seed))*255
    return torch.nn.functional.interpolate(noise, (SIDE, SIDE), mode='bicubic').clamp(0, 255).to(torch.uint8)

def memory_rows(rounds=3):
    torch.manual_seed(0)
    cfg = load_config('uniad_memory', ['--model.backbone', BACKBONE, '--model.pretrained', 'false', '--train.device', 'cpu'])
    system = cfg.build(dict(classes=['cloth'])).eval()
    bare = timm.create_model(BACKBONE, features_only=True, pretrained=False, out_indices=(2, 3)).eval().requires_grad_(False)
    bare.blocks = bare.blocks[:len(system.backbone.net.blocks)]
    images,x = pictures(IMAGES),torch.randn(8, 3, SIDE, SIDE)
    batches = [dict(image=part, class_name=['cloth']*len(part)) for part in images.split(8)]
    @torch.no_grad()
    def alone(): bare(x)
    @torch.no_grad()
    def fill(): system.fill(iter(batches))
    fill()
    fit,looked,backbone = in_turns(rounds, fill, lambda: system.look(batches[0]), alone)
    common = dict(images=IMAGES, rows=len(system.head.tokens), threads=torch.get_num_threads(), backbone_ms=round(backbone/8*1e3, 1))
    yield dict(work=f'memory head: fit per training image against the backbone alone ({BACKBONE}, {SIDE} px)', ratio=fit/IMAGES/(backbone/8), limit=3, detail=dict(common, fit_ms=round(fit/IMAGES*1e3, 1)))
    yield dict(work='memory head: predict an image against the backbone alone', ratio=looked/backbone, limit=1.8, detail=dict(common, predict_ms=round(looked/8*1e3, 1)))

def plain_centres(tokens, count):
    "Each time the token farthest from all chosen, by distances over the full width"
    chosen,nearest = [0],torch.full((len(tokens),), float('inf'))
    while len(chosen)<count:
        nearest = torch.minimum(nearest, (tokens-tokens[chosen[-1]]).square().sum(1).sqrt())
        chosen.append(int(nearest.argmax()))
    return chosen

def centres_row(rounds=1):
    "A tenth of the loop stands for it: each of its steps costs the same"
    tokens,count = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)),round(SHARE*TOKENS)
    ours,theirs = in_turns(rounds, lambda: greedy_centres(tokens, count), lambda: plain_centres(tokens, count//10))
    return dict(work=f'greedy k-centre of {SHARE:.0%} of {TOKENS:,} tokens against a plain loop over full-width distances', ratio=ours/(10*theirs), limit=.25, detail=dict(vadnb_s=round(ours, 2), loop_s=round(10*theirs, 2), channels=CHANNELS))

def rows():
    yield from memory_rows()
    yield centres_row()

if __name__=='__main__':
    for row in rows(): print(row)
