"Backbones of uniad beyond the official ones, its optimizer groups, and what it takes from the official code: configuration, losses, checkpoints"
import json, re
from pathlib import Path
import pytest, timm, torch
from command import vadnb
from test_uniad_golden import layout, official
from test_uniad_system import config, few_pictures, refuse, train, words, world
from vadnb.config import config_keys
from vadnb.core import CheckpointError, read_json
from vadnb.models.uniad import Backbone
from vadnb.switches import unread_settings
from vadnb.systems.registry import config_class, load_config, load_run

VIT = ['--model.backbone', 'vit_small_patch14_dinov2', '--model.layers', '[2,5]', '--model.outstride', '14', '--model.neighbor_size', '[3,3]']

@pytest.mark.parametrize('side,grid', [(224, 16), (448, 32)])
def test_dinov2_at_any_size(world, tmp_path, side, grid):
    cfg = config(world, tmp_path, 'run', *VIT, '--data.size', f'[{side},{side}]')
    assert list(unread_settings(cfg))==['model.strides'] # the demo's, which blocks take the place of
    torch.manual_seed(0)
    system = cfg.build().eval()
    x = torch.randint(0, 255, (1, 3, side, side), dtype=torch.uint8)
    assert tuple(system.look(dict(image=x))['distance'].shape)==(1, grid, grid) and system.backbone.strides==(14, 14)
    # the chosen blocks are timm's: the same weights in a whole network of this size
    whole = timm.create_model('vit_small_patch14_dinov2', pretrained=False, img_size=side).eval()
    held = {k.removeprefix('model.'): v for k,v in system.backbone.net.state_dict().items()}
    assert not whole.load_state_dict(held, strict=False).unexpected_keys
    pixels = (x.float()-system.mean)/system.std
    with torch.no_grad(): expected = whole.get_intermediate_layers(pixels, n=[2, 5], reshape=True)
    for ours,theirs in zip(system.backbone(pixels), expected, strict=True): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

def test_weights_of_another_size_are_fitted():
    whole = timm.create_model('vit_tiny_patch16_224', pretrained=False)
    ours = Backbone('vit_tiny_patch16_224', (16,), layers=[3], size=(64, 96))
    assert not [k for k in ours.load(whole.state_dict()) if k=='pos_embed']
    assert ours.net.model.pos_embed.shape==(1, 1+4*6, 192)
    assert ours(torch.zeros(1, 3, 64, 96))[0].shape==(1, 192, 4, 6)

def test_swin_at_another_size():
    ours = Backbone('swin_tiny_patch4_window7_224', (8, 16), size=(256, 192))
    assert [tuple(m.shape) for m in ours(torch.zeros(1, 3, 256, 192))]==[(1, 192, 32, 24), (1, 384, 16, 12)]

@pytest.mark.parametrize('more,says', [(['--model.layers', '[2,40]'], 'has no layer 40; it has 0 to 11'), (['--model.layers', '[5,2]'], "'model.layers' must be null or rising"), (['--data.size', '[230,224]'], "'data.size': height 230 is not a multiple of the stride 14"),
    (['--model.layers', 'null', '--model.strides', '[4]'], "has no map of stride 4; it has 14; model.layers chooses")])
def test_one_line_for_maps_that_are_not_there(world, tmp_path, more, says):
    assert says in refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'run'), *VIT, '--data.size', '[224,224]', *more)

# ---------------------------------------------------------------- the guide's words

def test_losses_in_the_official_form(world, tmp_path):
    rows = [dict(name='a', type='FeatureMSELoss', kwargs=dict(weight=1.)), dict(name='b', type='L1Loss', kwargs=dict(weight=.5))]
    learner = train(world, tmp_path, 'run', '--loss.criterion', json.dumps(rows), '--train.steps', '1')
    assert learner.cfg.loss.criterion==rows and learner.system.criterion.names==['a', 'b']
    # the stored configuration builds it again
    assert load_run(tmp_path/'run', 'last')[0].criterion.names==['a', 'b']
    assert "did you mean 'L1Loss'" in refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'x'), '--loss.criterion', json.dumps([dict(type='L1Los')]))

