"The whole of action_cls in a very small world: train, stop, resume, evaluate, predict, report; two sets, two processes; bad input; health; real clips"
import json, os, shutil, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from command import vadnb
from test_processes import together
from toy_system import StopAt, curve, rows
from vadnb.core import CheckpointError, DataError, read_json, write_json
from vadnb.data.action_sets import ssv2, ucf101
from vadnb.models.action_decoder import ActionDecoder
from vadnb.models.tiny_qwen import tiny_folder
from vadnb.systems.action_cls.scan import ClassScan
from vadnb.systems.action_cls.system import ActionCls
from vadnb.systems.registry import load_config, load_run
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.feed import look_through, to_device
from vadnb.train.learner import fit
from vadnb.worlds.directions import make_ssv2_directions, make_ucf_directions

SMALL = '''--sampling.frames 4 --model.hidden 32 --model.heads 2 --model.layers 1 --model.vision_layers 1 --model.vision_hidden 16
    --lora.rank 2 --train.batch_size 4 --train.steps 4 --train.evaluate_every 2 --train.save_every 2 --train.log_every 1
    --train.progress false --train.trackers [] --train.device cpu --optim.warmup 0 --train.unit step --train.valid_batch_size 8'''.split()

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Clips as UCF101 and as SSv2 have them, through their converters, and a base to be pretrained on"
    root = tmp_path_factory.mktemp('action_cls')
    ucf = make_ucf_directions(root/'ucf', groups=6, test_groups=1, clips=1, seed=1)
    other = make_ssv2_directions(root/'ssv2', videos=12, valid_videos=4, seed=1)
    ucf101(str(ucf.lists), str(root/'sets'), videos=str(ucf.videos))
    ssv2(str(other.lists), str(root/'sets'), videos=str(other.videos))
    tiny_folder(root/'base', seed=1, hidden=32, heads=2, layers=1, vision_hidden=16, vision_layers=1)
    return root

TWO = '''--data.train ["ucf101_train01","ssv2_train"] --data.valid ["ucf101_test01","ssv2_valid"] --data.test ["ucf101_test01","ssv2_valid"]
    --data.names ["ucf","ssv2"] --data.hold_out 0'''.split()

def words(world, runs, name, *more): return ['--data_root', world, '--runs', runs, '--name', name, *SMALL, *map(str, more)]
def config(world, runs, name, *more): return load_config('action_cls_demo', [str(w) for w in words(world, runs, name, *more)])
def given(world): return '--model.pretrained', 'true', '--model.base', world/'base', '--model.vision', 'false', '--model.merger', 'false'

@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    if 'run' not in request.fixturenames: monkeypatch.setattr(ClassScan, 'pictures', lambda self: {})

def parameters(run):
    folder = find_checkpoint(run)
    return {f'{p}.{k}': v for p in read_json(folder/'card.json')['parts'] for k,v in read_part(folder, p).items()}

def findings(run): return {f['code']: f['message'] for f in read_json(run/'health.json')['findings']}

# ---------------------------------------------------------------- the user's story

@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "Trained for two steps, stopped, and trained to the end on a base that is had elsewhere"
    folder = tmp_path_factory.mktemp('runs')
    fit(config(world, folder, 'run', *given(world)), [StopAt(2)])
    code,out,err = vadnb('train', '--config', 'action_cls_demo', *words(world, folder, 'run', *given(world)))
    assert code==0, err
    return folder/'run'

def test_a_run_that_was_stopped_is_the_run_left_alone(world, run, tmp_path):
    whole = fit(config(world, tmp_path, 'run', *given(world))).run
    a,b = parameters(run), parameters(whole)
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r['loss'] for r in rows(run, 'train')]==[r['loss'] for r in rows(whole, 'train')]
    assert not {*findings(run)}-{'below_baseline', 'resumed_differently'}

def test_a_checkpoint_holds_what_trains_and_names_the_rest(world, run):
    folder = find_checkpoint(run)
    card = read_json(folder/'card.json')
    assert card['parts']==['adapter_model', 'action_decoder'] and card['provenance'].keys()=={'base', 'digest', 'width', 'rows'}
    assert card['facts']['sets']['directions']['classes']==['MovingDown', 'MovingLeft', 'MovingRight', 'MovingUp']
    assert {p.name for p in folder.iterdir()}>={'adapter_config.json', 'action_decoder_config.json', 'tokenizer.json', 'tokenizer_config.json'}
    held = load_file(folder/'adapter_model.safetensors')
    assert not [k for k in held if k.endswith('embed_tokens.weight') or 'base_layer' in k]
    assert ActionDecoder.from_pretrained(folder).num_classes==4

