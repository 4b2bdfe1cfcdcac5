"The frozen backbone: families, the rewritten copy, weights that come and go"
import copy
import pytest, timm, torch
from torch import nn
from vadnb.core import CheckpointError
from vadnb.models.uniad import Backbone, conv_norm_pairs, rewrite

def trained(net, seed=0):
    "Batch norms as if they had seen data; a random network hides a wrong fold"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if not isinstance(m, nn.BatchNorm2d): continue
            for t,low,high in ((m.running_mean, -.5, .5), (m.running_var, .2, 2), (m.weight, .5, 1.5), (m.bias, -.5, .5)): t.copy_(torch.rand(t.shape, generator=g)*(high-low)+low)

def maps_of(backbone, x):
    with torch.no_grad(): maps = backbone.net(x)
    return [m.permute(0, 3, 1, 2) for m in maps] if getattr(backbone.net, 'output_fmt', 'NCHW')=='NHWC' else maps

# what the official code has for each backbone it names, for the maps of strides 2 (efficientnets only), 4, 8 and 16, and millions of parameters that are left
official = dict(efficientnet_b0=(16, 24, 40, 112), efficientnet_b1=(16, 24, 40, 112), efficientnet_b2=(16, 24, 48, 120), efficientnet_b3=(24, 32, 48, 136), efficientnet_b4=(24, 32, 56, 160), efficientnet_b5=(24, 40, 64, 176),
                efficientnet_b6=(32, 40, 72, 200), resnet18=(64, 128, 256), resnet34=(64, 128, 256), resnet50=(256, 512, 1024), resnet101=(256, 512, 1024), wide_resnet50_2=(256, 512, 1024))
official |= {f'tf_{k}': v for k,v in official.items() if k.startswith('eff')}

@pytest.mark.parametrize('name', official)
def test_official_backbones_are_cut_behind_stride_16(name):
    channels, kinds = official[name], ('layer4',) if 'resnet' in name else ('blocks.5', 'blocks.6', 'conv_head', 'bn2')
    # nothing is computed, so that the largest costs as little as the smallest
    with torch.device('meta'): res = Backbone(name, (2, 4, 8, 16)[-len(channels):])
    assert res.channels==channels and res.strides==(2, 4, 8, 16)[-len(channels):]
    assert not [k for k in res.net.state_dict() if k.startswith((*kinds, 'fc', 'classifier'))]
    assert [k for k in res.net.state_dict() if k.startswith(('layer3', 'blocks.4'))]

@pytest.mark.parametrize('name,strides,folds', [('tf_efficientnet_b0', (2, 4, 8, 16), 'all'), ('resnet18', (4, 8, 16), 'all'), ('mobilenetv3_large_100', (8, 16), 'all'), ('regnety_002', (4, 8, 16), 'all'),
    ('densenet121', (4, 8), 'some'), ('convnext_atto', (4, 8), 'none'), ('swin_tiny_patch4_window7_224', (4, 8), 'none')])
def test_the_rewritten_network_gives_timms_maps(name, strides, folds):
    torch.manual_seed(0)
    backbone = Backbone(name, strides)
    trained(backbone.net)
    (net, n), norms = backbone.running(), sum(isinstance(m, nn.BatchNorm2d) for m in backbone.net.modules())
    assert (n==norms>0) if folds=='all' else (0<n<norms) if folds=='some' else (n==norms==0 and net is backbone.net)
    for size in ((224, 224),) if 'swin' in name else ((96, 64), (65, 79)):
        x = torch.randn(2, 3, *size)
        for ours,theirs in zip(backbone(x), maps_of(backbone, x), strict=True): assert (ours-theirs).abs().max() <= 3e-5*theirs.abs().max() # timm's own are 1e-5 off in single precision

def test_every_used_part_runs():
    "What was cut off was all there was to cut"
    for name,strides in (('tf_efficientnet_b0', (2, 4, 8, 16)), ('mobilenetv3_large_100', (4, 8)), ('resnet18', (4, 8)), ('regnety_002', (8,)), ('convnext_atto', (4, 8, 16))):
        backbone, ran = Backbone(name, strides), set()
        for n,m in backbone.net.named_modules(): m.register_forward_hook(lambda m, a, o, n=n: ran.add(n))
        maps_of(backbone, torch.zeros(1, 3, 64, 64))
        assert [n for n,m in backbone.net.named_modules() if next(m.parameters(recurse=False), None) is not None and n not in ran]==[]

class Shared(nn.Module):
    "A convolution whose result is used before its norm, too, where no module shows it"
    def __init__(self): super().__init__(); self.conv,self.norm = nn.Conv2d(3, 3, 1),nn.BatchNorm2d(3)
    def forward(self, x): z = self.conv(x); return [self.norm(z)+z]

def test_a_wrong_fold_is_not_used():
    net, x = Shared().eval(), torch.randn(1, 3, 8, 8)
    trained(net)
    assert conv_norm_pairs(net, x)==[('conv', 'norm')]
    assert rewrite(net, x)==(None, 0)

