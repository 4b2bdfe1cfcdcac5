"The whole of action_cls in a very small world: train, stop, resume, evaluate, predict, report; two sets, two processes; bad input; health; real clips"
import json, multiprocessing, os, re, shutil, signal, time, warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
import numpy as np, pytest, torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from command import vadnb
from test_processes import together
from test_real import finish, start
from toy_system import StopAt, curve, rows
from vadnb.core import CheckpointError, ConfigError, DataError, VadnbError, read_json, write_json
from vadnb.data.action_sets import ssv2, ucf101
from vadnb.data.video import VideoReader
from vadnb.models.action_decoder import ActionDecoder
from vadnb.models.qwen_vl import QwenVL
from vadnb.models.tiny_qwen import tiny_folder
from vadnb.systems.action_cls.model import text_logits
from vadnb.systems.action_cls.scan import ClassScan
from vadnb.systems.action_cls.system import ActionCls
from vadnb.systems.registry import load_config, load_run
from vadnb.train.callbacks import Callback
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

@cache
def parsed(): return load_config('action_cls_demo', SMALL)

def value(word):
    "What a word of a command line means"
    for read in (json.loads, float):
        try: return read(word)
        except ValueError: pass
    return word

def config(world, runs, name, *more):
    "What `load_config` makes of the same words, in a thousandth of its second; rules are checked as they are there"
    given = [str(w) for w in ('--data_root', world, '--runs', runs, '--name', name, *more)]
    own,sections = {}, {}
    for key,word in zip(given[::2], given[1::2]):
        section,dot,k = key.removeprefix('--').partition('.')
        if dot: sections.setdefault(section, {})[k] = value(word)
        else: own[section] = word
    base = parsed()
    return replace(base, **own, **{n: replace(getattr(base, n), **of) for n,of in sections.items()})

def test_settings_are_those_of_the_command_line(world, tmp_path):
    more = *TWO, *given(world), '--optim.lr', '.02', '--sweep.rates', '[1e-6,1]', '--train.steps', 6, '--sampling.how', 'rate'
    assert config(world, tmp_path, 'a', *more)==load_config('action_cls_demo', [str(w) for w in words(world, tmp_path, 'a', *more)])
def given(world): return '--model.pretrained', 'true', '--model.base', world/'base', '--model.vision', 'false', '--model.merger', 'false'

@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    if 'run' not in request.fixturenames: monkeypatch.setattr(ClassScan, 'pictures', lambda self: {})

def parameters(run):
    folder = find_checkpoint(run)
    return {f'{p}.{k}': v for p in read_json(folder/'card.json')['parts'] for k,v in read_part(folder, p).items()}

def findings(run):
    "Code → what health says of it"
    res = {}
    for f in read_json(run/'health.json')['findings']: res[f['code']] = res.get(f['code'], '')+f['message']
    return res

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
    # the sizes of a random model stand beside a base that is read, and that is said
    assert 'unread_settings' in findings(run) and not {*findings(run)}-{'below_baseline', 'resumed_differently', 'unread_settings'}

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
    for c in ('MovingUp', 'MovingLeft'):
        (tmp_path/'clips'/c).mkdir(parents=True)
        shutil.copy(world/'ucf'/'UCF-101'/c/f'v_{c}_g01_c01.avi', tmp_path/'clips'/c)
    code,out,err = vadnb('predict', tmp_path/'clips', '--run', run, '--out', tmp_path/'a')
    assert code==0, err
    found = read_json(tmp_path/'a'/'clips.accuracy.json')
    assert found['videos']==found['of_known_class']==2 and (tmp_path/'a'/'clips.confusion.png').exists()
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
    (tmp_path/'frames'/'004.png').unlink()
    code,_,err = vadnb('predict', tmp_path/'frames', '--run', run, '--out', tmp_path/'d', '--pixels.folder_fps', '8')
    assert code==0 and 'the first between 003.png and 005.png: results count frames by their place' in err and len(err.splitlines())==1

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

def test_kept_visual_tokens_give_the_same_curve(world, tmp_path):
    "Bit for bit, also after a stop; the clips themselves are read once"
    more = *given(world), '--train.steps', 6, '--data.hold_out', 0, '--data.keep_gb', 0
    plain = fit(config(world, tmp_path, 'plain', *more, '--cache.where', 'off'))
    for where in ('memory', 'disk'):
        fit(config(world, tmp_path, where, *more, '--cache.where', where), [StopAt(3)])
        kept = fit(config(world, tmp_path, where, *more, '--cache.where', where))
        assert type(kept.train).__name__=='TokenClips'
        assert [r['loss'] for r in rows(kept.run, 'train')]==[r['loss'] for r in rows(plain.run, 'train')]
        a,b = parameters(plain.run), parameters(kept.run)
        assert all(torch.equal(a[k], b[k]) for k in a)