def test_plain_peft_gives_the_same_rows(world, run):
    import peft, transformers
    folder,(system,_) = find_checkpoint(run), load_run(run, 'last')
    from vadnb.models.qwen_folder import read_model
    model = read_model(world/'base')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = peft.PeftModel.from_pretrained(model, folder).eval()
    data = system.cfg.make_data()
    batch = data.collate([data.split('test')[0]])
    from vadnb.models.qwen_batch import find_places, normalise_patches
    with torch.no_grad():
        ours = system.qwen.rows(batch)
        inner = other.base_model.model.model
        pixels = normalise_patches(batch['pixel_values_videos'])
        seen = inner.get_video_features(pixels, batch['video_grid_thw']).pooler_output
        x = inner.language_model.embed_tokens(batch['input_ids'])
        x = x.masked_scatter((batch['input_ids']==model.config.video_token_id)[...,None], torch.cat([*seen]))
        theirs = inner.language_model(inputs_embeds=x, position_ids=find_places(system.qwen, batch).positions).last_hidden_state[:,-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

def test_a_run_is_measured(run):
    code,out,err = vadnb('eval', '--run', run)
    assert code==0 and 'one frame' in out and 'MovingDown' in out, err
    m = read_json(run/'eval.json')['metrics']
    assert {'top1', 'baseline/top1/one_frame', 'baseline/top1/majority', 'class/MovingUp/accuracy', 'calibration_error_with_temperature'}<=m.keys()

def test_a_run_predicts_clips_folders_and_windows(world, run, tmp_path):
    code,out,err = vadnb('predict', world/'ucf'/'UCF-101', '--run', run, '--out', tmp_path/'a')
    assert code==0, err
    found = read_json(tmp_path/'a'/'UCF-101.accuracy.json')
    assert found['videos']==found['of_known_class']==24 and (tmp_path/'a'/'UCF-101.confusion.png').exists()
    assert (tmp_path/'a'/'MovingUp'/'v_MovingUp_g01_c01.jsonl').exists()
    clip = next((world/'ucf'/'UCF-101'/'MovingUp').iterdir())
    code,out,err = vadnb('predict', clip, '--run', run, '--out', tmp_path/'b', '--score.window', '0.5')
    assert code==0 and len((tmp_path/'b'/f'{clip.stem}.jsonl').read_text().splitlines())==3, err
    # a folder of pictures is one video, and needs a rate
    from vadnb.data.video import VideoReader
    from PIL import Image
    (tmp_path/'frames').mkdir()
    for i,x in enumerate(VideoReader(clip).get_batch(range(8))): Image.fromarray(np.asarray(x)).save(tmp_path/'frames'/f'{i:03}.png')
    code,_,err = vadnb('predict', tmp_path/'frames', '--run', run, '--out', tmp_path/'c')
    assert code==2 and 'no frame rate' in err
    system,_ = load_run(run, overrides=['--pixels.folder_fps', '8'])
    pictures, = system.predict(tmp_path/'frames')
    video, = system.predict(clip)
    np.testing.assert_allclose(pictures.probabilities, video.probabilities, atol=1e-6)

def test_a_prediction_is_what_evaluation_saw(world, run):
    system,_ = load_run(run)
    data = system.cfg.make_data()
    scan = look_through(system, data, 'test', system.cfg.train, torch.device('cpu'))
    system.calibration = None
    items = data.split('test').parts[0]
    p,_,_ = scan.of_set(0)
    said, = system.predict(items.entries[2].videos[0])
    np.testing.assert_allclose(said.probabilities[0], p[2], atol=1e-6)

def test_a_run_has_a_report(run):
    code,_,err = vadnb('report', '--run', run)
    page = (run/'report.html').read_text()
    assert code==0 and 'one frame' in page and 'top1' in page, err

def test_views_of_a_clip_are_averaged_and_named(world, run):
    code,out,err = vadnb('eval', '--run', run, '--sampling.how', 'segments', '--sampling.clips', 2, '--sampling.crops', 3)
    assert code==0, err
    system,_ = load_run(run, overrides=['--sampling.how', 'segments', '--sampling.clips', '2'])
    said, = system.predict(next((world/'ucf'/'UCF-101'/'MovingUp').iterdir()))
    assert len(said.looked[0])==8 and len(said.spans)==1

# ---------------------------------------------------------------- several sets

def test_two_sets_train_together_each_with_its_decoder(world, tmp_path):
    learner = fit(config(world, tmp_path, 'two', *TWO, '--train.steps', 6))
    system = learner.system
    assert {n: d.num_classes for n,d in system.decoders.items()}==dict(ucf=4, ssv2=4) and min(system.drawn.values())>0
    m = learner.metrics
    assert m['top1']==pytest.approx((m['ucf/top1']+m['ssv2/top1'])/2) and 'baseline/ssv2/top1/one_frame' in m
    read,_ = load_run(learner.run, 'last')
    for k,v in system.state_dict().items(): assert torch.equal(v, read.state_dict()[k]), k
    assert set(system.calibration)=={'ucf', 'ssv2'}
    code,_,err = vadnb('predict', next((world/'ssv2').rglob('*.webm')), '--run', learner.run, '--out', tmp_path/'p')
    assert code==2 and '--score.head' in err and len(err.strip().splitlines())==1
    code,_,err = vadnb('predict', next((world/'ssv2').rglob('*.webm')), '--run', learner.run, '--out', tmp_path/'p', '--score.head', 'ssv2')
    assert code==0, err

@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_an_unused_decoder_is_not_stepped(world, tmp_path, optimizer):
    "Neither by decay nor by the momentum of earlier steps"
    cfg = config(world, tmp_path, 'unused', *TWO, '--optim.name', optimizer, '--optim.weight_decay', .5)
    data = cfg.make_data()
    system = cfg.build(data.facts())
    train = data.split('train')
    from vadnb.train.optim import make_optimizer
    optimizer = make_optimizer(cfg.optim, system.groups())
    def step(*numbers):
        system.loss(data.collate([train[i] for i in numbers]))['loss'].backward()
        system.before_step(); optimizer.step(); optimizer.zero_grad(); system.after_step()
        return {n: torch.cat([p.detach().flatten() for p in d.parameters()]).clone() for n,d in system.decoders.items()}
    first = step(0, 21)
    second = step(0, 1)
    assert torch.equal(first['ssv2'], second['ssv2']) and not torch.equal(first['ucf'], second['ucf'])

# ---------------------------------------------------------------- processes, devices

def train(world, folder, name, batch, *more):
    ClassScan.pictures = lambda self: {}
    learner = fit(config(world, folder, name, '--train.batch_size', batch, '--train.steps', 3, '--optim.name', 'sgd', '--optim.lr', '.01', '--optim.weight_decay', '.1', *more))
    (folder/f"{name}.metrics{os.environ.get('RANK', '0')}").write_text(json.dumps(learner.metrics))

def test_two_processes_are_one(world, tmp_path):
    "With two sets of which batches often hold one alone"
    more = *TWO, *given(world), '--data.weights', '[9,1]', '--loss.smoothing', .1
    train(world, tmp_path, 'one', 2, *more)
    together(tmp_path/'two', train, world, tmp_path, 'two', 1, *more)
    one,two = parameters(tmp_path/'one'), parameters(tmp_path/'two')
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=0, atol=1e-5, msg=lambda s: f'{k}: {s}')
    found = [json.loads((tmp_path/f).read_text()) for f in ('one.metrics0', 'two.metrics0', 'two.metrics1')]
    assert found[1]==found[2] and found[0]==pytest.approx(found[1], abs=1e-4)

