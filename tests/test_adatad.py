"The whole of adatad in a very small world: train, stop, resume with twice the batch, evaluate, predict, report; bad input; two processes; real clips"
import json, re, shlex, shutil, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from command import vadnb
from test_processes import together
from toy_system import StopAt, curve, rows
from vadnb.core import CheckpointError, ConfigError, DataError, read_json, write_json, VadnbError
from vadnb.data.video import VideoReader
from vadnb.systems.adatad.scan import ActionScan
from vadnb.systems.registry import load_config, load_run
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.feed import look_through
from vadnb.train.learner import fit
from vadnb.worlds.motions import make_motions

SMALL = '''--data.window 64 --model.dim 16 --model.depth 1 --model.heads 2 --detector.channels 16 --detector.heads 2
    --detector.head_channels 16 --detector.arch [1,0,3] --train.batch_size 2 --train.steps 4 --train.evaluate_every 2
    --train.save_every 2 --train.log_every 1 --train.progress false --train.trackers [] --train.device cpu --optim.warmup 0
    --train.unit step --cache.use false --score.top 40 --score.most 40'''.split()

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return make_motions(tmp_path_factory.mktemp('adatad')/'world', videos=4, valid_videos=2, test_videos=1,
                        frames=(150, 160), rounds=(2, 3), rest=(10, 20), seed=1)

def words(world, runs, name, *more): return ['--data_root', world.root, '--runs', runs, '--name', name, *SMALL, *map(str, more)]
def config(world, runs, name, *more): return load_config('adatad_demo', [str(w) for w in words(world, runs, name, *more)])

@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    if 'run' not in request.fixturenames: monkeypatch.setattr(ActionScan, 'pictures', lambda self: {})

def parameters(run, parts=('backbone', 'detector', 'normalizer')):
    folder = find_checkpoint(run)
    return {f'{p}.{k}': v for p in parts for k,v in read_part(folder, p).items()}

# ---------------------------------------------------------------- the user's story

@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "Trained for two steps, then with twice the batch to the end"
    folder = tmp_path_factory.mktemp('runs')
    fit(config(world, folder, 'run', '--train.ema', .9), [StopAt(2)])
    code,out,err = vadnb('train', '--config', 'adatad_demo', *words(world, folder, 'run', '--train.ema', .9, '--train.batch_size', 4))
    assert code==0, err
    return folder/'run'

def test_a_run_goes_on_with_twice_the_batch(run):
    log = read_rows(run)
    assert [r['kind'] for r in log if r['kind'] in ('start', 'resume')]==['start', 'resume'] and log[-1]['status']=='done'
    resumed = next(r for r in log if r['kind']=='resume')
    assert resumed['changed']['train.batch_size']==[2, 4]
    trained = [r for r in log if r['kind']=='train']
    assert [r['step'] for r in trained]==[1, 2, 3, 4] and all(np.isfinite(r['loss']) for r in trained)
    assert all(r['loss']==pytest.approx(r['loss/cls']+r['loss/reg'], rel=1e-4) for r in trained)
    assert read_json(find_checkpoint(run)/'card.json')['facts']['classes']==['Leap', 'Leftward', 'Rightward', 'Swing']
    # nothing is wrong with it, and of what changed it is told
    assert [f['code'] for f in read_json(run/'health.json')['findings']]==['resumed_differently']

def read_rows(run): return [json.loads(line) for line in (run/'log.jsonl').read_text().splitlines()]

def test_a_run_is_measured(run):
    code,out,err = vadnb('eval', '--run', run)
    assert code==0 and 'mAP at tIoU' in out and 'map/mean' not in out and 'fixed grid' in out, err
    metrics = read_json(run/'eval.json')['metrics']
    assert 0<=metrics['map/mean']<=1 and 'baseline/map/mean/whole_video' in metrics and 'cure/map/0.5/missed' in metrics and 'mistake at tIoU 0.5' in out

