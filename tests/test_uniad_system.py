"The whole of uniad in small worlds: data of every form, protocols, cache, checkpoints, thresholds, evaluation and prediction, against planted faults and independent references"
import csv, functools, json, pickle, shutil, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from command import vadnb
from test_uniad_golden import layout, official
from toy_system import FailAt, StopAt, curve, differences, rows
from vadnb.core import CheckpointError, DataError, read_json, write_json
from vadnb.worlds.textures import texture_world
from vadnb.data.anomaly_images import AnomalyImages
from vadnb.data.image_lists import write_meta
from vadnb.data.mvtec import read_tree, write_tree_meta
from vadnb.metrics.anomaly_maps import image_scores
from vadnb.metrics.pixel_anomaly import SEVEN, pixel_metrics
from vadnb.systems.registry import load_config, load_run
from vadnb.systems.uniad.data import UniADData
from vadnb.systems.uniad.scan import ImageScan
from vadnb.systems.uniad.system import UniADSystem
from vadnb.train.callbacks import Callback
from vadnb.data.shards import row_bytes
from vadnb.train.checkpoint import find_checkpoint
from vadnb.train.feature_cache import CachedFeatures
from vadnb.train.feed import look_through
from vadnb.train.learner import fit

SMALL = '''--data.size [64,64] --data.hold_out 0.4 --model.backbone test_resnet --model.hidden_dim 32 --model.nhead 4 --model.dim_feedforward 32 --model.dropout 0.1 --optim.warmup 0 --train.batch_size 4 --train.drop_last false --train.epochs 2
    --train.evaluate_every 2 --train.save_every 1 --train.log_every 1 --train.progress false --train.trackers [] --train.device cpu'''.split()

def words(world, runs, name, *more): return ['--data_root', str(world), '--runs', str(runs), '--name', name, *SMALL, *map(str, more)]
def config(world, runs, name, *more): return load_config('uniad_demo', words(world, runs, name, *more))
def train(world, runs, name, *more, callbacks=()): return fit(config(world, runs, name, *more), callbacks)

# learning twelve images takes three steps an epoch: held out are four, and as many with planted defects
@pytest.fixture(scope='module')
def world(tmp_path_factory): return texture_world(tmp_path_factory.mktemp('uniad')/'world', ['dots', 'weave'], train=8, good=3, defective=6, size=(64, 64)).root

@pytest.fixture
def copy(world, tmp_path): return Path(shutil.copytree(world, tmp_path/'world'))

@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "A run made by the command line, with everything it draws; its data are gone afterwards"
    folder = tmp_path_factory.mktemp('run')
    own = shutil.copytree(world, folder/'world')
    code,out,err = vadnb('train', '--config', 'uniad_demo', *words(own, folder, 'run', '--train.trackers', '["tensorboard"]'))
    assert code==0, err
    shutil.rmtree(own)
    return folder/'run'

@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    "Only the run above draws, which takes longer than training"
    if 'run' not in request.fixturenames: monkeypatch.setattr(ImageScan, 'pictures', lambda self: {})

@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    "Learners by the words they were given, each trained once"
    folder = tmp_path_factory.mktemp('runs')
    @functools.cache
    def get(*more): return train(world, folder/str(len(list(folder.iterdir()))), 'run', *more)
    return get

def contents(*folders):
    "Every file below, with its bytes and its time"
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for folder in folders for p in sorted(Path(folder).rglob('*')) if p.is_file()}

def refuse(*words):
    "The one line that a command says before it leaves with code 2"
    code,out,err = vadnb(*words)
    assert code==2 and out=='' and err.count('\n')==1 and err.startswith('vadnb: error: '), out+err
    return err