def test_the_guides_configuration_is_converted(tmp_path):
    source = (tmp_path/'exp'/'config.yaml'); source.parent.mkdir()
    source.write_text('''version: v1.0.0
random_seed: 133
port: 11111
dataset:
  type: custom
  batch_size: 8
  workers: 4
  input_size: [224, 224]
  pixel_mean: [0.485, 0.456, 0.406]
  pixel_std: [0.229, 0.224, 0.225]
  train: {meta_file: ../data/train.json}
  test: {meta_file: ../data/test.json}
criterion:
  - {name: FeatureMSELoss, type: FeatureMSELoss, kwargs: {weight: 1.0}}
trainer:
  max_epoch: 1000
  clip_max_norm: 0.1
  val_freq_epoch: 10
  print_freq_step: 1
  tb_freq_step: 1
  optimizer: {type: AdamW, kwargs: {lr: 0.0001, betas: [0.9, 0.999], weight_decay: 0.0001}}
  lr_scheduler: {type: StepLR, kwargs: {step_size: 800, gamma: 0.1}}
saver: {auto_resume: False, always_save: False, save_dir: checkpoints/, log_dir: log/}
net:
  - {name: backbone, type: models.backbones.efficientnet_b4, frozen: True, kwargs: {pretrained: True, outlayers: [1, 2, 3, 4]}}
  - {name: neck, prev: backbone, type: models.necks.MFCN, kwargs: {outstrides: [16]}}
  - {name: reconstruction, prev: neck, type: models.reconstructions.UniAD, kwargs: {hidden_dim: 256, nhead: 8, num_encoder_layers: 4, num_decoder_layers: 4}}
''')
    code,out,err = vadnb('convert', 'uniad-yaml', source, tmp_path/'ours.yaml')
    assert code==0 and "'saver.save_dir' checkpoints/" in out, err
    ours,shipped = load_config(tmp_path/'ours.yaml'), load_config('uniad_mvtec')
    assert ours.optim==shipped.optim and ours.data.size==[224, 224] and ours.data.protocol=='paper' and ours.data.train==str(tmp_path/'data'/'train.json')
    kept = dict(backbone=shipped.model.backbone)
    assert vars(ours.model) | kept==vars(shipped.model) and ours.model.backbone=='tf_efficientnet_b4'
    same = ('batch_size', 'epochs', 'drop_last', 'evaluate_every', 'save_every', 'unit', 'workers')
    assert [getattr(ours.train, k) for k in same]==[getattr(shipped.train, k) for k in same]
    source.write_text(source.read_text().replace('nhead: 8', 'heads: 8').replace('clip_max_norm', 'clip_norm'))
    said = refuse('convert', 'uniad-yaml', source, tmp_path/'other.yaml')
    assert 'trainer.clip_norm, net[2].kwargs.heads are not understood' in said and not (tmp_path/'other.yaml').exists()

def test_a_checkpoint_of_another_network_is_refused_by_its_keys(layout, world, tmp_path):
    "Heads, window and activation are in no tensor: all shapes fit"
    net = json.loads(json.dumps(layout['config']['net']))
    net[2]['kwargs'] |= dict(nhead=4, activation='gelu', neighbor_mask=dict(neighbor_size=[9, 9], mask=[True, True, False]))
    changed = dict(layout, config=dict(layout['config'], net=net))
    state = official(changed, tmp_path/'ckpt.pth.tar')
    cfg = load_config('uniad_mvtec', ['--data_root', str(world), '--model.pretrained', 'false', '--model.weights', str(tmp_path/'ckpt.pth.tar')])
    system = cfg.build()
    before = {k: v.clone() for k,v in system.head.state_dict().items()}
    with pytest.raises(CheckpointError) as told: system.start(True)
    said = str(told.value)
    for key in ("'model.nhead' is 8, there 4", "'model.activation' is relu, there 'gelu'", "'model.neighbor_size' is [7, 7], there [9, 9]", "'model.neighbor_masks' is [True, True, True], there [True, True, False]"): assert key in said
    assert '\n' not in said and all(torch.equal(v, before[k]) for k,v in system.head.state_dict().items())
    official(layout, tmp_path/'ckpt.pth.tar'); system.start(True)
    assert not torch.equal(system.head.state_dict()['input_proj.weight'], before['input_proj.weight'])

def test_the_flags_of_fgclip_have_keys_that_exist():
    text = (Path(__file__).parent.parent/'README.md').read_text(encoding='utf-8')
    rows = [r.split('|')[2] for r in text.split("| FG-CLIP's flag |")[1].split('\n\n')[0].splitlines()[2:]]
    named = {k for r in rows for k in re.findall(r'`([a-z_.]+)`', r)}
    assert len(rows)>=20 and not named-{*config_keys(config_class('fgclip'))}

# ---------------------------------------------------------------- groups

def test_the_backbone_trains_at_a_factor_of_the_rate(world, tmp_path, capsys):
    more = ['--model.backbone_lr', '0.1', '--data.cache', 'auto', '--train.ema', '0.9']
    learner = train(world, tmp_path, 'run', *more, '--train.progress', 'true')
    assert 'feature cache: off, because the backbone is trained (model.backbone_lr)' in capsys.readouterr().err
    rates = {g['name']: g['peak'] for g in learner.optimizer.param_groups}
    assert rates['backbone']==pytest.approx(.1*rates['head'])
    torch.manual_seed(learner.cfg.seed)
    system,folder = load_run(tmp_path/'run', 'last')
    assert (folder/'backbone.safetensors').exists() and system.backbone.trains
    findings = {f['code']: f for f in read_json(tmp_path/'run'/'health.json')['findings']}
    assert findings.get('backbone', {}).get('evidence', {}).get('key')!='still' and 'untrained' not in findings
    frozen = config(world, tmp_path, 'other').build()
    assert not any(p.requires_grad for p in frozen.backbone.parameters()) and [g['name'] for g in frozen.groups()]==['head']
    assert "'model.backbone_lr' trains the backbone" in refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'x'), '--model.backbone_lr', '0.1', '--data.cache', 'disk')

def test_the_gradient_reaches_the_backbone(world, tmp_path):
    system = config(world, tmp_path, 'run', '--model.backbone_lr', '0.1', '--data.cache', 'auto').build()
    system.train()
    x = dict(image=torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))
    system.loss(x)['loss'].backward()
    assert all(p.grad is not None for p in system.backbone.parameters()) and system.backbone.net.conv1[0].weight.grad.abs().sum()>0
    assert not any(m.training for m in system.backbone.modules())   # batch norm keeps its statistics