def test_tokens_of_the_first_clips_alone_give_the_same_curve(world, tmp_path, capsys):
    "To rounding, since the tower sees other batches; bit for bit after a stop, and what does not fit is said"
    more = *given(world), '--train.steps', 6, '--data.hold_out', 0, '--data.keep_gb', 0
    plain = fit(config(world, tmp_path, 'whole', *more, '--cache.where', 'off'))
    some = *more, '--cache.where', 'disk', '--cache.folder', tmp_path/'features', '--cache.gb', 2.5e-5
    part = fit(config(world, tmp_path, 'part', *some, '--train.progress', 'true'))
    assert re.search(r'the first \d+ of \d+ videos.*the others are encoded each time', capsys.readouterr().err)
    fit(config(world, tmp_path, 'stopped', *some), [StopAt(3)])
    resumed = fit(config(world, tmp_path, 'stopped', *some))
    curves = [[r['loss'] for r in rows(x.run, 'train')] for x in (plain, part, resumed)]
    assert curves[1]==curves[2] and curves[0]==pytest.approx(curves[1], rel=1e-5)
    a,b = (parameters(x.run) for x in (part, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_tokens_in_half_the_bytes_are_close(world, tmp_path):
    "And never share a folder with the others; under autocast they have half the bytes already"
    more = *given(world), '--train.steps', 4, '--data.hold_out', 0, '--cache.where', 'disk', '--cache.folder', tmp_path/'features'
    curves = []
    for kind in ('float32', 'float16'):
        learner = fit(config(world, tmp_path, kind, *more, '--cache.dtype', kind))
        curves.append([r['loss'] for r in rows(learner.run, 'train')])
    assert len([*(tmp_path/'features').glob('*/*')])>=2 and curves[0]!=curves[1]==pytest.approx(curves[0], rel=2e-3)
    with pytest.raises(ConfigError, match='visual_tokens is bfloat16 already'):
        fit(config(world, tmp_path, 'both', *more, '--cache.dtype', 'float16', '--train.precision', 'bf16'))

def test_tokens_that_cannot_be_kept_are_said(world, tmp_path, capsys):
    "Once by training, and by verify"
    more = *given(world), '--sampling.how', 'rate', '--sampling.fps', 4, '--data.hold_out', 0
    fit(config(world, tmp_path, 'rate', *more, '--train.steps', 1, '--train.progress', 'true'))
    err = capsys.readouterr().err
    assert err.count('feature cache: off')==1 and "frames by rate ('sampling.how') give clips of different lengths" in err
    for how,says in (('rate', 'made anew in every epoch: frames by rate'), ('count', 'training clips are kept')):
        code,out,_ = vadnb('verify', '--config', 'action_cls_demo', *words(world, tmp_path, 'v', *more, '--sampling.how', how))
        assert code==0 and says in out

def test_half_precision_leaves_what_trains_alone(world, tmp_path):
    "A bf16 base under autocast, recomputed in the backward pass, with DoRA and a decoder that reads visual tokens"
    learner = fit(config(world, tmp_path, 'half', *given(world), '--model.dtype', 'bf16', '--train.precision', 'bf16', '--train.gradient_checkpointing', 'true',
                         '--lora.dora', 'true', '--decoder.kind', 'transformer', '--decoder.heads', 4, '--train.steps', 2))
    system = learner.system
    assert {p.dtype for p in system.parameters() if p.requires_grad}=={torch.float32} and system.qwen.language.embed_tokens.weight.dtype==torch.bfloat16
    assert 'precision' not in findings(learner.run) and all(np.isfinite(r['loss']) for r in rows(learner.run, 'train'))
    read,_ = load_run(learner.run, 'last')
    for k,v in system.state_dict().items(): assert torch.equal(v, read.state_dict()[k]), k

def test_the_folder_of_the_guide_is_read(run, tmp_path):
    "Its decoder has no configuration"
    folder = Path(shutil.copytree(find_checkpoint(run), tmp_path/'output'))
    (folder/'action_decoder_config.json').unlink()
    system,_ = load_run(run, 'last')
    want = {k: v.clone() for k,v in system.state_dict().items()}
    with torch.no_grad():
        for p in system.parameters():
            if p.requires_grad: p.zero_()
    assert system.load_reference(folder)==[]
    assert all(torch.equal(v, system.state_dict()[k]) for k,v in want.items())

def test_a_run_becomes_a_plain_model_and_a_decoder(world, run, tmp_path):
    code,out,err = vadnb('convert', 'action-model', run, tmp_path/'merged', '--which', 'last')
    assert code==0, err
    model,decoder = QwenVL.from_folder(tmp_path/'merged'), ActionDecoder.from_pretrained(tmp_path/'merged')
    system,_ = load_run(run, 'last')
    data = system.cfg.make_data()
    batch = data.collate([data.split('test')[k] for k in (0, 3)])
    with torch.no_grad(): torch.testing.assert_close(decoder(model.rows(batch)), system.decoders['directions'](system.qwen.rows(batch)), rtol=0, atol=1e-4)
    code,_,err = vadnb('convert', 'action-model', run, tmp_path/'merged')
    assert code==2 and 'is there already' in err

def test_what_the_base_says_stands_beside(run):
    code,out,err = vadnb('eval', '--run', run, '--score.text', 'true')
    assert code==0 and 0<=read_json(run/'eval.json')['metrics']['baseline/top1/text']<=1, err

def test_what_the_base_says_knows_nothing_of_training(world, run):
    "Neither adapters nor the row of the token: the question is asked without the token"
    system,_ = load_run(run, 'last')
    data = system.cfg.make_data()
    batch,classes = data.collate([data.split('test')[k] for k in (0, 3)]), ['MovingUp', 'MovingLeft']
    def said(qwen): return text_logits(qwen, batch, classes, system.cfg.model.system)
    trained = said(system.qwen)
    np.testing.assert_array_equal(trained, said(QwenVL.from_folder(world/'base')))
    with torch.no_grad():
        for p in system.qwen.parameters():
            if p.requires_grad: p.normal_()
    np.testing.assert_array_equal(trained, said(system.qwen))

def test_decoders_of_a_sweep_learn_on_one_pass_and_validation_chooses(world, tmp_path):
    more = '--sweep.rates', '[1e-6,1]', '--sweep.decays', '[0,0.1]', '--train.steps', 6, '--train.evaluate_every', 3, '--train.save_every', 3, '--optim.lr', .05, '--data.hold_out', .2
    fit(config(world, tmp_path, 'sweep', *more), [StopAt(4)])
    learner = fit(config(world, tmp_path, 'sweep', *more))
    whole = fit(config(world, tmp_path, 'whole', *more))
    a,b = parameters(learner.run), parameters(whole.run)
    assert all(torch.equal(a[k], b[k]) for k in a)
    system,names = learner.system, ['rate 5e-08, decay 0', 'rate 5e-08, decay 0.1', 'rate 0.05, decay 0', 'rate 0.05, decay 0.1']
    groups = {g['name']: (g['peak'], g['weight_decay']) for g in learner.optimizer.param_groups}
    assert groups['decoder_0']==(pytest.approx(5e-8), 0) and groups['decoder_3']==(pytest.approx(.05), .1) and not {'rate_scale', 'lora_ratio'} & {*findings(learner.run)}
    each = system.decoders['directions'].each
    assert (each[0].head.weight-each[2].head.weight).abs().max()>.01
    m = learner.metrics
    own = [m[f'sweep/{n}/top1'] for n in names]
    best = system.calibration['directions']['decoder']
    assert m['top1']==max(own)==own[best]
    read,_ = load_run(learner.run, 'last')
    data = read.cfg.make_data()
    scan = look_through(read, data, 'test', read.cfg.train, torch.device('cpu'))
    found = scan.metrics()
    assert found['top1']==found[f'sweep/{names[best]}/top1']
    said, = read.predict(data.split('test').parts[0].entries[0].videos[0])
    batch = data.collate([data.split('test')[0]])
    with torch.no_grad(): p = (read.decoders['directions'].each[best](read.qwen.rows(batch))/said.temperature.temperature).softmax(1)
    np.testing.assert_allclose(said.probabilities, p, atol=1e-5)
    code,_,err = vadnb('report', '--run', learner.run)
    assert code==0 and all(n in (learner.run/'report.html').read_text() for n in names), err

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

def test_folders_and_tables_are_sets_too(world, tmp_path):
    clips = sorted((world/'ucf'/'UCF-101').rglob('*.avi'))
    lines = [f"{p},{p.parent.name},{p.stem[-7:-4]},{'test' if '_g01' in p.stem else 'train'}" for p in clips]
    (tmp_path/'clips.csv').write_text('\n'.join(['video,label,group,split', *lines]))
    sources = '--data.train', f'["{tmp_path}/clips.csv#train","ucf/UCF-101"]', '--data.test', f'["{tmp_path}/clips.csv#test",""]', '--data.names', '["table","folders"]'
    code,out,err = vadnb('verify', '--config', 'action_cls_demo', *words(world, tmp_path, 'mixed', *sources, '--data.hold_out', .2, *given(world)))
    # a clip that one set holds back is trained on in the other
    assert code==1 and 'train table' in out and 'digest' in out and [l for l in out.splitlines() if 'FAIL' in l][0].split()[1]=='copies', out+err
    learner = fit(config(world, tmp_path, 'mixed', *sources, '--data.hold_out', .2))
    assert learner.step==4 and {*learner.system.sets}=={'table', 'folders'}

# ---------------------------------------------------------------- processes, devices

def train(world, folder, name, batch, *more):
    ClassScan.pictures = lambda self: {}
    # a forked process begins with what its parent has set up
    AcceleratorState._reset_state(True)
    learner = fit(config(world, folder, name, '--train.batch_size', batch, '--train.steps', 3, '--optim.name', 'sgd', '--optim.lr', '.01', '--optim.weight_decay', '.1', *more))
    (folder/f"{name}.metrics{os.environ.get('RANK', '0')}").write_text(json.dumps(learner.metrics))

def test_two_processes_are_one(world, tmp_path, monkeypatch):
    "With two sets of which batches often hold one alone"
    # forked, so that imports of many seconds are paid once
    monkeypatch.setattr('test_processes.processes', multiprocessing.get_context('fork'))
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

def test_a_step_waits_for_no_more_than_the_mask(world, tmp_path, on_cuda):
    from pretend_cuda import DEVICE
    with on_cuda() as device:
        system,batch,_ = built(world, tmp_path, DEVICE)
        batch = to_device(batch, DEVICE)
        device.waits.clear()
        system.loss(batch)['loss'].backward()
        # transformers asks twice whether anything is padded
        assert device.total<=2, device.listed()

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

# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('more,says', [
    (('--data.train', '["ucf101_train1"]'), "did you mean 'ucf101_train01'"), (('--data.train', '[]'), "'data.train' must be"),
    (('--data.train', '["nowhere.json"]'), 'nowhere.json'), (('--data.cutoff', '40'), 'the cutoff is 40'),
    (('--model.pretrained', 'true'), 'give --model.base FOLDER'), (('--model.pretrained', 'true', '--model.base', 'missing/folder/x'), 'no such model folder'),
    (('--lora.targets', '["languages"]'), "'lora.targets' must be some of"), (('--decoder.kind', 'transformer', '--decoder.heads', '5'), 'decoder.heads'),
    (('--decoder.weights', 'nowhere'), 'nowhere'), (('--model.adapter', 'nowhere'), 'nowhere'), (('--train.metric', 'top_1'), "did you mean 'top1'"),
    (('--data.valid', '["ucf101_train01"]', '--data.hold_out', '0'), 'in train and in validation'), (('--sampling.clips', '3'), "'sampling.clips' must be 1"),
    (('--lora.targets', '["vision"]'), 'do one of the two')])