def test_a_run_predicts_a_raw_video_and_says_what_it_reports(run, world, tmp_path):
    video = world.path(world.names('test')[0])
    code,out,err = vadnb('predict', video, '--run', run, '--out', tmp_path/'a', '--score.threshold', '0.001', '--overlay', 'true')
    assert code==0, err
    assert {p.suffix for p in (tmp_path/'a').iterdir()}>={'.json', '.csv', '.srt', '.png', '.mp4'}
    # the truth stands beside it, said by the annotation, in frames of the file
    *_,truth = read_json(next((tmp_path/'a').glob('*.layers.json')))['layers']
    events = read_json(world.annotation)['database'][world.names('test')[0]]['annotations']
    fps = VideoReader(video).fps
    assert truth['source']['system']=='annotation' and [(s['start'], s['end'], s['label']) for s in truth['segments']]==[(round(a*fps), round(b*fps), e['label']) for e in events for a,b in [e['segment']]]
    found = read_json(tmp_path/'a'/f'{video.stem}.json')
    assert found['segments'] and all(0<=s['seconds'][0]<s['seconds'][1]<=16 for s in found['segments'])
    system,_ = load_run(run)
    whole, = system.predict(video)
    few, = (load_run(run, overrides=['--train.valid_batch_size', '1'])[0]).predict(video)
    np.testing.assert_allclose(whole.segments, few.segments, atol=1e-4)

def test_a_folder_of_pictures_is_predicted_as_the_video_they_come_from(run, world, tmp_path):
    video = world.path(world.names('test')[0])
    for i,x in enumerate(VideoReader(video)): (tmp_path/'p').mkdir(exist_ok=True); Image.fromarray(x).save(tmp_path/'p'/f'{i:04}.png')
    code,_,err = vadnb('predict', tmp_path/'p', '--run', run, '--out', tmp_path/'out')
    assert code==2 and err.strip().endswith('a folder of pictures has no frame rate; give --score.folder_fps')
    rate = VideoReader(video).fps
    code,_,err = vadnb('predict', tmp_path/'p', '--run', run, '--out', tmp_path/'out', '--score.folder_fps', rate, '--overlay', 'true')
    assert code==0 and not err, err
    found,same = (next(load_run(run, overrides=['--score.folder_fps', str(rate)])[0].predict(p)) for p in (tmp_path/'p', video))
    np.testing.assert_allclose(found.segments, same.segments, atol=1e-3)
    np.testing.assert_allclose(found.scores, same.scores, atol=1e-4)
    (tmp_path/'p'/'0004.png').unlink()
    code,_,err = vadnb('predict', tmp_path/'p', '--run', run, '--out', tmp_path/'gap', '--score.folder_fps', rate)
    assert code==0 and 'the first between 0003.png and 0005.png: results count frames by their place' in err and len(err.splitlines())==1

def test_a_run_has_a_report_that_says_what_goes_wrong(run, tmp_path):
    "Of the validation data, before and after the test data were measured; each mistake with the mAP that its cure would give"
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    (own/'eval.json').unlink(missing_ok=True)
    def section():
        code,_,err = vadnb('report', '--run', own)
        assert code==0, err
        return re.search('(?s)<section id="mistakes">.*?</section>', (own/'report.html').read_text())[0]
    page = section()
    assert 'Measured on the validation data (epoch' in page
    for kind in ('missed', 'wrong class', 'badly placed', 'duplicate', 'background'): assert f'>{kind}<' in page
    best = [r for r in read_rows(own) if r['kind']=='valid'][-1]
    assert all(best[f'cure/map/0.5/{k}']>=0 for k in ('missed', 'background')) and best['cure/map/0.5/missed']>=best['map/0.5']
    vadnb('eval', '--run', own)
    assert 'Measured on the test data (step-00000' in section()

