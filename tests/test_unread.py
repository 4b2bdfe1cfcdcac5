"Validation and test data that cannot be read: known before the first step, or left out, counted and said; the same in every system"
import json, shutil
from pathlib import Path
import numpy as np, pytest
from command import vadnb
from test_adatad import config as adatad_config, words as adatad_words
from test_processes import together
from toy_system import Points, ToyData, config, rows, train
from vadnb.core import DataError, read_json, read_jsonl, write_json
from vadnb.systems.adatad.scan import ActionScan
from vadnb.train.learner import fit
from vadnb.worlds.motions import make_motions

def skipped(run):
    "What health says of validation data"
    return [f for f in read_json(Path(run)/'health.json')['findings'] if f['code']=='skipped_samples' and 'validation' in f['evidence']]

# ---------------------------------------------------------------- any system

class Tried(Points):
    "Points that can be tried"
    def check(self, i): self[i]

@pytest.fixture
def damaged(monkeypatch):
    def valid(make=Tried, bad=(1, 4)): monkeypatch.setattr(ToyData, 'split', lambda self, name: make(7, bad) if name=='valid' else self.splits.get(name))
    return valid

def test_damage_is_known_before_the_first_step(tmp_path, damaged):
    damaged()
    with pytest.raises(DataError) as told: fit(config(tmp_path, 'run'))
    said = str(told.value)
    assert said.startswith('2 of 7 validation points cannot be read: point1.mp4: damaged; point') and '--train.on_bad_sample skip' in said
    assert not (tmp_path/'run'/'log.jsonl').exists()

@pytest.mark.parametrize('make', [Tried, Points])
def test_what_is_skipped_counts_in_no_figure_and_is_said(tmp_path, damaged, make, capsys):
    "Tried before, or found by the evaluation itself"
    damaged(make)
    learner = fit(config(tmp_path, 'run', on_bad_sample='skip', noisy=False, progress=True))
    found, = skipped(tmp_path/'run')
    assert '2 of 7 validation points could not be read' in found['message'] and found['evidence']['validation']==['point1.mp4: damaged', 'point4.mp4: damaged']
    assert found['step']==(0 if make is Tried else rows(tmp_path/'run', 'valid')[0]['step'])
    assert '2 of 7 validation points' in capsys.readouterr().err
    sound = learner.data.collate([Points(7)[i] for i in range(7) if i not in (1, 4)])
    with learner.evaluating(): error = learner.system.look(sound).mean().item()
    assert learner.metrics['error']==pytest.approx(error, rel=1e-5)

def test_nothing_that_can_be_read_is_an_error(tmp_path, damaged):
    for make in (Tried, Points):
        damaged(make, range(7))
        with pytest.raises(DataError, match='none of the 7 validation points can be read: point0.mp4'): fit(config(tmp_path, make.__name__, on_bad_sample='skip'))

def train_damaged(*args, **named):
    ToyData.split = lambda self, name: Tried(7, (1, 4)) if name=='valid' else self.splits.get(name)
    train(*args, **named)

def test_two_processes_leave_out_the_same(tmp_path, damaged):
    damaged()
    some = dict(points=16, noisy=False, accumulate=1, epochs=1, on_bad_sample='skip', optim=dict(warmup=0))
    fit(config(tmp_path, 'one', batch_size=8, **some))
    together(tmp_path/'two', train_damaged, tmp_path, 'two', batch_size=4, **some)
    assert skipped(tmp_path/'one')==skipped(tmp_path/'two')
    assert rows(tmp_path/'two', 'valid')[-1]['error']==pytest.approx(rows(tmp_path/'one', 'valid')[-1]['error'], rel=1e-4)

# ---------------------------------------------------------------- adatad: videos that are streamed

@pytest.fixture(scope='module')
def motions(tmp_path_factory):
    return make_motions(tmp_path_factory.mktemp('unread')/'world', videos=4, valid_videos=3, test_videos=2,
                        frames=(150, 160), rounds=(2, 3), rest=(10, 20), seed=1)