def test_what_cannot_be_is_said_in_one_line(world, tmp_path, more, says):
    with pytest.raises(VadnbError) as e: fit(config(world, tmp_path, 'bad', *more))
    assert says in str(e.value) and len(str(e.value).splitlines())==1, e.value
    assert not (tmp_path/'bad'/'checkpoints').exists()

def test_what_cannot_be_leaves_the_command_line_with_code_2(world, tmp_path):
    assert "did you mean 'ucf101_train01'" in refused(world, tmp_path, 'bad', '--data.train', '["ucf101_train1"]')

def entries(world): return read_json(world/'sets'/'ucf101_train01.json')

@pytest.mark.parametrize('change,says', [
    (lambda e: e.update(action_label=4), 'label: action_label is 4'), (lambda e: e.pop('action_label'), 'label: action_label is missing'),
    (lambda e: e['messages'][0].update(content='<video>What?'), 'action_token: <ACTION> stands 0 times'),
    (lambda e: e['messages'][0].update(content='<ACTION> <video>What?'), 'order: <video> stands behind'),
    (lambda e: (e['messages'][0].update(content='<video>What?'), e['messages'][1].update(content='It moves down. <ACTION>')), 'leak: <ACTION> comes after'),
    (lambda e: e['videos'].append('more.avi'), 'videos: 2 files for 1 <video>'), (lambda e: e.update(videos=['gone.avi']), 'videos: gone.avi is not there')])