def test_a_prediction_has_the_scores_that_evaluation_has(world, tmp_path):
    "Of a network that names nothing, whose segments a classifier of whole videos names"
    names,test = [n for s in ('training', 'validation', 'test') for n in world.names(s)], world.names('test')[0]
    scores = {n: {c: .1+.2*k+.01*i for k,c in enumerate(sorted(world.classes))} for i,n in enumerate(names)}
    write_json(tmp_path/'scores.json', scores)
    write_json(tmp_path/'fewer.json', {n: v for n,v in scores.items() if n!=test})
    more = '--data.agnostic', 'true', '--score.video_scores', tmp_path/'scores.json', '--score.fusion', 'root'
    learner = fit(config(world, tmp_path/'runs', 'fused', '--train.steps', 2, *more))
    system,_ = load_run(learner.run)
    assert system.classes==['action'] and system.names==sorted(world.classes)
    scan = look_through(system, learner.data, 'test', system.cfg.train, torch.device('cpu'))
    system.calibration = None
    found, = system.predict(world.path(test))
    seen = scan.detections()[test]
    assert [system.names[c] for c in found.labels]==[r[0] for r in seen] and {r[0] for r in seen}=={*system.names[-2:]}
    np.testing.assert_allclose(np.column_stack([found.segments, found.scores]), [r[1:] for r in seen], atol=1e-4)
    few,_ = load_run(learner.run, overrides=['--score.video_scores', str(tmp_path/'fewer.json')])
    said, = few.predict(world.path(test))
    assert isinstance(said, DataError) and f'fewer.json: has no scores for {test}' in str(said) and 'score.threshold' in str(said)
    # a run that would miss them at its first evaluation does not begin
    with pytest.raises(DataError, match=f'no scores for 1 of 1 videos, such as {test}'):
        config(world, tmp_path/'runs', 'fused', *more[:3], tmp_path/'fewer.json').make_data().split('test')
    # a threshold of fused scores is none of those without
    known = dict(threshold=.4, precision=.5, recall=.5, tiou=.5, events=4, kept=4, of='validation', by='scores.json')
    alone,_ = load_run(learner.run, overrides=['--score.video_scores', 'null'])
    alone.calibration = known
    with pytest.raises(ConfigError, match='was set on scores of scores.json; give --score.threshold'): list(alone.predict(world.path(test)))
    # and a network that names nothing gives no names of its own
    alone.calibration = None
    unnamed, = alone.predict(world.path(test))
    assert unnamed.classes==['action'] and {r['label'] for r in unnamed.surest()}=={'action'}

def test_videos_that_nobody_annotated_count_where_that_is_asked_for(world, run, tmp_path):
    stranger = Path(world.path(world.names('test')[0])).with_name('stranger.mp4')
    shutil.copy(world.path(world.names('test')[0]), stranger)
    found = {}
    try:
        for how in ('drop', 'count'):
            code,out,err = vadnb('eval', '--run', run, '--score.unknown', how)
            assert code==0, err
            found[how] = read_json(run/'eval.json')['metrics']
            assert ('1 below raw_data/video are not in the annotation, such as stranger, and are not looked at' in err)==(how=='drop')
        code,_,err = vadnb('eval', '--run', run, '--score.unknown', 'error')
        assert code==2 and 'stranger' in err and 'score.unknown' in err
    finally: stranger.unlink()
    counts = [found[k]['count/detections_of_unknown_videos'] for k in ('drop', 'count')]
    assert counts[0]==0 and counts[1]>0 and found['count']['map/mean']<=found['drop']['map/mean']

def test_a_preset_reads_what_is_left_out_and_what_lies_outside(world, tmp_path):
    out = world.names('validation')[0]
    (tmp_path/'out.txt').write_text(f'{out}\n')
    def held(*more): return config(world, tmp_path, 'preset', '--data.preset', '211/3325', '--data.test', 'null', *more).make_data()
    assert out in held().annotation.videos and out not in held('--data.blocked', tmp_path/'out.txt').annotation.videos
    late = changed(world, tmp_path, lambda v: v['annotations'].append(dict(segment=[1., 400.], label='Leap')))
    assert held(*late, '--data.outside', 'cut').annotation.notes
    with pytest.raises(DataError, match='behind the end of the video.*outside cut'): held(*late).annotation