def samples(data): return {s['name']: s for s in (data[i] for i in range(len(data)))}
def picture(path, size=(64, 64), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path

# ---------------------------------------------------------------- what is refused

@pytest.fixture(scope='module')
def stopped(world, tmp_path_factory):
    "A run that waits for its last epoch, with its features on disk"
    runs = tmp_path_factory.mktemp('stopped')/'runs'
    train(world, runs, 'begun', '--data.cache', 'disk', callbacks=[StopAt(3)])
    return runs

@pytest.fixture
def begun(copy, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path/'runs', symlinks=True)
    return copy

def cut(path): path.write_bytes(path.read_bytes()[:60])
def larger(path): Image.new('L', (65, 64)).save(path)
def lines(root, change):
    "The official lists of a world, with the test rows changed"
    write_tree_meta(root, root)
    test = [json.loads(line) for line in (root/'test.json').read_text().splitlines()]
    change(test)
    (root/'test.json').write_text(''.join(json.dumps(r)+'\n' for r in test))

LISTS = '--data.train train.json --data.test test.json'
HARM = {
    'size of a mask': (lambda w: larger(next((w/'dots/ground_truth').rglob('*.png'))), '--data.protocol paper', ['dots/ground_truth/', 'is 65x64, its image', 'is 64x64', 'maskname', 'a mask has the size of its image']),
    'mask without image': (lambda w: next((w/'dots/test').glob('[!g]*/*.png')).unlink(), '', ['dots/ground_truth/', 'is a mask without image', 'rename the mask or take it away']),
    'class not in the data': (lambda w: None, '--data.classes ["dots","weav"]', ["classes: 'weav' has no image", "did you mean 'weave'?"]),
    'class not learned': (lambda w: lines(w, lambda test: test[0].update(clsname='dotz')), LISTS, ['test.json, line 1, clsname', "'dotz' is not a class of the training list (dots, weave)", "did you mean 'dots'?"]),
    'defect to learn from': (lambda w: lines(w, lambda test: None), '--data.train test.json', ['test.json, line ', 'label', 'is defective and in the training list']),
    'image twice': (lambda w: lines(w, lambda test: test[0].update(filename='dots/train/good/000.png')), LISTS, ['test.json, line 1, filename', "'dots/train/good/000.png' is in the training list too"]),
    'unknown field': (lambda w: lines(w, lambda test: test[2].update(mask=test[2].pop('maskname', ''))), LISTS, ['test.json, line 3, mask', "did you mean 'maskname'?"]),
    'image not there': (lambda w: lines(w, lambda test: test[1].update(filename='dots/test/good/999.png')), f'{LISTS} --data.protocol paper', ['test.json, line 2, filename', 'dots/test/good/999.png is not there']),
    'empty class': (lambda w: [p.unlink() for p in (w/'weave/train/good').iterdir()], '', ["weave/train/good: class 'weave' is empty", 'add good images or take the class away']),
    'class of one image': (lambda w: [p.unlink() for p in sorted((w/'weave/train/good').iterdir())[1:]], '', ["class 'weave': has 1 good images", 'at least 2']),
    'no list': (lambda w: None, '--data.train tarin.json', ['tarin.json: no such list of images', '--data.train']),
    'no test list': (lambda w: None, '--data.test tset.json', ['tset.json']),
    'no test images': (lambda w: [shutil.rmtree(w/c/k) for c in ('dots', 'weave') for k in ('test', 'ground_truth')], '--data.protocol paper', ["'data.protocol' is paper", 'data.test', 'held_out']),
    'corrupt image': (lambda w: cut(w/'dots/train/good/003.png'), '', ['dots/train/good/003.png cannot be decoded', 'copy it again or take it out']),
    'corrupt image of the test': (lambda w: cut(w/'dots/test/good/001.png'), '--data.protocol paper', ['dots/test/good/001.png cannot be decoded']),
    'stride': (lambda w: None, '--data.size [60,64]', ["'data.size'", 'height 60 is not a multiple of the stride 8', 'use 56 or 64']),
    'window': (lambda w: None, '--model.neighbor_size [17,17]', ["'model.neighbor_size'", '(17, 17)', '(8, 8)', 'use a smaller window or a larger input']),
    'pool': (lambda w: None, '--score.pool [65,8]', ["'score.pool'", 'within data.size', '[65, 8]']),
    'backbone': (lambda w: None, '--model.backbone resnet81', ["timm has no 'resnet81'", 'nearest: ', 'resnet18']),
    'map of the backbone': (lambda w: None, '--model.strides [4,64]', ['test_resnet', 'no map of stride 64', '2, 4, 8, 16, 32']),
    'width': (lambda w: None, '--model.hidden_dim 48', ['checkpoints/step-000003/head.safetensors: does not fit this model', 'other shapes', 'input_proj.weight (32, ', ' instead of (48, ', 'use the configuration it was trained with']),
    'depth': (lambda w: None, '--model.num_decoder_layers 2', ['does not fit this model', 'missing', 'transformer.decoder.layers.1.']),
    'grid': (lambda w: None, '--data.size [64,96]', ['does not fit this model', 'pos_embed.col_embed.weight (8, 16) instead of (12, 16)']),
    'weights': (lambda w: torch.save({'input_proj.weight': torch.zeros(32, 5)}, w/'w.pth'), '--name other --model.weights {w}/w.pth --model.start xavier', ['w.pth: lacks input_proj.bias and 37 more (38 of 39 tensors)']),
    'no weights': (lambda w: None, '--name other --model.weights {w}/none.pth --model.start xavier', ['none.pth: no such file']),
    'weights that are thrown away': (lambda w: None, '--model.weights w.pth --model.start data', ["'model.start' is data and 'model.weights' is set", 'set one of them']),
    'backbone weights': (lambda w: torch.save({'conv1.weight': torch.zeros(1)}, w/'b.pth'), '--model.pretrained true --model.backbone_weights {w}/b.pth', ['b.pth', "tensors of 'test_resnet' are missing", "give timm's own weights"]),
    'weights nobody reads': (lambda w: None, '--model.backbone_weights b.pth', ["'model.backbone_weights' is set but 'model.pretrained' is false"]),
    'cache nobody fills': (lambda w: None, '--data.cache memory --data.cache_folder here', ["'data.cache_folder' is set but 'data.cache' is memory"]),
    'cache too small': (lambda w: None, '--data.cache_gb 0.00001', ['cache_gb', 'allowed are 10 kB', 'set cache_gb to']),
    'loss': (lambda w: None, '--loss.criterion {"FeatureMSE":1}', ['FeatureMSE', "did you mean 'FeatureMSELoss'?"]),
    'metric': (lambda w: None, '--train.metric pixel_aroc', ["'train.metric' is 'pixel_aroc'", "did you mean 'pixel_auroc'?"]),
    'false alarms': (lambda w: None, '--score.false_alarm_rate 1.5', ["'score.false_alarm_rate' must be between 0 and 1, found 1.5"]),
}

@pytest.mark.parametrize('harm', HARM)
def test_one_line_and_nothing_is_lost(begun, tmp_path, harm):
    "The start of an interrupted run, or of another one, with something wrong; folders, cache and sources stay as they are"
    plant,some,says = HARM[harm]
    plant(begun)
    before = contents(tmp_path)
    err = refuse('train', '--config', 'uniad_demo', *words(begun, tmp_path/'runs', 'begun', '--data.cache', 'disk', *some.format_map(dict(w=begun)).split() if '{w}' in some else some.split()))
    for s in says: assert s in err, err
    after = contents(tmp_path)
    assert {p: after.get(p) for p in before}==before
    # features of another size are another row of the cache, which is all that may come
    assert all(p.parent.parent==tmp_path/'runs'/'features' for p in after.keys()-before)

def test_weights_of_another_shape_for_a_start(world, tmp_path):
    from vadnb.models.uniad import UniAD
    torch.save(dict(state_dict={f'module.reconstruction.{k}': v for k,v in UniAD(80, 8, (8, 8), 48, 4, 1, 1, 32, neighbor_size=(3, 3)).state_dict().items()}), tmp_path/'w.pth.tar')
    err = refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'run', '--model.weights', tmp_path/'w.pth.tar', '--model.start', 'xavier'))
    assert 'w.pth.tar: module.reconstruction.input_proj.weight and' in err and 'has shape (48, 80), the model needs (32, 80)' in err
    assert not (tmp_path/'run').exists()

def test_unreadable_images_are_skipped_where_that_is_asked_for(copy, tmp_path):
    bad = config(copy, tmp_path, 'x').make_data().split('train').records[3]
    cut(copy/bad.name)
    learner = train(copy, tmp_path, 'skips', '--data.cache', 'off', '--model.start', 'xavier', '--train.on_bad_sample', 'skip')
    assert learner.step==6 and all(bad.name in reason for reason in learner.skipped) and sum(learner.skipped.values())==2
    found = [f for f in read_json(tmp_path/'skips'/'health.json')['findings'] if f['code']=='skipped_samples']
    assert len(found)==1 and bad.name in str(found[0])

def test_a_start_from_given_weights(trained, world, tmp_path):
    "What training begins with is what the file holds; what has no place is said"
    head = trained().system.head.state_dict()
    save_file({**{k: v.clone() for k,v in head.items()}, 'more.weight': torch.zeros(2)}, tmp_path/'w.safetensors')
    start = {}
    class Look(Callback):
        def before_fit(self): start.update({k: v.clone() for k,v in self.learner.system.head.state_dict().items()})
    learner = train(world, tmp_path, 'run', '--model.weights', tmp_path/'w.safetensors', '--model.start', 'xavier', callbacks=[Look(), StopAt(1)])
    assert start.keys()==head.keys() and all(torch.equal(v, head[k]) for k,v in start.items())
    assert learner.system.unused_weights==['more.weight']
    notes = [f for f in read_json(learner.run/'health.json')['findings'] if f['code']=='unused_weights']
    assert len(notes)==1 and 'more.weight' in notes[0]['message'] and 'w.safetensors' in notes[0]['message']
    # a finished run needs the file no more
    (tmp_path/'w.safetensors').unlink()
    assert torch.equal(load_run(learner.run)[0].head.input_proj.weight, learner.system.head.input_proj.weight)

def test_checkpoints_of_another_model_are_refused(run):
    for some,says in (('--model.hidden_dim 48', 'input_proj.weight (32, '), ('--model.backbone resnet34', "'model.backbone' is resnet34, the run was trained with test_resnet; set it back")):
        for command in ('eval', 'predict'): assert says in refuse(command, *[run.parent]*(command=='predict'), '--run', run, *some.split())

# ---------------------------------------------------------------- data

def visa_table(root, path):
    with open(path, 'w', newline='') as f:
        table = csv.writer(f)
        table.writerow(['object', 'split', 'label', 'image', 'mask'])
        for split,found in read_tree(root).items():
            for r in found: table.writerow([r.cls, split, ('normal', 'anomaly')[r.label], r.name, r.mask or ''])
    return path

@pytest.fixture
def fed(world, tmp_path):
    "Data as a run sees them"
    def f(*more, root=None):
        torch.manual_seed(0)
        cfg = config(root or world, tmp_path/'built', 'built', *more)
        data = cfg.make_data()
        system = cfg.build(data.facts())
        system.start(True)
        return system.feed(data, True)
    return f

@pytest.mark.parametrize('form', ['lists', 'table'])
def test_the_same_images_in_another_form(world, fed, tmp_path, form):
    "Features, masks, labels and what is held out do not depend on how the images were named to us"
    if form=='lists': write_tree_meta(world, tmp_path); some = f'--data.train {tmp_path}/train.json --data.test {tmp_path}/test.json'
    else: some = f"--data.train {visa_table(world, tmp_path/'1cls.csv')}"
    for protocol in ('held_out', 'paper'):
        a,b = (fed('--data.protocol', protocol, *more.split()) for more in ('', some))
        for x,y in ((d.split(name) for d in (a, b)) for name in ('train', 'valid', 'test')):
            assert x.fingerprint()==y.fingerprint() and x.classes==y.classes==['dots', 'weave']
            x,y = samples(x), samples(y)
            # behind the test images of the paper stand those that set thresholds
            assert list(x)==list(y) and len(x) in (10, 12, 16, 18, 18+16)
            for n in x: assert all(torch.equal(v, y[n][k]) for k,v in x[n].items() if torch.is_tensor(v)), n