def built(world, folder, device):
    torch.manual_seed(0)
    cfg = config(world, folder, 'cuda', *TWO, '--loss.text', .1, '--loss.balanced', 'true')
    data = cfg.make_data()
    system = cfg.build(data.facts())
    train = data.split('train')
    batch = data.collate([train.draw(i, np.random.default_rng(i)) for i in (0, 5, 21)])
    return system.to(device).train(), batch, data

def test_a_gpu_that_is_not_there_gives_the_numbers_of_the_cpu(world, tmp_path, on_cuda):
    from pretend_cuda import DEVICE
    from torch.nn.attention import SDPBackend, sdpa_kernel
    clip = next((world/'ssv2').rglob('*.webm'))
    def everything(device):
        system,batch,data = built(world, tmp_path, device)
        losses = system.loss(to_device(batch, device))
        losses['loss'].backward()
        res = {k: v.detach().cpu() for k,v in losses.items()}
        res |= {n: p.grad.cpu() for n,p in system.named_parameters() if p.grad is not None}
        system.eval()
        system.cfg.score.head = 'ssv2'
        with torch.no_grad():
            scan = look_through(system, data, 'valid', system.cfg.train, device)
            predicted, = system.predict(clip)
        return res, scan.metrics(), predicted.probabilities
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = everything('cpu')
        with on_cuda(): found = everything(DEVICE)
    for k in plain[0]: torch.testing.assert_close(found[0][k], plain[0][k], rtol=1e-3, atol=1e-5, msg=lambda s: f'{k}: {s}')
    assert found[1]==pytest.approx(plain[1], abs=1e-3)
    np.testing.assert_allclose(found[2], plain[2], atol=1e-4)