def test_a_run_says_what_of_the_annotation_it_does_not_use(world, tmp_path):
    def change(v): v['annotations'] += [v['annotations'][0], dict(segment=[1., 400.], label='Leap')]
    late = changed(world, tmp_path, change)
    learner = fit(config(world, tmp_path, 'cut', *late, '--data.outside', 'cut', '--data.valid', 'null', '--train.steps', 1))
    told = [f for f in read_json(learner.run/'health.json')['findings'] if f['code']=='left_out']
    assert [(f['severity'], len(f['evidence']['lines'])) for f in told]==[('note', 1)]*2
    assert 'written twice' in told[0]['message'] and '400 s is cut to the video' in told[1]['message']

def test_frames_in_memory_are_a_video(run, world):
    path = world.path(world.names('test')[0])
    fps = VideoReader(path).fps
    system,_ = load_run(run, overrides=['--score.threshold', '0.001', '--score.folder_fps', str(fps)])
    (a,),(b,) = system.predict(path), system.predict(VideoReader(path)[:])
    assert len(a.segments) and np.array_equal(a.segments, b.segments) and list(a.labels)==list(b.labels)

def test_a_detector_of_others_is_measured_and_used_without_a_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(config(world, tmp_path, 'run', '--train.ema', 'null')).run
    held,own = find_checkpoint(run), words(world, tmp_path, 'alone')
    given = ('--config', 'adatad_demo', *own, '--model.pretrained', 'true', '--model.weights', held/'backbone.safetensors', '--detector.weights', held/'detector.safetensors')
    video = world.path(world.names('test')[0])
    for words_ in (given, ('--run', run, '--which', 'last')):
        code,out,err = vadnb('eval', *words_)
        assert code==0, err
        code,out,err = vadnb('predict', video, *words_, '--score.threshold', '0.001')
        assert code==0, err
    alone = read_json('alone_eval.json')
    assert alone['checkpoint']=='backbone.safetensors and detector.safetensors' and alone['metrics']==read_json(run/'eval.json')['metrics']
    a,b = (read_json(next(Path(p).glob('*.layers.json')))['layers'] for p in ('alone_predictions', run/'predictions'))
    assert [{**l, 'source': 0} for l in a]==[{**l, 'source': 0} for l in b] and len(a)
    code,_,err = vadnb('predict', video, *given[:-2], '--out', tmp_path/'other')
    assert code==2 and "rest on model.weights and detector.weights, and 'detector.weights' is null" in err, err

# ---------------------------------------------------------------- what a checkpoint holds

def test_every_part_that_trains_is_in_the_optimizer_and_comes_back(world, tmp_path):
    plain = config(world, tmp_path, 'plain')
    torch.manual_seed(0)
    backbone = plain.build(plain.make_data().facts()).backbone.state_dict()
    save_file({k: v for k,v in backbone.items() if 'adapter' not in k}, tmp_path/'w.safetensors')
    given = '--model.frozen', 'true', '--model.pretrained', 'true', '--model.weights', tmp_path/'w.safetensors'
    learner = fit(config(world, tmp_path, 'frozen', '--train.steps', 2, '--train.ema', 'null', *given))
    system = learner.system
    trains = {n for n,p in system.named_parameters() if p.requires_grad}
    assert {id(p) for g in learner.optimizer.param_groups for p in g['params']}=={id(dict(system.named_parameters())[n]) for n in trains}
    assert all(n.startswith('detector') or 'adapter' in n for n in trains)
    folder = find_checkpoint(learner.run)
    card = read_json(folder/'card.json')
    assert sorted(card['parts'])==['adapters', 'detector', 'normalizer'] and len(card['provenance']['digest'])==16
    held = sum(v.numel() for p in card['parts'] for v in read_part(folder, p).values())
    assert held==sum(p.numel() for p in system.parameters() if p.requires_grad)+1
    read,_ = load_run(learner.run, 'last')
    for k,v in system.state_dict().items(): assert torch.equal(v, read.state_dict()[k]), k
    # other frozen weights are refused
    save_file({k: v+1 for k,v in load_file(tmp_path/'w.safetensors').items()}, tmp_path/'w.safetensors')
    with pytest.raises(CheckpointError, match='give the file it came from'): load_run(learner.run, 'last')