@pytest.fixture
def b0():
    torch.manual_seed(0)
    res = Backbone('tf_efficientnet_b0')
    trained(res.net)
    return res

x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b, strict=True))

def test_a_checkpoint_brings_everything_back(b0):
    class Whole(nn.Module):
        def __init__(self, backbone): super().__init__(); self.backbone = backbone
    maps, digest = b0(x), b0.digest()
    state = copy.deepcopy(Whole(b0).state_dict())
    other = Whole(Backbone('tf_efficientnet_b0'))
    assert not same(other.backbone(x), maps) and other.backbone.digest()!=digest
    other.load_state_dict(state)
    assert same(other.backbone(x), maps) and other.backbone.digest()==digest
    for assign in (False, True):
        third = Whole(Backbone('tf_efficientnet_b0'))
        third.backbone(x)
        third.load_state_dict({k: v.clone() for k,v in state.items()}, assign=assign)
        assert same(third.backbone(x), maps)

def test_digest_sees_every_weight_and_nothing_else(b0):
    digest = b0.digest()
    b0(x)
    assert b0.digest()==digest==copy.deepcopy(b0).digest()
    b0.net.bn1.num_batches_tracked += 7
    assert b0.digest()==digest
    for k,v in list(b0.net.state_dict().items())[::40]:
        if k.endswith('num_batches_tracked'): continue
        kept = v.clone()
        v.view(-1)[0] += 1e-3
        assert b0.digest()!=digest, k
        v.copy_(kept)
    assert b0.digest()==digest

def test_changed_moved_and_copied_weights_run(b0):
    maps, twin = b0(x), copy.deepcopy(b0)
    assert same(twin(x), maps)
    twin.net.conv_stem.weight.mul_(2)
    assert not same(twin(x), maps) and same(b0(x), maps)
    # another type is timm's own network, as exact as that is
    double = copy.deepcopy(b0).double()
    assert double.running()[0] is double.net
    for p,q in zip(double(x.double()), maps): assert (p-q).abs().max() < 2e-5*p.abs().max()
    assert same(double.float()(x), maps) and double.running()[1]==33
    assert all(m.is_meta for m in b0.to('meta')(x.to('meta')))

def test_frozen_in_every_mode(b0):
    maps = b0(x)
    nn.Sequential(b0).train()
    assert not any(m.training for m in (*b0.modules(), *b0.running()[0].modules()))
    again = b0(x.clone().requires_grad_())
    assert same(again, maps) and not any(m.requires_grad for m in again) and not any(p.requires_grad for p in b0.parameters())
    # the copy is nobody's parameter
    assert [k for k,_ in b0.named_parameters()]==[f'net.{k}' for k,_ in b0.net.named_parameters()]
    with torch.inference_mode(): assert same(b0(x), maps)

def test_mixed_precision_does_not_reach_the_copy(b0):
    maps = b0(x)
    b0._apply(lambda t: t)
    with torch.autocast('cpu', torch.bfloat16): low = b0(x)
    assert b0.running()[1]==33 and low[0].dtype==torch.bfloat16 and same(b0(x), maps)

@pytest.mark.parametrize('name,strides', [('resnet18', (4, 8)), ('convnext_atto', (4, 8)), ('swin_tiny_patch4_window7_224', (4,)), ('vit_tiny_patch16_224', (16,)), ('densenet121', (4,))])
def test_weights_of_the_whole_network_are_found(name, strides):
    "Whatever timm does to names where it only gives maps"
    whole, backbone = timm.create_model(name, pretrained=False), Backbone(name, strides)
    unused = backbone.load(whole.state_dict())
    own = {v.data_ptr() for v in backbone.state_dict().values()}
    assert not own & {v.data_ptr() for v in whole.state_dict().values()}
    stored = whole.state_dict()
    assert len(stored)-len(unused)==len(backbone.state_dict())
    assert sorted(float(v.double().sum()) for v in backbone.state_dict().values())==sorted(float(v.double().sum()) for k,v in stored.items() if k not in set(unused))

def test_weights_that_do_not_fit_change_nothing(b0):
    digest, state = b0.digest(), timm.create_model('tf_efficientnet_b0').state_dict()
    for change,said in (({'conv_stem.weight': None}, r"1 tensors of 'tf_efficientnet_b0' are missing, conv_stem.weight"), ({'bn1.weight': torch.zeros(5)}, r"bn1.weight is \(5,\), .* needs \(32,\)"), ({'bn1.weight': state['bn1.weight']/0}, 'not finite')):
        with pytest.raises(CheckpointError, match=said): b0.load({k: v for k,v in {**state, **change}.items() if v is not None})
    with pytest.raises(CheckpointError, match='are missing'): b0.load({f'module.backbone.{k}': v for k,v in state.items()})
    assert b0.digest()==digest