class Broken:
    "A copy of the motions in which one video is damaged, and one whose annotation does not know it"
    def __init__(self, motions, folder, harm, subset='validation'):
        self.root = Path(shutil.copytree(motions.root, folder/'world'))
        self.name = motions.names(subset)[1]
        self.path = self.root/motions.path(self.name).relative_to(motions.root)
        data = self.path.read_bytes()
        n = len(data)
        # the end is cut off; or the middle is written over, which no index shows
        self.path.write_bytes(data[:n//2] if harm=='cut' else data[:n//2]+bytes(n//8)+data[n//2+n//8:])
        annotation = read_json(motions.annotation)
        del annotation['database'][self.name]
        write_json(self.root/'without.json', annotation)

@pytest.fixture(autouse=True)
def few_pictures(monkeypatch): monkeypatch.setattr(ActionScan, 'pictures', lambda self: {})

def test_a_damaged_validation_video_is_told_at_the_start(motions, tmp_path):
    broken = Broken(motions, tmp_path, 'cut')
    code,out,err = vadnb('train', '--config', 'adatad_demo', *adatad_words(broken, tmp_path, 'run'))
    assert code==2 and len(err.strip().splitlines())==1 and str(broken.path) in err and broken.name in err
    assert '1 of 3 validation videos' in err and '--train.on_bad_sample skip' in err
    assert not (tmp_path/'run'/'checkpoints').exists() and not (tmp_path/'run'/'log.jsonl').exists()
    code,out,err = vadnb('verify', '--config', 'adatad_demo', *adatad_words(broken, tmp_path, 'run'))
    assert code==1 and any(l.startswith('FAIL') and broken.name in l for l in out.splitlines())
    code,out,err = vadnb('verify', '--config', 'adatad_demo', *adatad_words(broken, tmp_path, 'run', '--train.on_bad_sample', 'skip'))
    assert code==0 and any(l.startswith('warn') and 'left out 1 of 3' in l and broken.name in l for l in out.splitlines())

SHORT = '--train.steps', 2

@pytest.fixture(scope='module')
def without(motions, tmp_path_factory):
    "A run whose annotation does not know the video that is damaged elsewhere"
    folder = tmp_path_factory.mktemp('without')
    few = ActionScan.pictures
    ActionScan.pictures = lambda self: {}
    learner = fit(adatad_config(Broken(motions, folder, 'cut'), folder, 'without', '--data.annotation', 'without.json', *SHORT))
    ActionScan.pictures = few
    return learner

@pytest.mark.parametrize('harm,workers', [('cut', 0), ('scratched', 1)])
def test_a_damaged_validation_video_that_is_skipped_is_as_if_it_were_not_there(motions, without, tmp_path, harm, workers):
    broken = Broken(motions, tmp_path, harm)
    learner = fit(adatad_config(broken, tmp_path, 'skips', '--train.workers', workers, '--train.on_bad_sample', 'skip', *SHORT))
    assert learner.metrics==without.metrics and learner.system.calibration==without.system.calibration
    found, = skipped(learner.run)
    assert '1 of 3 validation videos' in found['message'] and str(broken.path) in found['evidence']['validation'][0]
    code,_,err = vadnb('report', '--run', learner.run)
    page = (learner.run/'report.html').read_text()
    assert code==0 and '1 sample of the validation data could not be read' in page and broken.path.name in page

def test_a_damaged_test_video_is_left_out_of_an_evaluation_and_said(motions, tmp_path):
    broken = Broken(motions, tmp_path, 'scratched', 'test')
    learner = fit(adatad_config(broken, tmp_path, 'run', *SHORT))
    code,_,err = vadnb('eval', '--run', learner.run)
    assert code==2 and str(broken.path) in err
    code,out,err = vadnb('eval', '--run', learner.run, '--train.on_bad_sample', 'skip')
    assert code==0 and '2 videos' in out and '1 of them could not be read' in out and str(broken.path) in out, err
    found = read_json(learner.run/'eval.json')
    assert len(found['left_out'])==1 and broken.name in found['left_out'][0]
    vadnb('eval', '--run', learner.run, '--data.annotation', 'without.json', '--out', tmp_path/'without.json')
    assert read_json(tmp_path/'without.json')['metrics']==found['metrics'] and read_json(tmp_path/'without.json')['left_out']==[]

def test_a_video_that_stops_early(motions, tmp_path, shared):
    "50 frames announced, 28 decode: case 10, as validation data"
    root = Path(shutil.copytree(motions.root, tmp_path/'world'))
    shutil.copy(shared/'data'/'video'/'decord'/'corrupted.mp4', root/'raw_data'/'video'/'corrupted.mp4')
    annotation = read_json(motions.annotation)
    case = read_json(shared/'cases'/'adatad'/'10_stops_early.json')['database']['corrupted']
    labels = sorted({e['label'] for v in annotation['database'].values() for e in v['annotations']})
    events = [dict(e, label=labels[k]) for k,e in enumerate(case['annotations'])]
    annotation['database']['corrupted'] = dict(case, subset='validation', annotations=events)
    write_json(root/'early.json', annotation)
    class World: pass
    World.root = root
    some = adatad_words(World, tmp_path, 'run', '--data.annotation', 'early.json')
    code,_,err = vadnb('train', '--config', 'adatad_demo', *some)
    assert code==2 and '28 of 50 announced frames decode' in err and f"'{labels[1]}' from 1.1 to 1.5 s lies behind frame 28" in err
    assert 'corrupted.mp4' in err and not (tmp_path/'run'/'log.jsonl').exists()
    code,_,err = vadnb('train', '--config', 'adatad_demo', *some, '--train.on_bad_sample', 'skip', *SHORT)
    assert code==0 and '28 of 50' in skipped(tmp_path/'run')[0]['message'], err
    assert read_jsonl(tmp_path/'run'/'log.jsonl')[-1]['status']=='done'

# ---------------------------------------------------------------- uniad: images, of which pictures are drawn

def test_damaged_test_images_of_the_paper_are_left_out(tmp_path):
    "A picture shows the image that its score belongs to, although one before it is missing"
    from test_uniad_system import config as uniad_config, cut
    from vadnb.worlds.textures import texture_world
    root = texture_world(tmp_path/'world', ['dots'], train=8, good=3, defective=6, size=(64, 64)).root
    some = '--data.protocol', 'paper', '--train.metric', 'image_auroc', '--data.cache', 'off', '--model.start', 'xavier'
    records = uniad_config(root, tmp_path, 'x', *some).make_data().split('valid').judged.records
    cut(root/records[0].name)
    with pytest.raises(DataError, match='1 of 17 validation images') as told: fit(uniad_config(root, tmp_path, 'raises', *some))
    assert records[0].name in str(told.value) and not (tmp_path/'raises'/'log.jsonl').exists()
    learner = fit(uniad_config(root, tmp_path, 'skips', *some, '--train.on_bad_sample', 'skip'))
    found, = skipped(learner.run)
    assert '1 of 17 validation images' in found['message'] and records[0].name in found['message']
    scan = learner.scan
    assert scan.names==[r.name for r in records[1:]]
    for i,name in enumerate(scan.names):
        shown = scan.case(i)
        k = next(k for k,r in enumerate(records) if r.name==name)
        assert shown.name==name and np.array_equal(shown.image, scan.items.judged[k]['image'].permute(1, 2, 0).numpy())

# ---------------------------------------------------------------- fgclip: clips with captions, and lists without

def test_a_damaged_validation_clip(tmp_path):
    from test_fgclip_system import config as fgclip_config, make_world, words as fgclip_words
    world = make_world(tmp_path/'world')
    items = read_json(world.valid)
    name = items[1]['f_path']
    path = next(p for p in world.root.rglob(Path(name).name))
    path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
    some = '--data.valid_json', world.valid.name, '--train.evaluate_every', 2, '--train.steps', 2
    code,_,err = vadnb('train', '--config', 'fgclip_demo', *fgclip_words(world, tmp_path, 'raises', *some))
    assert code==2 and str(path) in err and f'1 of {len(items)} validation videos' in err and not (tmp_path/'raises'/'log.jsonl').exists()
    skips = fit(fgclip_config(world, tmp_path, 'skips', *some, '--train.on_bad_sample', 'skip'))
    assert str(path) in skipped(skips.run)[0]['message']
    write_json(world.root/'without.json', items[:1]+items[2:])
    assert skips.metrics==fit(fgclip_config(world, tmp_path, 'without', *some, '--data.valid_json', 'without.json')).metrics