def test_a_plain_folder(world, fed, tmp_path):
    "Good images are divided, defective ones are tested, masks lie in one heap"
    root = tmp_path/'nuts'
    for r in read_tree(world)['train']+read_tree(world)['test']:
        if r.cls!='dots': continue
        half,kind,name = r.name.split('/')[1:]
        (root/kind).mkdir(parents=True, exist_ok=True); (root/'masks').mkdir(exist_ok=True)
        shutil.copy(world/r.name, root/kind/f'{half}_{kind}_{name}')
        if r.mask: shutil.copy(world/r.mask, root/'masks'/f'{half}_{kind}_{name.removesuffix(".png")}_mask.png')
    data = fed('--data.train', 'nuts', root=tmp_path)
    learn,held,test = (data.split(name) for name in ('train', 'valid', 'test'))
    good = len(list((root/'good').iterdir()))
    assert good==11 and test.counts()=={'nuts': dict(good=round(.2*11), defective=6, unmasked=0)} and len(learn)+len(held)//2==9
    names = [set(samples(d)) for d in (learn, held, test)]
    assert not names[0]&names[1] and not names[0]&names[2] and not names[1]&names[2]
    assert {s['mask'].any().item()==bool(s['label']) for s in samples(test).values()}=={True}

def test_defects_without_mask(copy, tmp_path):
    "They count as images, not as pixels, and are said to"
    whole = train(copy, tmp_path, 'whole', '--data.protocol', 'paper')
    before = whole.metrics
    gone = [r for r in read_tree(copy)['test'] if r.mask][::5]
    for r in gone: (copy/r.mask).unlink()
    learner = train(copy, tmp_path, 'without', '--data.protocol', 'paper')
    m,scan = learner.metrics, learner.scan
    masks = [scan.mask(i) for i in range(len(scan))]
    assert len(gone)==3 and [n for n,mask in zip(scan.names, masks) if mask is None]==[r.name for r in gone]
    assert m['pooled/images']==before['pooled/images']==18 and {k: m[k] for k in m if 'image_' in k}=={k: before[k] for k in m if 'image_' in k}
    assert m['pixel_auroc']!=before['pixel_auroc']
    masked = {n: i for i,n in enumerate(scan.names) if masks[i] is not None}
    by = lambda values: {n: values[i] for n,i in masked.items()}
    own = pixel_metrics(by([learner.system.full(x) for x in scan.maps]), by(masks), by(scan.labels), by(scan.classes), 'max', (8, 8))
    for k in ('pixel_auroc', 'pixel_ap', 'pixel_f1max', 'aupro'): assert m[k]==pytest.approx(own[f'mean/{k}'], abs=1e-9)
    note = [f for f in read_json(tmp_path/'without'/'health.json')['findings'] if f['code']=='no_mask']
    assert len(note)==1 and note[0]['severity']=='note' and '3 defective images have no mask' in str(note[0]) and gone[0].name in str(note[0])
    assert not [f for f in read_json(tmp_path/'whole'/'health.json')['findings'] if f['code']=='no_mask']
    code,out,_ = vadnb('verify', '--config', 'uniad_demo', *words(copy, tmp_path, 'v', '--data.protocol', 'paper'))
    assert code==0 and any(line.startswith('warn') and '3 defective images have none' in line for line in out.splitlines())

def test_masks_are_plain_booleans(world):
    "A true pixel is the byte 1, however the file was decoded: what reads bytes must not see 255"
    data = AnomalyImages(read_tree(world)['test'], world, (64, 64))
    half = AnomalyImages(read_tree(world)['test'], world, (32, 32))
    assert {int(v) for d in (data, half) for s in d for v in s['mask'].numpy().view(np.uint8).ravel()}=={0, 1}

# ---------------------------------------------------------------- protocols

def test_held_out_needs_no_test_image(copy, world, tmp_path):
    "Without the test folders training gives the same bits"
    for c in ('dots', 'weave'):
        for k in ('test', 'ground_truth'): shutil.rmtree(copy/c/k)
    a,b = train(world, tmp_path/'a', 'run'), train(copy, tmp_path/'b', 'run')
    assert curve(a.run)==curve(b.run) and len(curve(a.run))>6 and differences(a.run, b.run)==[]
    # nothing is planted into what is evaluated: without test images there is no evaluation
    code,out,err = vadnb('eval', '--run', a.run)
    assert code==0 and '18 images' in out.splitlines()[0], err
    assert 'data.test' in refuse('eval', '--run', b.run) and not (b.run/'eval.json').exists()

def test_planted_defects_are_the_same_each_time(fed):
    first,second = (samples(fed('--data.cache', 'off').split('valid')) for _ in range(2))
    assert list(first)==list(second) and sum(int(s['label']) for s in first.values())==6 and len(first)==12
    for n,s in first.items(): assert all(torch.equal(v, second[n][k]) for k,v in s.items() if torch.is_tensor(v))
    other = samples(fed('--data.cache', 'off', '--seed', '1').split('valid'))
    assert set(other)!=set(first)

def test_protocol_of_the_paper(trained, world):
    paper,held = trained('--data.protocol', 'paper'), trained()
    # the images that are judged, and behind them all good ones, which set thresholds
    assert [s['name'] for s in paper.valid]==[r.name for k in ('test', 'train') for r in read_tree(world)[k]] and len(paper.train)==16
    assert paper.scan.names==[r.name for r in read_tree(world)['test']]
    assert (paper.metrics['pooled/chosen_here'], 'pooled/chosen_here' in held.metrics)==(1, False)
    for learner,n in ((paper, 1), (held, 0)):
        notes = [f for f in read_json(learner.run/'health.json')['findings'] if f['code']=='protocol']
        assert len(notes)==n and all('chosen on the test set' in f['message'] and f['severity']=='note' for f in notes)
    assert paper.system.calibration['of']=='good training images, which the model knows' and held.system.calibration['of']=='held-out good images'
    # what thresholds come from: the good images, a planted defect among them would raise every threshold
    scan = held.scan
    scores = [held.system.image_score(m) for m,label in zip(scan.maps, scan.labels) if not label]
    assert len(scores)==6 and held.system.calibration['scores']==pytest.approx(sorted(scores), abs=1e-6)
    assert len(paper.system.calibration['scores'])==16

# ---------------------------------------------------------------- cache

PLACES = ['memory', 'disk', 'off']

def numbers(learner): return [{k: v for k,v in r.items() if not isinstance(v, str)} for r in curve(learner.run)]

@pytest.mark.parametrize('protocol', ['held_out', 'paper'])
def test_the_place_of_features_changes_nothing(trained, protocol):
    found = [trained('--data.cache', place, '--data.protocol', protocol) for place in PLACES]
    assert [isinstance(x.train, CachedFeatures) for x in found]==[True, True, False]
    for other in found[1:]:
        for a,b in zip(numbers(found[0]), numbers(other), strict=True): assert b==pytest.approx(a, abs=1e-5)
        for k,v in found[0].system.state_dict().items(): torch.testing.assert_close(other.system.state_dict()[k], v, atol=1e-5, rtol=0)

def row_of(learner): return row_bytes(learner.train.shards[0].tensors)