def test_an_entry_that_breaks_a_rule_names_file_number_rule_and_fix(world, tmp_path, change, says):
    held = entries(world)
    change(held[3])
    shutil.copytree(world/'sets', tmp_path/'sets')
    write_json(tmp_path/'sets'/'ucf101_train01.json', held)
    with pytest.raises(DataError) as e: fit(config(world, tmp_path, 'bad', '--data.info', tmp_path/'sets'))
    err,(rule,what) = str(e.value), says.split(': ', 1)
    what = what.removeprefix('gone.avi ')
    assert f'ucf101_train01.json, entry 3, {rule}' in err and what in err and len(err.splitlines())==1, err

def test_a_video_that_comes_twice_is_refused(world, tmp_path):
    held = entries(world)
    shutil.copytree(world/'sets', tmp_path/'sets')
    write_json(tmp_path/'sets'/'ucf101_train01.json', [*held, held[0]])
    with pytest.raises(DataError, match='is used twice'): fit(config(world, tmp_path, 'bad', '--data.info', tmp_path/'sets'))

def test_a_clip_that_cannot_be_read_is_named_or_left_out(world, tmp_path):
    held = entries(world)
    (tmp_path/'broken.avi').write_bytes(b'RIFF nothing')
    held[3]['videos'] = [str(tmp_path/'broken.avi')]
    shutil.copytree(world/'sets', tmp_path/'sets')
    write_json(tmp_path/'sets'/'ucf101_train01.json', held)
    more = '--data.info', tmp_path/'sets', '--data.hold_out', 0, '--train.batch_size', 5
    code,_,err = vadnb('train', '--config', 'action_cls_demo', *words(world, tmp_path, 'bad', *more))
    assert code==2 and 'broken.avi' in err and len(err.strip().splitlines())==1
    learner = fit(config(world, tmp_path, 'skip', *more, '--train.on_bad_sample', 'skip'))
    assert learner.step==4 and any('broken.avi' in k for k in learner.skipped)

