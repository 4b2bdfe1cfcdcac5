"What image anomaly detection costs: a training step against the head as UniAD is published, one image against its bare backbone, an epoch from cached features against one from files"
import json, random, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
import numpy as np, timm, torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from vadnb.data.anomaly_images import AnomalyImages, collate
from vadnb.data.mvtec import read_tree
from vadnb.losses.reconstruction import FeatureMSELoss
from vadnb.models.uniad import MFCN, Backbone, UniAD
from vadnb.train.feature_cache import cached

BATCH,IMAGES,FILE_SIDE,SIDE = 8,16,512,224 # per step; of the epoch; pixels of a file and of what the model sees

class PublishedLayer(nn.Module):
    "Attention over each memory, then feed-forward, as DETR has it; with two memories the input is queries of its own"
    def __init__(self, width, tokens=0):
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 8, dropout=.1) for _ in range(2 if tokens else 1))
        self.queries = nn.Embedding(tokens, width) if tokens else None
        self.linear1,self.linear2,self.drop = nn.Linear(width, 1024),nn.Linear(1024, width),nn.Dropout(.1)
        self.norms,self.drops = (nn.ModuleList(make() for _ in range(len(self.attention)+1)) for make in (lambda: nn.LayerNorm(width), lambda: nn.Dropout(.1)))
    def forward(self, x, memories, pos, mask):
        if self.queries is not None: x = self.queries.weight[:,None].expand(-1, pos.shape[1], -1)
        for attention,memory,norm,drop in zip(self.attention, memories or [x], self.norms, self.drops):
            x = norm(x+drop(attention(x+pos, memory+pos, value=memory, attn_mask=mask)[0]))
        return self.norms[-1](x+self.drops[-1](self.linear2(self.drop(F.relu(self.linear1(x))))))

class PublishedHead(nn.Module):
    "The network of `UniAD()` from torch's parts, tokens in front of the batch, the mask rebuilt in every pass"
    def __init__(self, inplanes=272, side=14, width=256):
        super().__init__()
        self.side,self.first,self.last,self.norm = side,nn.Linear(inplanes, width),nn.Linear(width, inplanes),nn.LayerNorm(width)
        self.row,self.col = (nn.Embedding(side, width//2) for _ in range(2))
        self.encoder,self.decoder = (nn.ModuleList(PublishedLayer(width, n) for _ in range(4)) for n in (0, side*side))
    def mask(self):
        n = self.side
        seen = torch.ones(n, n, n, n)
        for y in range(n):
            for x in range(n): seen[y,x,max(y-3, 0):y+4,max(x-3, 0):x+4] = 0
        seen = seen.view(n*n, n*n)
        return seen.masked_fill(seen==0, float('-inf')).masked_fill(seen==1, 0.)
    def forward(self, align):
        (B,C,H,W),mask = align.shape,self.mask()
        tokens = align.flatten(2).permute(2, 0, 1)
        if self.training and random.random()<=1: tokens = tokens+torch.randn(tokens.shape)*(tokens.norm(dim=2, keepdim=True)/C)*20
        pos = torch.cat([self.col.weight[None].expand(H, -1, -1), self.row.weight[:,None].expand(-1, W, -1)], -1).flatten(0, 1)[:,None].expand(-1, B, -1)
        x = self.first(tokens)
        for layer in self.encoder: x = layer(x, None, pos, mask)
        out = x
        for layer in self.decoder: out = layer(None, [x, out], pos, mask)
        rec = self.last(self.norm(out)).permute(1, 2, 0).unflatten(-1, (H, W))
        pred = (rec-align).square().sum(1, keepdim=True).sqrt()
        return dict(feature_rec=rec, feature_align=align, pred=F.interpolate(pred, scale_factor=16, mode='bilinear', align_corners=True))

class Trainer:
    "A head with its optimizer: forward, backward, clipping, AdamW"
    def __init__(self, head): self.head,self.loss,self.optimizer = head.train(),FeatureMSELoss(),torch.optim.AdamW(head.parameters(), lr=1e-4, weight_decay=1e-4)
    def step(self, align):
        self.optimizer.zero_grad()
        self.loss(self.head(align)).backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), .1)
        self.optimizer.step()

class Seeing(nn.Module):
    "Backbone and neck with normalisation: uint8 images to aligned features"
    def __init__(self):
        super().__init__()
        self.backbone = Backbone('tf_efficientnet_b4')
        self.neck = MFCN(self.backbone.strides)
        self.mean,self.std = (255*torch.tensor(v)[:,None,None] for v in (self.backbone.mean, self.backbone.std))
    @torch.no_grad()
    def forward(self, images): return self.neck(self.backbone(images.float().sub_(self.mean).div_(self.std)))

def timed(f):
    start = time.perf_counter(); f()
    return time.perf_counter()-start