def test_a_cache_that_holds_a_part_changes_nothing(trained, world, tmp_path):
    "Of ten images to learn and twelve to validate, eight have room: each set keeps its first ones"
    row = row_of(trained('--data.cache', 'disk', '--data.protocol', 'held_out'))
    some = ('--data.cache', 'disk', '--data.protocol', 'held_out', '--data.cache_gb', str(8.5*row/1e9), '--train.workers', '2')
    learner = train(world, tmp_path, 'part', *some)
    for split,kept in (('train', 3), ('valid', 4)):
        place = learner.fed.split(split).place
        assert (place[:kept]>=0).all() and (place[kept:]<0).all()
    for a,b in zip(numbers(trained('--data.cache', 'off', '--data.protocol', 'held_out')), numbers(learner), strict=True): assert b==pytest.approx(a, abs=1e-5)
    assert sum(f.stat().st_size for f in (tmp_path/'features').rglob('*.safetensors'))<=8.5*row

def test_compiling_on_the_cpu_is_refused_before_anything_is_made(world, tmp_path, encoded):
    err = refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'run', '--train.compile', 'true', '--data.cache', 'disk'))
    assert "'train.compile' is true and the device is the CPU" in err and 'set it to false' in err
    assert not encoded and not [p for p in tmp_path.rglob('*') if p.suffix in ('.safetensors', '.yaml', '.jsonl')]

def test_half_a_row_changes_little(trained):
    one,other = (trained('--data.cache', 'disk', '--data.cache_dtype', d) for d in ('float32', 'float16'))
    exact,narrow = (x.train.rows[0]['feature'] for x in (one, other))
    assert narrow.dtype==torch.float16 and torch.equal(narrow, exact.half()) and other.train[0]['feature'].dtype==torch.float32
    assert row_of(other)<.6*row_of(one) and one.train.shards[0].key!=other.train.shards[0].key
    for a,b in zip(numbers(one), numbers(other), strict=True): assert b==pytest.approx(a, rel=.02, abs=.02)

class Remove(Callback):
    "Take the training images away, once training has begun"
    def before_fit(self):
        for r in read_tree(self.learner.cfg.data_root)['train']: (Path(self.learner.cfg.data_root)/r.name).unlink()

@pytest.mark.parametrize('place', PLACES)
def test_no_image_is_opened_after_the_start(copy, tmp_path, trained, place):
    some = ('--data.cache', place)
    if place=='off':
        with pytest.raises(DataError, match='is not there'): train(copy, tmp_path, 'run', *some, callbacks=[Remove()])
    else:
        learner = train(copy, tmp_path, 'run', *some, callbacks=[Remove()])
        assert learner.step==6 and numbers(learner)==numbers(trained(*some))

@pytest.fixture
def encoded(monkeypatch):
    "Numbers of images that went through the backbone"
    seen,real = [], UniADSystem.encode
    def encode(self, images): seen.append(len(images)); return real(self, images)
    monkeypatch.setattr(UniADSystem, 'encode', encode)
    return seen

def said(world, runs, name, *more):
    "What a run says while it starts"
    code,_,err = vadnb('train', '--config', 'uniad_demo', *words(world, runs, name, '--data.cache', 'disk', '--train.progress', 'true', '--train.epochs', '1', *more))
    assert code==0, err
    return [line for line in err.splitlines() if 'feature cache' in line]