def refused(world, runs, name, *more):
    code,_,err = vadnb('train', '--config', 'action_cls_demo', *words(world, runs, name, *more))
    assert code==2 and len(err.strip().splitlines())==1, err
    return err

def test_another_model_or_mix_is_not_resumed(world, run, tmp_path):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    before = {p: p.stat().st_mtime_ns for p in own.rglob('*') if p.is_file()}
    tiny_folder(tmp_path/'other', seed=2, hidden=32, heads=2, layers=1, vision_hidden=16, vision_layers=1)
    tiny_folder(tmp_path/'wide', seed=2, hidden=48, heads=2, layers=1, vision_hidden=16, vision_layers=1)
    base = '--model.pretrained', 'true', '--model.vision', 'false', '--model.merger', 'false', '--train.steps', 6
    says = [('other', 'digest'), ('wide', 'width 48 instead of 32')]
    for folder,word in says: assert word in refused(world, tmp_path, 'run', *base, '--model.base', tmp_path/folder)
    with pytest.raises(CheckpointError, match='trained with sets directions, and the present data and configuration say ucf, ssv2; set'):
        fit(config(world, tmp_path, 'run', *given(world), *TWO, '--train.steps', 6))
    assert 'was trained with sets directions, and the present data and configuration say shapes; ' in refused(
        world, tmp_path, 'run', *given(world), '--data.names', '["shapes"]', '--train.steps', 6)
    for word,*more in (('counts', '--data.most', 6), ('does not fit this model', '--lora.rank', 3)):
        with pytest.raises(CheckpointError, match=word): fit(config(world, tmp_path, 'run', *given(world), *more, '--train.steps', 6))
    assert {p: p.stat().st_mtime_ns for p in own.rglob('*') if p.is_file()}==before
    with pytest.raises(CheckpointError, match='digest'): load_run(own, overrides=['--model.base', str(tmp_path/'other')])
    with pytest.raises(CheckpointError, match='no such model folder'): load_run(own, overrides=['--model.base', str(tmp_path/'a'/'gone'/'b')])

def test_a_checkpoint_without_its_decoder_is_refused(world, run, tmp_path):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    for p in own.rglob('action_decoder.safetensors'): p.unlink()
    clip = next((world/'ucf'/'UCF-101'/'MovingUp').iterdir())
    for words in (('eval', '--run', own), ('predict', clip, '--run', own, '--out', tmp_path/'out')):
        code,_,err = vadnb(*words)
        assert code==2 and 'action_decoder.safetensors' in err and len(err.strip().splitlines())==1, err
    assert 'action_decoder.safetensors' in refused(world, tmp_path, 'run', *given(world), '--train.steps', 6)
    assert not (tmp_path/'out').exists() and not [*own.rglob('action_decoder.safetensors')]

def test_a_base_without_tokenizer_is_named(world, run, tmp_path):
    shutil.copytree(world/'base', tmp_path/'base')
    (tmp_path/'base'/'tokenizer.json').unlink()
    code,_,err = vadnb('eval', '--run', run, '--model.base', tmp_path/'base')
    assert code==2 and 'tokenizer.json: no such file' in err

def test_frames_in_memory_are_a_clip(world, run):
    path = next((world/'ucf'/'UCF-101'/'MovingUp').iterdir())
    reader = VideoReader(path)
    system,_ = load_run(run, overrides=['--pixels.folder_fps', str(reader.fps)])
    (a,),(b,) = system.predict(path), system.predict(torch.from_numpy(reader[:]).permute(0, 3, 1, 2))
    assert np.array_equal(a.probabilities, b.probabilities)