def in_turns(rounds, *work):
    "Median seconds of each, taken in turns, so that a busy moment hits all; the first round warms up"
    return [median(t[1:]) for t in zip(*[[timed(f) for f in work] for _ in range(rounds+1)])]

def ms(*seconds): return [round(s*1e3, 1) for s in seconds]

def training_row(rounds=7):
    torch.manual_seed(0); random.seed(0)
    ours,theirs,align = Trainer(UniAD()),Trainer(PublishedHead()),torch.randn(BATCH, 272, 14, 14)
    parameters = [sum(p.numel() for p in t.head.parameters()) for t in (ours, theirs)]
    if parameters[0]!=parameters[1]: raise RuntimeError(f'the heads are not one network: {parameters} parameters')
    a,b = in_turns(rounds, lambda: ours.step(align), lambda: theirs.step(align))
    return dict(work=f'training step of the head, batch {BATCH}, against its published form with nn.MultiheadAttention', ratio=a/b, limit=.85,
                detail=dict(zip(('vadnb_ms', 'published_ms'), ms(a, b)), parameters=parameters[0], threads=torch.get_num_threads(), rounds=rounds))

@torch.no_grad()
def inference(rounds=40):
    torch.manual_seed(0)
    see,head = Seeing(),UniAD().eval()
    bare = timm.create_model('tf_efficientnet_b4', features_only=True, pretrained=False, out_indices=(0,1,2,3)).eval().requires_grad_(False)
    bare.blocks = bare.blocks[:5]
    images = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    x,align = torch.randn(images.shape),see(images)
    whole,theirs,seeing,rebuilding = in_turns(rounds, lambda: head(see(images))['pred'], lambda: bare(x), lambda: see(images), lambda: head(align))
    return dict(work=f'anomaly map of one {SIDE}-px image from a b4 backbone, against the bare pruned backbone as timm builds it', ratio=whole/theirs, limit=1.1,
                detail=dict(zip(('vadnb_ms', 'bare_backbone_ms', 'our_backbone_and_neck_ms', 'head_and_map_ms'), ms(whole, theirs, seeing, rebuilding)), folded=see.backbone.running()[1], threads=torch.get_num_threads(), rounds=rounds))

def inference_row():
    "In a process of its own, as a prediction is: how much of its memory a process must first ask the system for depends on what it did before"
    done = subprocess.run([sys.executable, '-c', 'import json; from bench.uniad import inference; print(json.dumps(inference()))'], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'inference: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])

def write_images(folder):
    "One class of smooth, grainy pictures, as large on disk as photographs are"
    rng = np.random.default_rng(0)
    for split,n in (('train', IMAGES), ('test', 1)):
        (folder/'cloth'/split/'good').mkdir(parents=True)
        for i in range(n):
            smooth = Image.fromarray(rng.integers(40, 215, (32, 32, 3), dtype=np.uint8)).resize((FILE_SIDE, FILE_SIDE), Image.BICUBIC)
            Image.fromarray((np.asarray(smooth, np.float32)+rng.normal(0, 4, (FILE_SIDE, FILE_SIDE, 3))).clip(0, 255).astype(np.uint8)).save(folder/'cloth'/split/'good'/f'{i:03}.png')

def epoch_rows(rounds=5):
    torch.manual_seed(0)
    see,trainer = Seeing(),Trainer(UniAD())
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        data = AnomalyImages(read_tree(folder)['train'], folder, (SIDE, SIDE))
        kept = cached(data, see, 'bench', mode='memory', say=lambda text: None)
        def batches(source): return (collate([source[i] for i in range(k, k+BATCH)]) for k in range(0, IMAGES, BATCH))
        def read():
            for b in batches(kept): b['feature']
        def compute():
            for b in batches(data): see(b['image'])
        def epoch_read():
            for b in batches(kept): trainer.step(b['feature'])
        def epoch_computed():
            for b in batches(data): trainer.step(see(b['image']))
        if not all(torch.allclose(a['feature'], see(b['image']), atol=1e-4) for a,b in zip(batches(kept), batches(data))): raise RuntimeError('the cache holds other features than the encoder gives')
        a,b,c,d = in_turns(rounds, epoch_read, epoch_computed, read, compute)
    common = dict(images=IMAGES, file_px=FILE_SIDE, threads=torch.get_num_threads(), rounds=rounds)
    yield dict(work=f'epoch from cached features against decode, backbone and neck each time, {FILE_SIDE}-px files, default head', ratio=a/b, limit=1/8,
               detail=dict(zip(('cached_ms', 'computed_ms', 'of_it_reading_ms', 'of_it_decode_and_backbone_ms'), ms(a, b, c, d)), **common))
    yield dict(work='what the cache replaces: reading features against decode, backbone and neck', ratio=c/d, limit=1/8, detail=dict(zip(('reading_ms', 'computing_ms'), ms(c, d)), **common))

def rows():
    yield training_row()
    yield inference_row()
    yield from epoch_rows()

if __name__=='__main__':
    for row in rows(): print(row)