def test_features_are_computed_once_and_repaired(world, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr('vadnb.report.report.write_report', lambda run: run)
    first = said(world, tmp_path, 'first')
    assert len(first)==2 and first[0].startswith('training: feature cache: 10 images') and '0 rows found, 10 to compute' in first[0] and first[1].startswith('validation: feature cache: 12 images') and sum(encoded)==22
    # one folder per encoder
    folder, = [p for p in (tmp_path/'features').iterdir() if p.is_dir()]
    shards = sorted(folder.glob('*.safetensors'))
    encoded.clear()
    assert all('all found in' in line for line in said(world, tmp_path, 'second')) and not encoded
    assert numbers_of(tmp_path/'first')==numbers_of(tmp_path/'second')
    # another seed draws another backbone, and must not read these
    other = said(world, tmp_path, 'other', '--seed', '1')
    assert '0 rows found' in other[0] and sum(encoded)==22 and sorted(folder.glob('*.safetensors'))==shards
    alien = next(p for p in (tmp_path/'features').iterdir() if p!=folder and p.is_dir())
    shutil.copy(next(alien.glob('*.safetensors')), shards[0])
    raw = bytearray(shards[1].read_bytes()); raw[-100] ^= 1; shards[1].write_bytes(raw)
    encoded.clear()
    mended = said(world, tmp_path, 'third')
    assert str(shards[0]) in mended[0] and 'belongs to another encoder' in mended[0] and 'computed again' in mended[0]
    assert str(shards[1]) in mended[1] and 'is damaged' in mended[1] and sum(encoded)==22
    assert numbers_of(tmp_path/'third')==numbers_of(tmp_path/'first')

def numbers_of(run): return [{k: v for k,v in r.items() if not isinstance(v, str)} for r in curve(run)]

def test_augmentation_switches_the_cache_off(world, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr('vadnb.report.report.write_report', lambda run: run)
    lines = said(world, tmp_path, 'run', '--data.hflip', '0.5', '--data.rotate', 'true')
    assert lines[0].startswith('training: feature cache: off, because the data set is augmented') and lines[1].startswith('validation: feature cache: 12 images')
    assert encoded.count(4)>=2

@pytest.mark.parametrize('then', ['off', 'disk'])
def test_another_place_is_the_same_data(world, tmp_path, trained, then):
    train(world, tmp_path, 'run', callbacks=[StopAt(4)])
    learner = train(world, tmp_path, 'run', '--data.cache', then)
    resumed = rows(learner.run, 'resume')[0]
    assert resumed['step']==4 and list(resumed['changed'])==['data.cache']
    for a,b in zip(numbers(trained()), numbers(learner), strict=True): assert b==pytest.approx(a, abs=1e-5)

def test_other_images_are_other_data(copy, tmp_path):
    learner = train(copy, tmp_path, 'run', callbacks=[StopAt(4)])
    picture(copy/learner.train.data.records[0].name)
    assert 'data (checkpoint)' in rows(train(copy, tmp_path, 'run').run, 'resume')[0]['changed']

# ---------------------------------------------------------------- checkpoints

def parts(folder, *names):
    "The tensors of some parts of a checkpoint, under their names in the system"
    return {f'{n}.{k}': v for n in names for k,v in load_file(folder/f'{n}.safetensors').items()}

def test_everything_trainable_is_trained_and_kept(trained, world, tmp_path):
    learner = trained()
    system = learner.system
    own = {k for k,p in system.named_parameters() if p.requires_grad}
    assert own and own=={f'head.{k}' for k,_ in system.head.named_parameters()}
    optimized = [p for g in learner.optimizer.param_groups for p in g['params']]
    assert len(optimized)==len(own) and {id(p) for p in optimized}=={id(system.get_parameter(k)) for k in own}
    # each of them has moved, and lies in the checkpoint as it is
    start = load_config('uniad_demo', words(world, tmp_path, 'x')).build
    held = parts(find_checkpoint(learner.run), 'head', 'backbone', 'memory')
    torch.manual_seed(0); before = start().state_dict()
    assert [k for k in own if torch.equal(held[k], before[k])]==[]
    assert all(torch.equal(held[k], v) for k,v in system.state_dict().items()) and held.keys()==system.state_dict().keys()
    # random weights are kept, because nothing could bring them back; the backbone is that of the start
    assert {k.split('.')[0] for k in held}=={'head', 'backbone', 'memory'}
    torch.manual_seed(1)
    again,_ = load_run(learner.run)
    assert not again.training and all(torch.equal(held[k], v) for k,v in again.state_dict().items()) and again.backbone.digest()==system.backbone.digest()
    assert 'random' in str([f for f in read_json(learner.run/'health.json')['findings'] if f['code']=='backbone'])

def weights_file(path, seed):
    torch.manual_seed(seed)
    save_file(timm.create_model('test_resnet').state_dict(), path)
    return path

def test_pretrained_weights_are_not_kept(world, tmp_path):
    some = ('--model.pretrained', 'true', '--model.backbone_weights', weights_file(tmp_path/'a.safetensors', 1))
    learner = train(world, tmp_path, 'run', *some)
    folder = find_checkpoint(learner.run)
    assert read_json(folder/'card.json')['parts']==['head', 'memory'] and not (folder/'backbone.safetensors').exists()
    assert (folder/'head.safetensors').stat().st_size<500_000
    assert 'backbone' not in [f['code'] for f in read_json(learner.run/'health.json')['findings']]
    assert not learner.system.unused_weights and read_json(folder/'card.json')['provenance']['digest']==learner.system.backbone.digest()
    again,_ = load_run(learner.run)
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for a,b in zip(*(list(system.eval().look(dict(image=x)).values()) for system in (learner.system, again))): assert torch.equal(a, b)
    # an interrupted run goes on with them
    train(world, tmp_path/'b', 'run', *some, callbacks=[StopAt(4)])
    train(world, tmp_path/'b', 'run', *some)
    assert curve(tmp_path/'b'/'run')==curve(learner.run) and differences(tmp_path/'b'/'run', learner.run)==[]
    # other weights under the same name are no base for this head
    before = contents(learner.run)
    moved = (tmp_path/'a.safetensors').rename(tmp_path/'moved.safetensors')
    weights_file(tmp_path/'a.safetensors', 2)
    with pytest.raises(CheckpointError, match=f"the weights of test_resnet are not those .* instead of {learner.system.backbone.digest()}.*--model.backbone_weights"): load_run(learner.run)
    for command in (('eval',), ('predict', world)): assert '--model.backbone_weights' in refuse(*command, '--run', learner.run)
    assert load_run(learner.run, overrides=['--model.backbone_weights', str(moved)])[0].backbone.digest()==learner.system.backbone.digest()
    (tmp_path/'a.safetensors').unlink()
    with pytest.raises(CheckpointError, match='a.safetensors: no such file'): load_run(learner.run)
    assert contents(learner.run)==before

@pytest.mark.parametrize('same_name', [False, True])
def test_other_pretrained_weights_do_not_continue_a_run(world, tmp_path, same_name):
    "Its head has learned the features of the first ones"
    some = ('--model.pretrained', 'true', '--model.backbone_weights')
    train(world, tmp_path, 'run', *some, weights_file(tmp_path/'a.safetensors', 1), callbacks=[StopAt(4)])
    before = contents(tmp_path/'run')
    err = refuse('train', '--config', 'uniad_demo', *words(world, tmp_path, 'run', *some, weights_file(tmp_path/('a.safetensors' if same_name else 'b.safetensors'), 2)))
    assert 'digest' in err and 'backbone_weights' in err
    assert contents(tmp_path/'run')==before

def test_a_run_goes_on_with_its_own_random_backbone(world, tmp_path):
    "Another seed draws another one, which the checkpoint replaces before any feature is computed"
    begun = train(world, tmp_path, 'run', callbacks=[StopAt(4)]).system
    learner = train(world, tmp_path, 'run', '--seed', '1')
    assert learner.step==learner.total_steps>4 and learner.system.backbone.digest()==begun.backbone.digest()
    fed = learner.train
    torch.testing.assert_close(fed[0]['feature'], begun.encode(fed.data[0]['image'][None])[0], atol=1e-5, rtol=0)

@pytest.mark.parametrize('place', PLACES)
def test_killed_and_resumed_is_exact(world, tmp_path, trained, place):
    "With dropout and jitter, stopped within an epoch and cut off behind one"
    some = ('--data.cache', place)
    train(world, tmp_path, 'run', *some, callbacks=[StopAt(2)])
    with pytest.raises(RuntimeError, match='power cut'): train(world, tmp_path, 'run', *some, callbacks=[FailAt(5)])
    learner = train(world, tmp_path, 'run', *some)
    assert [r['step'] for r in rows(learner.run, 'resume')]==[2, 3]
    whole = trained(*some)
    assert curve(learner.run)==curve(whole.run) and differences(learner.run, whole.run)==[]
    assert learner.system.calibration==whole.system.calibration

# ---------------------------------------------------------------- what a run leaves behind

def test_nothing_is_wrong_with_a_healthy_run(run):
    "Its backbone is random, which is said; no other finding"
    assert [f['code'] for f in read_json(run/'health.json')['findings']]==['backbone']

def test_thresholds_need_no_data(run):
    "Another false alarm rate is another threshold, from what the checkpoint holds; the data are gone"
    system,_ = load_run(run, overrides=['--score.false_alarm_rate', '0.4'])
    assert not Path(system.cfg.data_root).exists() and system.thresholds()[''].rate==.4
    def thresholds(key, rate):
        system.cfg = replace(system.cfg, score=replace(system.cfg.score, **{key: rate}))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return system.thresholds()['']
    rates = (.02, .2, .4, .6, .8)
    for key,value,other in (('false_alarm_rate', 'image', 'pixel'), ('pixel_rate', 'pixel', 'image')):
        found = [thresholds(key, r) for r in rates]
        values = [getattr(t, value) for t in found]
        assert values==sorted(values, reverse=True) and len(set(values))>=4 and len({getattr(t, other) for t in found})==1 and {t.normals for t in found}=={6}
    # six good images: of seven equally likely places one lies above the third highest of them, and so on
    scores = system.calibration['scores']
    assert [thresholds('false_alarm_rate', r).image for r in rates]==[scores[k] for k in (5, 5, 4, 2, 1)]

def test_pictures_and_boards(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for name in ('cases', 'panels'): assert min(Image.open(run/'pictures'/f'{name}.png').size)>100
    assert rows(run, 'pictures')[-1]['names']==['cases', 'panels']
    page = (run/'report.html').read_text()
    assert 'pixel AUROC' in page and page.count(' src="data:image/')==2 and all(f'alt="{k}"' in page for k in ('cases', 'panels'))
    board = EventAccumulator(str(run/'tensorboard')); board.Reload()
    tags = board.Tags()
    assert set(tags['images'])=={'pictures/cases', 'pictures/panels'} and tags['graph']
    assert {'train/loss', 'valid/pixel_auroc', 'valid/image_auroc'}<=set(tags['scalars'])
    nodes = {n.name for n in board.Graph().node}
    assert any('decoder' in n for n in nodes) and any('input_proj' in n for n in nodes)

def own_maps(system, world):
    "Maps of the test images by the shortest way: files, backbone, head"
    data = AnomalyImages(read_tree(world)['test'], world, (64, 64))
    with torch.no_grad(): maps = {s['name']: system.head(system.neck(system.backbone((s['image'][None].float()-system.mean)/system.std)))['pred'][0,0].numpy() for s in data}
    truth = {r.name: np.asarray(Image.open(world/r.mask))>0 if r.mask else np.zeros((64, 64), bool) for r in data.records}
    return maps, truth, {r.name: r.label for r in data.records}, {r.name: r.cls for r in data.records}

def auroc(positive, negative):
    "Share of pairs in the right order"
    negative = np.sort(negative)
    return ((np.searchsorted(negative, positive, 'left')+np.searchsorted(negative, positive, 'right'))/2).mean()/len(negative)

def test_evaluation_on_the_test_set(run, world, tmp_path):
    code,out,err = vadnb('eval', '--run', run, '--data_root', world, '--out', tmp_path/'eval.json')
    assert code==0 and '18 images' in out.splitlines()[0], err
    m = read_json(tmp_path/'eval.json')['metrics']
    system,_ = load_run(run)
    maps,truth,labels,classes = own_maps(system, world)
    own = pixel_metrics(maps, truth, labels, classes, 'max', (8, 8))
    # what the evaluation calls a metric without more is the mean over classes
    for k,v in own.items(): assert m[k.removeprefix('mean/')]==pytest.approx(v, abs=1e-5), k
    heap = lambda bad: np.concatenate([maps[n][truth[n]==bad] for n in maps])
    assert m['pooled/pixel_auroc']==pytest.approx(auroc(heap(True), heap(False)), abs=1e-5)
    score = {n: image_scores(maps[n], (8, 8))['max'] for n in maps}
    assert m['class/dots/image_auroc']==pytest.approx(auroc(*([score[n] for n in maps if classes[n]=='dots' and labels[n]==k] for k in (1, 0))), abs=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = system.thresholds()['']
    for key,k in (('false_alarm_rate', 0), ('detection_rate', 1)): assert m[key]==np.mean([score[n]>t.image for n in maps if labels[n]==k])
    # the table: a row per class, the mean of them, and all images in one heap
    table = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in ('class', 'dots', 'weave', 'mean', 'pooled')]
    assert [r[0] for r in table]==['class', 'dots', 'weave', 'mean', 'pooled'] and [r[1] for r in table if r[0] in ('dots', 'weave', 'pooled')]==['3+6', '3+6', '6+12']
    heads = [*SEVEN, 'mad']
    assert len(table[0])==2+len(heads)+2 and table[0][-2:]==['alarms', 'found']
    assert [r[-1] for r in table[1:3]]==[f"{m[f'class/{c}/detection_rate']:.0%}" for c in ('dots', 'weave')]
    value = dict(zip(['image_auroc', 'image_ap', 'image_f1max', 'pixel_auroc', 'pixel_ap', 'pixel_f1max', 'aupro', 'mad'], table[1][2:]))
    for k,v in value.items(): assert v==f'{m[f"class/dots/{k}"]:.3f}'
    assert table[3][1:]==[f'{m[k]:.3f}' for k in value] and table[4][2:]==[*(f'{m[f"pooled/{k}"]:.3f}' for k in value), *(f'{m[k]:.0%}' for k in ('false_alarm_rate', 'detection_rate'))]
    for k in value: assert m[k]==pytest.approx((m[f'class/dots/{k}']+m[f'class/weave/{k}'])/2)

def test_counted_metrics_keep_their_bounds(run, world, tmp_path):
    found = []
    for n in ('0', '1000000'):
        code,_,err = vadnb('eval', '--run', run, '--data_root', world, '--out', tmp_path/f'{n}.json', '--score.exact_pixels', n)
        assert code==0, err
        found.append(read_json(tmp_path/f'{n}.json')['metrics'])
    counted,exact = found
    bounds = {k: v for k,v in counted.items() if '/bound/' in k or k.startswith('bound/')}
    assert any(k.endswith('pixel_auroc') for k in bounds) and not [k for k in exact if 'bound/' in k]
    for k,b in bounds.items():
        plain = k.replace('bound/', '')
        assert 0<b<.01 and abs(counted[plain]-exact[plain])<=b, k
    for k in exact:
        if 'image_' in k: assert counted[k]==exact[k]

# ---------------------------------------------------------------- prediction

def test_predicting_the_test_set_gives_its_scores(run, world, tmp_path):
    code,_,err = vadnb('eval', '--run', run, '--data_root', world, '--out', tmp_path/'eval.json')
    assert code==0, err
    system,_ = load_run(run, overrides=['--score.batch_size', '7'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = list(system.predict(world/'dots'/'test'))
        thresholds = system.thresholds()['']
    maps,truth,labels,_ = own_maps(system, world)
    assert [p.name for p in found]==sorted(n.removeprefix('dots/test/') for n in maps if n.startswith('dots/'))
    for p in found:
        n = f'dots/test/{p.name}'
        assert p.score==pytest.approx(image_scores(maps[n], (8, 8))['max'], abs=1e-5) and p.thresholds==thresholds and p.anomalous==(p.score>thresholds.image)
        np.testing.assert_allclose(p.full(), maps[n], atol=1e-5)

MODES = {'b/grey.png': ('L', (64, 64)), 'b/alpha.png': ('RGBA', (50, 70)), 'a.png': ('RGB', (128, 96)), 'z/deep/palette.png': ('P', (64, 30)), 'b/deep16.png': ('I;16', (40, 64)), 'c.jpg': ('RGB', (64, 64)), 'd.bmp': ('RGB', (33, 65))}

@pytest.fixture
def mixed(world, tmp_path):
    photo = Image.open(world/'dots/test/good/000.png')
    for name,(mode,size) in MODES.items():
        path = tmp_path/'mixed'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        im = photo.resize(size[::-1])
        if mode=='I;16': im = Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257)
        else: im = im.convert(mode)
        im.save(path)
    return tmp_path/'mixed'

def test_prediction_of_any_folder(run, mixed, tmp_path):
    code,out,err = vadnb('predict', mixed, '--run', run, '--out', tmp_path/'out', '--overlay', 'true', '--score.batch_size', '3', '--score.false_alarm_rate', '0.4')
    assert code==0 and err=='' and '7 images' in out, err
    folder = tmp_path/'out'/'mixed'
    order = ['a.png', 'b/alpha.png', 'b/deep16.png', 'b/grey.png', 'c.jpg', 'd.bmp', 'z/deep/palette.png']
    with open(folder/'scores.csv', newline='') as f: table = list(csv.DictReader(f))
    record = read_json(folder/'predictions.json')
    assert [r['name'] for r in table]==[r['name'] for r in record['images']]==order==sorted(MODES)
    for r,p in zip(table, record['images']):
        size = MODES[p['name']][1]
        stem = Path(p['name']).with_suffix('')
        with np.load(folder/'maps'/f'{stem}.npz') as held:
            assert held['map'].shape==(64, 64) and held['coarse'].shape==(8, 8) and tuple(held['size'])==size==tuple(p['size'])
            assert float(r['score'])==pytest.approx(image_scores(held['map'], (8, 8))['max'], abs=1e-5)==pytest.approx(p['score'], abs=1e-5)
        assert Image.open(folder/'maps'/f'{stem}.png').size>(100, 50) and Image.open(folder/'overlays'/f'{stem}.png').size==size[::-1]
        assert bool(int(r['anomalous']))==p['anomalous']==(p['score']>record['thresholds'][0]['image'])
    assert Image.open(folder/'contact_sheet.png').size[0]>300
    # grey and 16 bit of the same picture look alike to the model, and their place in a batch means nothing
    score = {r['name']: float(r['score']) for r in table}
    system,_ = load_run(run, overrides=['--score.false_alarm_rate', '0.4'])
    for name in MODES: assert next(system.predict(mixed/name)).score==pytest.approx(score[name], abs=1e-5)

def test_predict_refuses_in_one_line(run, mixed, tmp_path):
    before = contents(run, mixed)
    for words,says in ((('none',), 'none: no such file or folder'), ((run/'pictures',), ''), ((mixed/'a.png', mixed/'a.png'), 'would write the same files')):
        if says: assert says in refuse('predict', *words, '--run', run, '--out', tmp_path/'out')
    cut(mixed/'b'/'grey.png')
    words = ['predict', mixed, '--run', run, '--out', tmp_path/'out', '--score.batch_size', '2', '--score.false_alarm_rate', '0.4', '--pictures', 'none']
    code,_,err = vadnb(*words)
    said = [line for line in err.splitlines() if 'vadnb: error:' in line]
    assert code==3 and len(said)==2 and 'mixed/b/grey.png cannot be decoded' in said[0] and 'copy it again or take it out' in said[0]
    n = sum(p.is_file() for p in mixed.rglob('*.*') if p.suffix in ('.png', '.jpg', '.bmp', '.tif', '.tiff', '.webp'))
    assert f'1 of {n} could not be scored' in said[1]
    # what is sound is scored, and the damaged one stands in no table
    names = [r['name'] for r in csv.DictReader(open(next((tmp_path/'out').rglob('scores.csv'))))]
    assert len(names)==n-1 and 'b/grey.png' not in names
    assert {p: v for p,v in contents(run, mixed).items() if p.name!='grey.png'}=={p: v for p,v in before.items() if p.name!='grey.png'}

def test_without_calibration_there_are_no_thresholds(run, world, tmp_path):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True))
    for p in own.rglob('card.json'): write_json(p, read_json(p) | dict(calibration=None))
    assert 'there are no thresholds' in refuse('predict', world, '--run', own)
    # metrics need none
    code,out,err = vadnb('eval', '--run', own, '--data_root', world)
    assert code==0 and 'false alarm rate' not in out and 'pixel auroc' in out, err

# ---------------------------------------------------------------- other commands

def test_learning_rate_finder(world, tmp_path):
    code,out,err = vadnb('lr-find', '--config', 'uniad_demo', *words(world, tmp_path, 'run'), '--steps', '30', '--out', tmp_path/'found')
    assert code==0 and [line.split()[0] for line in out.splitlines()[:3]]==['valley', 'steep', 'minimum'], err
    assert len(read_json(tmp_path/'found.json')['losses'])>=20 and not (tmp_path/'run').exists()

def test_verify_names_what_is_broken(copy, tmp_path):
    some = words(copy, tmp_path, 'run')
    code,out,err = vadnb('verify', '--config', 'uniad_demo', *some)
    assert code==0 and 'ready to train' in out and 'FAIL' not in out, out+err
    for part,row in (('train/good/004.png', ('training', 'validation')), ('train/good/002.png', ('training', 'validation'))):
        whole = (copy/'dots'/part).read_bytes()
        cut(copy/'dots'/part)
        code,out,_ = vadnb('verify', '--config', 'uniad_demo', *some)
        fail = [line for line in out.splitlines() if line.startswith('FAIL')]
        assert code==1 and out.endswith('not ready\n') and len(fail)==1 and f'dots/{part} cannot be decoded' in fail[0] and fail[0].split()[1] in row
        (copy/'dots'/part).write_bytes(whole)
    (copy/'dots/ground_truth').rename(copy/'dots/ground_truths')
    larger(next((copy/'weave/ground_truth').rglob('*.png')))
    code,out,_ = vadnb('verify', '--config', 'uniad_demo', *some, '--data.protocol', 'paper')
    assert code==1 and any(line.startswith('FAIL') and 'weave/ground_truth/' in line for line in out.splitlines()) and any(line.startswith('warn') and '6 defective images have none' in line for line in out.splitlines())
    assert not (tmp_path/'run').exists()

def test_converted_trees_are_read(copy, tmp_path, trained):
    code,out,err = vadnb('convert', 'image-tree', copy, tmp_path/'lists')
    assert code==0 and out.splitlines()==[f'{tmp_path}/lists/train.json: 16 images', f'{tmp_path}/lists/test.json: 18 images'], err
    learner = train(copy, tmp_path, 'run', '--data.train', tmp_path/'lists'/'train.json', '--data.test', tmp_path/'lists'/'test.json')
    assert curve(learner.run)==curve(trained().run)
    mask = next((copy/'dots/ground_truth').rglob('*.png'))
    kind,stem = mask.parent.name, mask.stem.removesuffix('_mask')
    shutil.copy(copy/'dots/test'/kind/f'{stem}.png', copy/'dots/test'/kind/f'{stem}.jpg')
    err = refuse('convert', 'image-tree', copy, tmp_path/'again')
    assert 'could be the mask of' in err and f'{stem}.jpg' in err and not (tmp_path/'again').exists()
    (copy/'dots/test'/kind/f'{stem}.jpg').unlink()
    # lists that say something else are never written over
    (copy/'dots/train/good/000.png').unlink()
    before = contents(tmp_path/'lists')
    assert 'exists and says something else' in refuse('convert', 'image-tree', copy, tmp_path/'lists') and contents(tmp_path/'lists')==before

# ---------------------------------------------------------------- real data and official weights

def test_real_images(shared, tmp_path):
    source = shared/'data'/'anomaly_images'/'hazelnut_toy'
    if not source.is_dir(): pytest.skip(f'no {source}')
    # one photograph is 512x522; ten good ones, of which four are held out
    learner = train(source, tmp_path, 'nuts', '--train.batch_size', '3')
    assert (len(learner.train), len(learner.valid), learner.step)==(6, 8, 4)
    code,out,err = vadnb('eval', '--run', learner.run)
    assert code==0 and '14 images' in out, err
    m = read_json(learner.run/'eval.json')['metrics']
    assert all(0<=m[k]<=1 for k in (*SEVEN, 'mad')) and m['pooled/defective']==8
    code,out,err = vadnb('predict', source/'test', '--run', learner.run, '--score.false_alarm_rate', '0.4', '--pictures', 'none')
    assert code==0 and '14 images' in out, err
    with open(learner.run/'predictions'/'test'/'scores.csv', newline='') as f: assert [r['name'] for r in csv.DictReader(f)]==[r.name.removeprefix('test/') for r in read_tree(source)['test']]

def test_official_checkpoint(layout, world, tmp_path):
    "Names, shapes and values of the official file; only entries of its backbone have no place here"
    state = official(layout, tmp_path/'ckpt.pth.tar')
    some = ['--data_root', str(world), '--runs', str(tmp_path), '--name', 'run', '--model.pretrained', 'false', '--data.cache', 'memory', '--train.device', 'cpu', '--train.progress', 'false', '--train.workers', '0']
    n = layout['counts']['backbone_entries']
    torch.manual_seed(0); bare = load_config('uniad_mvtec', some).build()
    torch.manual_seed(0); system = load_config('uniad_mvtec', [*some, '--model.weights', str(tmp_path/'ckpt.pth.tar')]).build()
    system.start(True)
    unused = bare.load_reference(tmp_path/'ckpt.pth.tar')
    assert unused==system.unused_weights and len(unused)==n and all(k.startswith('module.backbone.') for k in unused)
    own,other = bare.state_dict(), system.state_dict()
    assert own.keys()==other.keys() and all(torch.equal(v, other[k]) for k,v in own.items())
    for k,v in system.head.state_dict().items(): assert torch.equal(v, state[f'module.reconstruction.{k}'])
    assert sum(p.numel() for p in system.parameters() if p.requires_grad)==layout['counts']['reconstruction_parameters']

def test_a_head_of_others_is_measured_and_used_without_a_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'rest on model.weights and model.pretrained' in refuse('eval', '--config', 'uniad_demo', *words(world, tmp_path, 'alone'))
    some = ('--model.pretrained', 'true', '--model.backbone_weights', weights_file(tmp_path/'a.safetensors', 1), '--model.start', 'xavier')
    learner = train(world, tmp_path, 'run', *some, '--train.epochs', '1')
    save_file(dict(learner.system.head.state_dict()), 'head.safetensors')
    own = ('--config', 'uniad_demo', *words(world, tmp_path, 'alone', *some, '--model.weights', 'head.safetensors'))
    # what the data know of themselves, such as the bits of their images, is theirs unless a card tells it
    told,remember = [], UniADData.remember
    monkeypatch.setattr(UniADData, 'remember', lambda self, facts: (told.append(facts), remember(self, facts)))
    for words_ in (own, ('--run', learner.run)):
        code,out,err = vadnb('eval', *words_)
        assert len(told)==(words_ is not own)
        assert code==0, err
        code,out,err = vadnb('predict', world/'dots'/'test', *words_, '--pictures', 'none')
        assert code==0 and ' alarms' in out, err
    alone,run = read_json('alone_eval.json'), read_json(learner.run/'eval.json')
    # a memory lies beside what was trained here, and no official checkpoint has one
    assert alone['metrics']=={k: v for k,v in run['metrics'].items() if '/memory' not in k}
    a,b = (next(Path(p).rglob('scores.csv')).read_text() for p in ('alone_predictions', learner.run/'predictions'))
    assert a==b

def test_skipping_needs_no_cache(copy, tmp_path):
    "A cache reads every image before the first step, so that none can be skipped"
    bad = config(copy, tmp_path, 'x').make_data().split('train').records[3]
    cut(copy/bad.name)
    assert 'train.on_bad_sample' in refuse('train', '--config', 'uniad_demo', *words(copy, tmp_path, 'memory', '--train.on_bad_sample', 'skip', '--data.cache', 'memory'))
    learner = train(copy, tmp_path, 'skips', '--train.on_bad_sample', 'skip', '--data.cache', 'auto', '--model.start', 'xavier')
    assert learner.step==6 and learner.skipped

def test_eval_without_training_images(run, world, copy):
    for c in ('dots', 'weave'): shutil.rmtree(copy/c/'train')
    code,out,err = vadnb('eval', '--run', run, '--data_root', copy)
    assert code==0, err

def test_nothing_is_half_converted(copy, tmp_path):
    (tmp_path/'lists').mkdir(); (tmp_path/'lists'/'test.json').write_text('mine')
    refuse('convert', 'image-tree', copy, tmp_path/'lists')
    assert not (tmp_path/'lists'/'train.json').exists()

def test_thresholds_are_for_the_score_they_were_set_with(run, world, tmp_path):
    err = refuse('predict', world/'dots'/'test', '--run', run, '--out', tmp_path/'out', '--score.image_score', 'std')
    assert 'score.image_score' in err and not (tmp_path/'out').exists()
    code,out,err = vadnb('eval', '--run', run, '--data_root', world, '--out', tmp_path/'eval.json', '--score.image_score', 'std')
    assert code==0 and 'detection_rate' not in read_json(tmp_path/'eval.json')['metrics']

def test_defects_in_the_training_list_are_refused_whatever_the_test_set_is(world, tmp_path):
    tree = read_tree(world)
    write_meta(tree['train']+tree['test'][-1:], tmp_path/'list.json')
    shutil.copytree(world, tmp_path/'copy')
    shutil.copy(tmp_path/'list.json', tmp_path/'copy'/'list.json')
    err = refuse('train', '--config', 'uniad_demo', *words(tmp_path/'copy', tmp_path, 'run', '--data.train', 'list.json', '--data.test', '.'))
    assert 'is defective and in the training list' in err

def test_a_metric_that_cannot_be_is_told_before_training(copy, tmp_path):
    for c in copy.iterdir(): shutil.rmtree(c/'ground_truth', ignore_errors=True)
    err = refuse('train', '--config', 'uniad_demo', *words(copy, tmp_path, 'run', '--data.protocol', 'paper'))
    assert 'train.metric' in err and 'image_auroc' in err and not (tmp_path/'run'/'checkpoints').exists()

def test_a_class_without_test_images_is_told(run, copy, tmp_path):
    shutil.rmtree(copy/'dots'/'test'); shutil.rmtree(copy/'dots'/'ground_truth')
    with pytest.warns(UserWarning, match='no image of dots'):
        system,_ = load_run(run, overrides=['--data_root', str(copy)])
        look_through(system, system.cfg.make_data(), 'test', system.cfg.train, 'cpu').metrics()

# ---------------------------------------------------------------- shares, and what a stranger wrote

@pytest.mark.parametrize('exact', ['0', '1000000'])
@pytest.mark.parametrize('protocol', ['held_out', 'paper'])
def test_joined_shares_are_the_whole_to_the_last_bit(world, tmp_path, protocol, exact):
    "Three processes that look at consecutive batches, exact metrics and counted ones"
    cfg = config(world, tmp_path, 'x', '--data.protocol', protocol, '--score.exact_pixels', exact)
    data = cfg.make_data()
    torch.manual_seed(0)
    system = cfg.build(data.facts()).eval()
    with torch.no_grad():
        def look(world=1, rank=0):
            scan = look_through(system, data, 'valid', cfg.train, 'cpu', world, rank)
            return scan if world==1 else pickle.loads(pickle.dumps(scan))
        whole,shares = look(), [look(3, k) for k in range(3)]
        before = [len(s.names)+len(s.normal) for s in shares]
    joined = shares[0].join(shares[1:])
    # under the protocol of the paper the last share sets thresholds only
    assert all(before) and joined.names==whole.names
    assert joined.metrics()==whole.metrics() and joined.calibration()==whole.calibration()
    assert ('pooled/bound/aupro' in whole.metrics())==(exact=='0')

BAD = {'scores': ['a', [], None, ['x'], [True], [float('nan')], [10**400], [-1e39], [2., 1.]], 'rates': [[.1], [0., .1], [2., 0.]], 'n_pixels': [0, 1.5, True, '9', 10**400],
       'of': [3, '', 'a\nb'], 'score': ['max', [], None]}

def test_a_calibration_of_a_stranger_is_checked(run):
    "By name, type and range; what a run wrote comes back to the bit"
    system,_ = load_run(run)
    own = system.calibration
    assert json.loads(json.dumps(own))==own and system.calibrated().together.scores.tolist()==own['scores']
    for k,values in BAD.items():
        for v in values:
            system.calibration = own | {k: v}
            with pytest.raises(CheckpointError, match=f'calibration.{k}|calibration.pixels'): system.calibrated()
    for other in ([], 'x', {}, own | dict(more=1), {k: v for k,v in own.items() if k!='of'}):
        system.calibration = other
        with pytest.raises(CheckpointError, match='calibration: must hold scores, pixels|calibration.means'): system.calibrated()

def test_facts_of_a_stranger_are_checked(world, tmp_path):
    cfg = config(world, tmp_path, 'x')
    for facts in ({}, dict(classes=[]), dict(classes='dots'), dict(classes=['dots', 3]), dict(classes=['dots', 'dots'])):
        with pytest.raises(CheckpointError, match='facts.classes: must be a list of different names'): cfg.build(facts)
    # what this version knows nothing of may mean another model
    for facts,says in (([], 'facts: must be a mapping'), (dict(classes=['dots'], neck='MFCN'), 'facts.neck: is unknown; this system knows classes, backbone')):
        with pytest.raises(CheckpointError, match=says): cfg.build(facts)

def test_a_card_of_a_stranger_is_named_and_quoted_in_short(run, tmp_path):
    held = read_json(find_checkpoint(run)/'card.json')
    for k,harm,says in ((0, dict(facts=dict(classes=[])), 'card.json: facts.classes: must be'), (2, dict(facts=held['facts'] | dict(neck='MFCN')), 'card.json: facts.neck: is unknown'),
                        (3, dict(calibration=held['calibration'] | dict(value=held['calibration']['value'] | dict(scores='high'))), 'card.json: calibration.scores: must be a list of finite numbers'), (1, dict(provenance=dict(digest='x'*5000)), 'card.json: the weights of')):
        own = Path(shutil.copytree(run, tmp_path/str(k), symlinks=True))
        for p in own.rglob('card.json'): write_json(p, read_json(p) | harm)
        with pytest.raises(CheckpointError, match=says) as e: load_run(own)
        assert len(str(e.value))<500

def test_damaged_images_stand_in_their_place(run, mixed):
    cut(mixed/'b'/'grey.png')
    system,_ = load_run(run, overrides=['--score.batch_size', '2', '--score.false_alarm_rate', '0.4'])
    found = list(system.predict(mixed))
    names = sorted(MODES)
    assert [isinstance(p, DataError) for p in found]==[n=='b/grey.png' for n in names]
    assert [p.name for p in found if not isinstance(p, DataError)]==[n for n in names if n!='b/grey.png']