def test_an_adapter_and_a_decoder_are_measured_and_used_without_a_run(world, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = find_checkpoint(run)
    own = ('--config', 'action_cls_demo', *words(world, tmp_path, 'alone', *given(world), '--model.adapter', folder, '--decoder.weights', folder))
    clip = next((world/'ucf'/'UCF-101'/'MovingUp').iterdir())
    for words_ in (own, ('--run', run, '--which', 'last')):
        code,out,err = vadnb('eval', *words_, '--out', 'run.json') if words_ is not own else vadnb('eval', *words_)
        assert code==0, err
        code,out,err = vadnb('predict', clip, *words_, '--out', 'own' if words_ is own else 'run')
        assert code==0, err
    assert read_json('alone_eval.json')['metrics']==read_json('run.json')['metrics']
    a,b = (read_json(next(Path(p).glob('*.layers.json')))['layers'] for p in ('own', 'run'))
    clip = next((world/'ucf'/'UCF-101'/'MovingUp').glob('*_g06_*'))
    assert vadnb('predict', clip, '--run', run, '--out', 'test')[0]==0
    *_,truth = read_json(next(Path('test').glob('*.layers.json')))['layers']
    assert (truth['source']['system'], [s['label'] for s in truth['segments']])==('annotation', ['MovingUp'])
    assert [{**l, 'source': 0} for l in a]==[{**l, 'source': 0} for l in b] and len(a)

def test_an_adapter_and_a_decoder_are_a_start(world, run, tmp_path):
    folder = find_checkpoint(run)
    start = '--model.adapter', folder, '--decoder.weights', folder
    cfg = config(world, tmp_path, 'started', *given(world), *start)
    system = cfg.build(cfg.make_data().facts())
    system.start(True)
    known,_ = load_run(run, 'last')
    for k,v in known.state_dict().items(): assert torch.equal(v, system.state_dict()[k]), k
    assert 'does not fit this decoder' in refused(world, tmp_path, 'bad', *given(world), '--decoder.weights', folder, '--decoder.kind', 'mlp')
    assert 'rank' in refused(world, tmp_path, 'bad', *given(world), '--model.adapter', folder, '--lora.rank', 3)
    wide = Path(shutil.copytree(folder, tmp_path/'wide'))
    held = load_file(wide/'adapter_model.safetensors')
    save_file({k: torch.zeros(1, 48) if k.endswith('trainable_tokens_delta') else v for k,v in held.items()}, wide/'adapter_model.safetensors')
    assert 'has 48 values, the model is 32 wide' in refused(world, tmp_path, 'bad', *given(world), '--model.adapter', wide)

def test_classes_of_another_order_are_matched_and_foreign_ones_refused(world, run, tmp_path):
    sets = tmp_path/'sets'
    shutil.copytree(world/'sets', sets)
    names,held = read_json(sets/'ucf101_classes.json'), read_json(sets/'ucf101_test01.json')
    for e in held: e['action_label'] = 3-e['action_label']
    write_json(sets/'ucf101_test01.json', held)
    write_json(sets/'ucf101_classes.json', names[::-1])
    for which in (world/'sets', sets):
        code,_,err = vadnb('eval', '--run', run, '--data.info', which, '--out', tmp_path/f'{which.parent.name}.json')
        assert code==0, err
    a,b = (read_json(tmp_path/f'{n}.json')['metrics'] for n in (world.name, tmp_path.name))
    assert a==pytest.approx(b)
    write_json(sets/'ucf101_classes.json', ['MovingAway', *names[1:]])
    code,_,err = vadnb('eval', '--run', run, '--data.info', sets)
    assert code==2 and "'MovingAway' is none of the 4 of the model" in err

@pytest.mark.parametrize('harm,says', [
    (dict(facts=dict(sets=dict(directions=dict(classes=['a', 'a'], counts=[1, 1], prompt='x')))), 'facts.classes: must be a list of different names'),
    (dict(facts=dict(sets=dict(other={}))), 'facts.sets: are of other'), (dict(calibration=dict(step=4, value=dict(directions=dict(temperature='high')))), 'class temperature')])
def test_a_card_of_a_stranger_is_named(run, tmp_path, harm, says):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    for p in own.rglob('card.json'): write_json(p, read_json(p) | harm)
    with pytest.raises(CheckpointError, match=f'card.json: {says}'): load_run(own)

# ---------------------------------------------------------------- health, each fault planted

def planted(world, folder, monkeypatch, harm, *more):
    "Codes of what health says of a run that something was done to"
    made = ActionCls.assemble
    def assemble(self, qwen): made(self, qwen); harm(self)
    monkeypatch.setattr(ActionCls, 'assemble', assemble)
    learner = fit(config(world, folder, 'planted', *more))
    return findings(learner.run)

def test_a_healthy_run_raises_no_alarm(world, tmp_path):
    learner = fit(config(world, tmp_path, 'well', *TWO, '--train.steps', 8, '--rates.loraplus', 4, '--lora.dora', 'true'))
    assert not {*findings(learner.run)}-{'below_baseline'}

@pytest.mark.parametrize('fault,code,says', [
    ('frozen token', 'token_row', 'is not trained'), ('shrunk', 'embedding', 'rows were cut off'), ('scale', 'rate_scale', 'the scale has no effect'),
    ('ratio', 'lora_ratio', 'no matrix B'), ('undrawn', 'undrawn_set', 'no clip of ssv2'), ('answer first', 'label_visible', 'tells the class')])
def test_a_planted_fault_is_named(world, tmp_path, monkeypatch, fault, code, says):
    def harm(system):
        if fault=='frozen token': system.qwen.action_row.requires_grad_(False)
        if fault=='shrunk': system.base_rows = system.base_rows+64
    more = [*TWO, '--data.weights', '[1,0]', '--train.steps', 9] if fault=='undrawn' else ['--rates.token', .5, '--rates.loraplus', 4, '--data.hold_out', 0]
    groups = ActionCls.groups
    if fault=='scale': monkeypatch.setattr(ActionCls, 'groups', lambda self: [g | dict(lr=self.cfg.optim.lr) if g['name']=='token' else g for g in groups(self)])
    def by_dimension(self): # as the rule of peft has it
        found = {g['name']: g for g in groups(self)}
        found['lora_b']['params'] = found['lora_b']['params']+found.pop('decoder_no_decay')['params']
        return [*found.values()]
    if fault=='ratio': monkeypatch.setattr(ActionCls, 'groups', by_dimension)
    if fault=='answer first':
        from vadnb.systems.action_cls import data
        made = data.chat_tokens
        class Telling:
            def __init__(self, m): self.tokens = made(m); self.tokenizer = self.tokens.tokenizer
            def __call__(self, before, counts=(), after='', answer=None): return self.tokens(f'{before} {answer} ', counts, after, answer)
        monkeypatch.setattr(data, 'chat_tokens', Telling)
        more += ['--loss.text', .1]
    assert says in planted(world, tmp_path, monkeypatch, harm, *more).get(code, ''), findings(tmp_path/'planted')

@pytest.mark.parametrize('fault,says', [('optimizer', 'parameters are in no optimizer group'), ('checkpoint', 'are in no part of'), ('precision', 'float32')])
def test_a_decoder_that_is_left_out_stops_the_run(world, tmp_path, monkeypatch, fault, says):
    groups,parts = ActionCls.groups, ActionCls.parts
    if fault=='optimizer': monkeypatch.setattr(ActionCls, 'groups', lambda self: [g for g in groups(self) if not g['name'].startswith('decoder')])
    if fault=='checkpoint': monkeypatch.setattr(ActionCls, 'parts', lambda self: {k: v for k,v in parts(self).items() if k!='action_decoder'})
    if fault!='precision':
        err = refused_or_fault(world, tmp_path)
        assert says in err
        return
    made = ActionCls.assemble
    def assemble(self, qwen):
        made(self, qwen)
        for n,p in qwen.model.named_parameters():
            if 'lora_B' in n: p.data = p.data.bfloat16()
    monkeypatch.setattr(ActionCls, 'assemble', assemble)
    # without autocast such a model does not even run
    with pytest.raises(RuntimeError): fit(config(world, tmp_path, 'half'))
    assert says in findings(tmp_path/'half')['precision']

class LoseDecoder(Callback):
    "What a program that saves decoders at the very end leaves in its checkpoints"
    order = 10
    def after_fit(self):
        for p in (self.learner.run/'checkpoints').rglob('card.json'):
            card = read_json(p)
            write_json(p, card | dict(parts=[n for n in card['parts'] if n!='action_decoder']))

def test_a_checkpoint_without_decoder_is_named(world, tmp_path):
    learner = fit(config(world, tmp_path, 'lost'), [LoseDecoder()])
    assert 'holds no decoder' in findings(learner.run)['decoder']

def refused_or_fault(world, folder):
    code,_,err = vadnb('train', '--config', 'action_cls_demo', *words(world, folder, 'fault'))
    assert code!=0
    return err

# ---------------------------------------------------------------- real clips

def kill(words, run):
    "Trained by the command line and killed with SIGKILL, first while a checkpoint is being written, then after a step behind one"
    moments = [lambda: (run/'checkpoints').exists() and any(p.name.endswith('.tmp') for p in (run/'checkpoints').iterdir()),
               lambda: (run/'checkpoints'/'step-000002').exists()]
    for now in moments:
        process,end = start(['train', '--config', 'action_cls_demo', *map(str, words)]), time.time()+600
        while not now() and process.is_alive() and time.time()<end: time.sleep(.0005)
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process)==-signal.SIGKILL, 'the run was over before it could be killed'