@pytest.mark.parametrize('harm,says', [
    (dict(facts=dict(classes=['Leap', 'Leap'])), 'facts.classes: must be a list of different names'),
    (dict(facts=dict(classes=['Leap', 'Leftward', 'Rightward', 'Swing'], stride=4)), 'facts.stride: is unknown'),
    (dict(calibration=dict(step=4, value=dict(threshold='high'))), 'segment threshold: must hold threshold')])
def test_a_card_of_a_stranger_is_named(run, tmp_path, harm, says):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    for p in own.rglob('card.json'): write_json(p, read_json(p) | harm)
    with pytest.raises(CheckpointError, match=f'card.json: {says}'): load_run(own)

# ---------------------------------------------------------------- golden

def test_the_whole_detector_of_the_reference(shared):
    "Losses, gradients and three steps of a tiny one"
    path = shared/'golden'/'adatad'/'adatad_e2e'
    meta,gold = json.loads(path.with_suffix('.json').read_text()), load_file(path.with_suffix('.safetensors'))
    c = meta['config']
    given = {'data.window': c['window'], 'data.size': [c['H'], c['W']], 'data.short_side': c['H'], 'data.classes': list('abcde'),
             'model.dim': c['embed'], 'model.depth': c['depth'], 'model.heads': c['heads'], 'model.patch_size': c['patch'],
             'model.image_size': c['img_size'], 'model.frozen': True, 'detector.channels': c['out_channels'], 'detector.head_channels': c['feat_channels'],
             'detector.heads': c['n_head'], 'detector.arch': c['arch'], 'detector.ranges': c['regression_range'], 'detector.reference': True,
             'optim.lr': c['lr'], 'rates.adapters': 2., 'optim.weight_decay': .05}
    cfg = load_config('adatad_demo', [w for k,v in given.items() for w in (f'--{k}', json.dumps(v))])
    system = cfg.build()
    unused = system.load_reference({k[3:]: v for k,v in gold.items() if k.startswith('sd/')})
    assert all('fc_norm' in k for k in unused)
    batch = dict(frames=gold['frames_u8'][:,0].transpose(1, 2).contiguous(), mask=gold['masks'].bool(),
                 segments=[gold[f'gt/segments{i}'] for i in (0, 1)], labels=[gold[f'gt/labels{i}'].long() for i in (0, 1)])
    close = meta['tolerances']
    system.eval()
    with torch.no_grad():
        found,losses = system.detector.decode(system.answers(batch)), system.loss(batch)
    for i,(segments,scores) in enumerate(found):
        torch.testing.assert_close(segments, gold[f'eval/proposals{i}'], rtol=0, atol=close['eval_atol'])
        torch.testing.assert_close(scores, gold[f'eval/scores{i}'], rtol=0, atol=close['eval_atol'])
    expected = meta['expected']['eval_losses']
    for k,name in (('loss/cls', 'cls_loss'), ('loss/reg', 'reg_loss'), ('loss', 'cost')):
        assert losses[k].item()==pytest.approx(expected[name], rel=close['loss_rtol']), k
    system.train()
    optimizer = torch.optim.AdamW(system.groups(), lr=c['lr'])
    for step,wanted in enumerate(meta['expected']['train_steps']):
        optimizer.zero_grad()
        losses = system.loss(batch)
        losses['loss'].backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g['params']], 1.)
        optimizer.step()
        system.after_step()
        near = dict(rel=close['step_losses_rtol'][step])
        assert losses['loss'].item()==pytest.approx(wanted['cost'], **near), step
        assert system.criterion.normalizer.item()==pytest.approx(wanted['loss_normalizer'], rel=1e-5)
        if not step: assert norm.item()==pytest.approx(wanted['grad_norm'], rel=1e-3)

# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('more,says', [
    (('--data.valid', 'validatoin'), "did you mean 'validation'"), (('--data.videos', 'nowhere'), 'nowhere'),
    (('--data.window', '60'), 'use a window of 48 or 64'), (('--data.annotation', 'none.json'), 'none.json'),
    (('--model.pretrained', 'true', '--model.weights', 'missing.pth'), 'missing.pth'),
    (('--model.pretrained', 'true'), 'names nothing'), (('--data.classes', '["Leap"]'), 'none of the 1 classes')])
def test_what_cannot_be_is_said_in_one_line(world, tmp_path, more, says):
    code,_,err = vadnb('train', '--config', 'adatad_demo', *words(world, tmp_path, 'bad', *more))
    assert code==2 and says in err and len(err.strip().splitlines())==1
    assert not (tmp_path/'bad'/'checkpoints').exists()

def advice(world, folder, *more):
    "What `vadnb verify` says, by row"
    code,out,err = vadnb('verify', '--config', 'adatad_demo', *words(world, folder, 'advised', *more))
    rows = [re.match('(ok|warn|FAIL) +(\\w+(?: \\w+)?)  +(.*)', l) for l in out.splitlines()]
    return code, {m[2]: (m[1], m[3]) for m in rows if m}, out

def test_weights_that_are_missing_hide_no_advice_and_what_is_proposed_can_be_pasted(world, tmp_path):
    lost = '--model.pretrained', 'true', '--model.weights', 'missing.pth'
    code,found,_ = advice(world, tmp_path, *lost)
    assert code==1 and found['weights']==('FAIL', 'missing.pth: no such file or folder of weights; check the path')
    assert [k for k,(ok,_) in found.items() if ok=='FAIL']==['weights']
    assert {'annotation', 'model', 'memory', 'window', 'actions', 'proposal', 'epoch', 'steps', 'one batch'}<=found.keys()
    assert '64 positions x 1 frame each = 64 frames = 4 chunks of 16' in found['window'][1]
    options = shlex.split(found['proposal'][1].partition(' (then')[0])
    assert {'--data.window', '--data.stride', '--detector.arch', '--detector.ranges'}<={*options}
    code,again,out = advice(world, tmp_path, *options)
    assert code==0 and again['proposal'][1]==found['proposal'][1], out