def test_real_clips_of_ucf101_and_ssv2_go_through_the_converters_train_resume_and_predict(shared, tmp_path):
    real = shared/'data'
    for folder,names in ((tmp_path/'ucf'/'SoccerJuggling', ['torchvision/v_SoccerJuggling_g23_c01.avi', 'torchvision/v_SoccerJuggling_g24_c01.avi']),
                         (tmp_path/'ucf'/'ApplyEyeMakeup', ['ucf101/v_ApplyEyeMakeup_g01_c01.avi'])):
        folder.mkdir(parents=True)
        for n in names: shutil.copy(real/'video'/n, folder)
    # of the official lists the lines whose clips are here; one more line moves a clip into training
    def lines(name): return [l for l in (real/'ucf101'/name).read_text().splitlines() if (tmp_path/'ucf'/l.split()[0]).exists()]
    (tmp_path/'lists').mkdir()
    shutil.copy(real/'ucf101'/'classInd.txt', tmp_path/'lists')
    (tmp_path/'lists'/'trainlist01.txt').write_text('\r\n'.join([*lines('trainlist01.txt'), *lines('testlist01.txt')]))
    (tmp_path/'lists'/'testlist01.txt').write_text('\r\n'.join(lines('testlist01.txt')))
    listed = json.loads((real/'ssv2'/'validation_first300.json').read_text())
    (tmp_path/'ssv2').mkdir()
    clips = sorted((real/'ssv2'/'clips').iterdir())
    for name in ('train', 'validation'):
        write_json(tmp_path/'ssv2'/f'{name}.json', [dict(r, id=c.stem) for r,c in zip(listed, clips)])
    shutil.copy(real/'ssv2'/'labels.json', tmp_path/'ssv2')
    for what,source,videos in (('ucf101', 'lists', tmp_path/'ucf'), ('ssv2', 'ssv2', real/'ssv2'/'clips')):
        code,out,err = vadnb('convert', what, tmp_path/source, tmp_path/'sets', '--videos', videos)
        assert code==0, err
    more = ['--data.train', '["ucf101_train01","ssv2_train"]', '--data.test', '["","ssv2_valid"]', '--data.names', '["ucf","ssv2"]', '--data.hold_out', 0,
            '--data.keep_gb', 0, '--sampling.how', 'rate', '--sampling.fps', 2, '--sampling.jitter', 'true', '--train.batch_size', 2, '--train.steps', 3, '--train.save_every', 1, '--train.evaluate_every', 3, '--pixels.most', 12544]
    kill(words(tmp_path, tmp_path/'runs', 'real', *more), tmp_path/'runs'/'real')
    learner = fit(config(tmp_path, tmp_path/'runs', 'real', *more))
    whole = fit(config(tmp_path, tmp_path/'runs', 'whole', *more)).run
    a,b = parameters(learner.run), parameters(whole)
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    state,alone = (read_part(find_checkpoint(r), 'state')['optimizer']['state'] for r in (learner.run, whole))
    assert state.keys()==alone.keys() and all(torch.equal(state[k]['exp_avg_sq'], alone[k]['exp_avg_sq']) for k in state)
    assert [r['loss'] for r in rows(learner.run, 'train')]==[r['loss'] for r in rows(whole, 'train')] and rows(learner.run, 'resume')
    assert learner.step==3 and {n: d.num_classes for n,d in learner.system.decoders.items()}==dict(ucf=101, ssv2=174)
    system,_ = load_run(learner.run, overrides=['--score.head', 'ucf', '--score.window', '3'])
    found = list(system.predict(tmp_path/'ucf'))
    assert [f.true_class for f in found]==['ApplyEyeMakeup', 'SoccerJuggling', 'SoccerJuggling'] and all(len(f.spans)>1 for f in found)
    assert all(np.allclose(f.probabilities.sum(1), 1, atol=1e-5) for f in found)
    broken, = system.predict(real/'video'/'decord'/'corrupted.mp4')
    assert isinstance(broken, DataError)
    code,out,err = vadnb('eval', '--run', learner.run)
    assert code==0 and 'top5' in read_json(learner.run/'eval.json')['metrics'], err

@pytest.mark.parametrize('more,said', [(['--optim.warmup', 99], 'optim.warmup'), (['--train.metric', 'fame'], 'train.metric'), (['--train.batch_size', 999], 'batch'), ([], 'not a run folder')])
def test_what_is_wrong_is_told_before_a_cache_is_begun(world, tmp_path, more, said):
    if not more: (tmp_path/'wrong').mkdir(); (tmp_path/'wrong'/'own.txt').touch()
    with pytest.raises(VadnbError, match=said): fit(config(world, tmp_path, 'wrong', *given(world), '--cache.where', 'disk', '--cache.folder', tmp_path/'kept', *more))
    assert not (tmp_path/'kept').exists() and not [p for p in tmp_path.iterdir() if p.name!='wrong']