def test_advice_speaks_of_what_there_is(world, tmp_path):
    "Whole videos have no stride, features no frames and no chunks; without a video the annotation tells"
    _,whole,out = advice(world, tmp_path, '--data.whole', 'true', '--data.frames_per_position', 2)
    assert '64 positions x 2 frames each = 128 frames = 8 chunks of 16, spread over each whole video' in whole['window'][1]
    frames = sum(v['frame'] for v in json.loads(world.annotation.read_text())['database'].values() if v['subset']=='training')
    assert f'up to {frames} source frames' in whole['epoch'][1] and '--data.stride' not in out and '--detector.ranges' in whole['proposal'][1]
    for n in world.names('training')+world.names('validation')+world.names('test'):
        np.save(tmp_path/f'{n}.npy', np.zeros((json.loads(world.annotation.read_text())['database'][n]['frame']//2, 6), np.float16))
    code,features,out = advice(world, tmp_path, '--features.folder', tmp_path, '--features.channels', 6, '--features.clip', 2, '--data.stride', 2)
    assert code==0 and '64 positions of one feature each' in features['window'][1] and 'nothing is decoded' in features['epoch'][1]
    assert 'chunk' not in out and 'frames_per_position' not in out and '--data.stride' not in out
    code,nothing,_ = advice(world, tmp_path, '--data.videos', 'nowhere')
    assert code==1 and [k for k,(ok,_) in nothing.items() if ok=='FAIL']==['train videos'] and nothing['proposal'][0]=='ok'

def changed(world, folder, change):
    "A copy of the annotation in which one video is another"
    database = json.loads(world.annotation.read_text())
    name = world.names('training')[0]
    change(database['database'][name])
    write_json(folder/'anno.json', database)
    return '--data.annotation', folder/'anno.json'

@pytest.mark.parametrize('change,says', [
    (lambda v: v['annotations'].append(dict(segment=[1., 400.], label='Leap')), 'behind the end'),
    (lambda v: v['annotations'].append(dict(segment=[3., 2.], label='Leap')), 'ends before it starts'),
    (lambda v: v.update(frame=400), '400')])
def test_annotation_that_is_wrong_names_its_video(world, tmp_path, change, says):
    code,_,err = vadnb('train', '--config', 'adatad_demo', *words(world, tmp_path, 'bad', *changed(world, tmp_path, change), '--train.drop_last', 'false'))
    assert code==2 and says in err and world.names('training')[0] in err

def test_features_in_place_of_videos(world, tmp_path):
    for n in (*world.names('training'), *world.names('validation')):
        video = json.loads(world.annotation.read_text())['database'][n]
        # one feature for every second frame
        np.save(tmp_path/f'{n}.npy', np.random.default_rng(0).standard_normal((video['frame']//2, 6)).astype(np.float16))
    more = '--features.folder', tmp_path, '--features.channels', 6, '--features.clip', 2, '--data.stride', 2
    learner = fit(config(world, tmp_path/'runs', 'features', '--train.steps', 2, *more))
    assert sorted(read_json(find_checkpoint(learner.run)/'card.json')['parts'])==['detector', 'normalizer']
    assert 'map/mean' in learner.metrics
    with pytest.raises(DataError, match='channels'): fit(config(world, tmp_path/'runs', 'width', *more, '--features.channels', 7))
    with pytest.raises(ConfigError, match='reads feature files'): list(learner.system.predict(world.path(world.names('test')[0])))

# ---------------------------------------------------------------- processes, devices

def train(world, folder, name, batch):
    ActionScan.pictures = lambda self: {}
    learner = fit(config(world, folder, name, '--train.batch_size', batch, '--train.steps', 2, '--optim.name', 'sgd', '--optim.lr', '.01'))
    import os
    (folder/f"{name}.metrics{os.environ.get('RANK', '0')}").write_text(json.dumps(learner.metrics))

def test_two_processes_are_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ActionScan, 'pictures', lambda self: {})
    train(world, tmp_path, 'one', 4)
    together(tmp_path/'two', train, world, tmp_path, 'two', 2)
    one,two = parameters(tmp_path/'one'), parameters(tmp_path/'two')
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=0, atol=2e-2, msg=lambda s: f'{k}: {s}')
    found = [json.loads((tmp_path/f).read_text()) for f in ('one.metrics0', 'two.metrics0', 'two.metrics1')]
    assert found[1]==found[2] and found[0].keys()==found[1].keys()

def built(world, folder, device):
    torch.manual_seed(0)
    cfg = config(world, folder, 'cuda', '--augment.use', 'true', '--model.drop_path', 0)
    data = cfg.make_data()
    system = cfg.build(data.facts())
    train = data.split('train')
    batch = data.collate([train.draw(i, np.random.default_rng(i)) for i in range(2)])
    return system.to(device).train(), batch, data

def test_a_gpu_that_is_not_there_gives_the_numbers_of_the_cpu(world, tmp_path, on_cuda):
    from pretend_cuda import DEVICE
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from vadnb.train.feed import to_device
    video = world.path(world.names('test')[0])
    def everything(device):
        system,batch,data = built(world, tmp_path, device)
        losses = system.loss(to_device(batch, device))
        losses['loss'].backward()
        res = {k: v.detach().cpu() for k,v in losses.items()}
        res |= {n: p.grad.cpu() for n,p in system.named_parameters() if p.grad is not None and '.key' not in n}
        system.eval()
        with torch.no_grad():
            scan = look_through(system, data, 'valid', system.cfg.train, device)
            predicted, = system.predict(video)
        return res, scan.metrics(), predicted.segments
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = everything('cpu')
        with on_cuda(): found = everything(DEVICE)
    for k in plain[0]: torch.testing.assert_close(found[0][k], plain[0][k], rtol=1e-3, atol=1e-5, msg=lambda s: f'{k}: {s}')
    assert found[1]==pytest.approx(plain[1], abs=1e-3) and len(found[2])==len(plain[2])

def test_a_step_waits_for_nothing(world, tmp_path, on_cuda):
    from pretend_cuda import DEVICE
    from vadnb.train.feed import to_device
    with on_cuda() as device:
        system,batch,_ = built(world, tmp_path, DEVICE)
        batch = to_device(batch, DEVICE)
        device.waits.clear()
        system.loss(batch)['loss'].backward()
        assert device.total==0, device.listed()

# ---------------------------------------------------------------- real clips

CLIPS = {'torchvision/v_SoccerJuggling_g23_c01.avi': [('juggle', .5, 3.)], 'torchvision/v_SoccerJuggling_g24_c01.avi': [('juggle', 1., 4.)],
         'ucf101/v_ApplyEyeMakeup_g01_c01.avi': [('makeup', .5, 4.)], 'mmaction2/demo.mp4': [('arm', 1., 5.)]}

def test_real_clips_train_a_tiny_one_that_predicts_others(shared, tmp_path):
    database = {}
    (tmp_path/'videos').mkdir()
    for k,(file,events) in enumerate(CLIPS.items()):
        source = shared/'data'/'video'/file
        reader = VideoReader(source)
        shutil.copy(source, tmp_path/'videos'/source.name)
        end = len(reader)/reader.fps
        database[source.stem] = dict(subset='validation' if k==3 else 'training', duration=end, frame=len(reader),
                                     annotations=[dict(label=l, segment=[s, min(e, .9*end)]) for l,s,e in events])
    write_json(tmp_path/'anno.json', dict(database=database))
    class Root: root = tmp_path
    more = '--data.annotation', 'anno.json', '--data.videos', 'videos', '--data.test', 'null', '--data.stride', 4, '--data.window', 32, '--train.batch_size', 3
    learner = fit(config(Root, tmp_path/'runs', 'real', '--train.steps', 3, *more))
    crime = next((shared/'data'/'ucf_crime').rglob('*.mp4'), None)
    for video in (shared/'data'/'video'/'torchcodec'/'nasa_13013.mp4', *([crime] if crime else [])):
        found, = learner.system.predict(video)
        assert not isinstance(found, Exception), found
        assert found.frames==len(VideoReader(video)) and np.isfinite(found.scores).all()
        assert found.segments.min()>=0 and found.segments.max()<=found.duration+1e-6
    broken, = learner.system.predict(shared/'data'/'video'/'decord'/'corrupted.mp4')
    assert isinstance(broken, DataError) and '50' in str(broken) and '28' in str(broken)

@pytest.mark.parametrize('more,said', [(['--optim.warmup', 99], 'optim.warmup'), (['--train.metric', 'fame'], 'train.metric'), (['--train.batch_size', 999], 'batch'), ([], 'not a run folder')])
def test_what_is_wrong_is_told_before_a_cache_is_begun(world, tmp_path, more, said):
    if not more: (tmp_path/'wrong').mkdir(); (tmp_path/'wrong'/'own.txt').touch()
    with pytest.raises(VadnbError, match=said): fit(config(world, tmp_path, 'wrong', '--cache.use', 'true', '--cache.folder', tmp_path/'kept', *more))
    assert not (tmp_path/'kept').exists() and not [p for p in tmp_path.iterdir() if p.name!='wrong']
