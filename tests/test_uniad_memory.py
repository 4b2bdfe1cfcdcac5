"A memory of good images as a model of its own: trained, kept, loaded, resumed and shared out like every other; few shots; a flat folder; averaged maps"
import shutil
from pathlib import Path
import numpy as np, pytest, torch
from command import vadnb
from test_processes import together
from toy_system import FailAt, rows
from vadnb.core import CheckpointError, read_json, write_json
from vadnb.systems.registry import load_config, load_run
from vadnb.systems.uniad.scan import ImageScan
from vadnb.systems.uniad.memory import MemorySystem
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.feed import look_through
from vadnb.train.learner import fit
from vadnb.worlds.textures import texture_world

SMALL = '''--model.head memory --model.backbone test_resnet --model.memory_share 0.05 --data.size [64,64] --data.hold_out 0.4 --data.cache off --train.batch_size 4 --train.progress false
    --train.trackers [] --train.device cpu --train.workers 0'''.split()

def words(world, runs, name, *more): return ['--data_root', str(world), '--runs', str(runs), '--name', name, *SMALL, *map(str, more)]
def config(world, runs, name, *more): return load_config('uniad_demo', words(world, runs, name, *more))

def train(world, runs, name, *more, callbacks=()):
    ImageScan.pictures = lambda self: {}
    return fit(config(world, runs, name, *more), callbacks)

@pytest.fixture(scope='module')
def world(tmp_path_factory): return texture_world(tmp_path_factory.mktemp('memory')/'world', ['dots', 'weave'], train=10, good=3, defective=3, size=(64, 64)).root

@pytest.fixture(autouse=True)
def few_pictures(monkeypatch): monkeypatch.setattr(ImageScan, 'pictures', lambda self: {})

@pytest.fixture(scope='module')
def learner(world, tmp_path_factory):
    kept = ImageScan.pictures
    try: return train(world, tmp_path_factory.mktemp('runs'), 'memory')
    finally: ImageScan.pictures = kept

def memory(run): return read_part(find_checkpoint(run), 'head')
def seen(system, split='test'):
    data = system.cfg.make_data()
    with torch.no_grad(): return look_through(system, data, split, system.cfg.train, 'cpu')

def test_from_its_checkpoint_come_the_same_scores(learner):
    "Bit for bit, in evaluation and in prediction; thresholds are there, class by class"
    again,folder = load_run(learner.run)
    assert isinstance(again, MemorySystem) and folder.name=='step-000001'
    a,b = seen(learner.system.eval()), seen(again)
    assert a.names==b.names and all(np.array_equal(x, y) for x,y in zip(a.maps, b.maps)) and len(a)==12
    source = Path(learner.cfg.data_root)/'weave'/'test'
    first,second = ([(p.name, p.score, p.cls) for p in s.predict(source)] for s in (learner.system, again))
    assert first==second and {cls for *_,cls in first}=={'weave'}
    assert not any(p.requires_grad for p in again.parameters()) and not rows(learner.run, 'train')

def test_each_class_is_compared_with_its_own_memory(learner, monkeypatch):
    "With the classes in each other's place every distance is another, and what is all alike lies far from what varies; a test set that holds one class only numbers it 0"
    system = learner.system.eval()
    right = seen(system)
    with monkeypatch.context() as m:
        m.setattr(MemorySystem, 'numbers', lambda self, names: [1-self.classes.index(n) for n in names])
        wrong = seen(system)
    assert all(np.abs(w-r).min()>0 for w,r in zip(wrong.maps, right.maps))
    assert all(np.mean(w)>1.5*np.mean(r) for w,r,c in zip(wrong.maps, right.maps, right.classes) if c=='dots')
    weave,_ = load_run(learner.run, overrides=['--data.classes', '["weave"]'])
    only = seen(weave)
    own = {n: m for n,m in zip(right.names, right.maps)}
    assert set(only.classes)=={'weave'} and all(np.allclose(m, own[n], atol=1e-4) for n,m in zip(only.names, only.maps))

def test_a_memory_outside_of_the_checkpoint_is_a_fault(world, tmp_path, monkeypatch):
    monkeypatch.setattr(MemorySystem, 'parts', lambda self: dict(backbone=self.backbone))
    with pytest.raises(CheckpointError, match="'head.tokens' is filled by the pass and in no part"): train(world, tmp_path, 'lost')
    assert not (tmp_path/'lost'/'checkpoints').exists()

def test_a_finished_run_is_finished(learner):
    with pytest.raises(CheckpointError, match=r'is finished \(1 of 1 steps\); choose another --name$'): fit(learner.cfg)

def test_a_run_that_failed_after_its_pass_goes_on_from_its_memory(world, tmp_path, learner):
    "What follows the pass may fail; the memory that was saved is the one that is calibrated"
    failing = FailAt(1)
    failing.order = 100
    with pytest.raises(RuntimeError): train(world, tmp_path, 'again', callbacks=[failing])
    before = memory(tmp_path/'again')
    assert train(world, tmp_path, 'again').log.last('end')['status']=='done'
    for k,v in memory(learner.run).items(): assert torch.equal(v, before[k]) and torch.equal(v, memory(tmp_path/'again')[k]), k

def test_two_processes_remember_what_one_does(world, tmp_path, learner):
    together(tmp_path/'two', train, world, tmp_path, 'two')
    for k,v in memory(learner.run).items(): assert torch.equal(v, memory(tmp_path/'two')[k]), k
    assert rows(tmp_path/'two', 'start')[0]['world']==2
    a,b = (read_json(find_checkpoint(r)/'card.json')['calibration']['value']['scores'] for r in (learner.run, tmp_path/'two'))
    assert a==pytest.approx(b, abs=1e-5)

CARDS = {
    'rows': (dict(rows=3, neighbours=1), 'does not fit this model', 'tokens'),
    'no rows': (dict(rows='3', neighbours=1), 'facts.memory: must give rows and neighbours', ''),
    'far too many': (dict(rows=10**12, neighbours=1), 'facts.memory', ''),
    'neighbours': (dict(rows=None, neighbours=3), "'model.memory_neighbours' is 1, the run was trained with 3", ''),
}

@pytest.mark.parametrize('harm', CARDS)
def test_a_card_that_no_run_wrote(learner, tmp_path, harm):
    held,*says = CARDS[harm]
    run = Path(shutil.copytree(learner.run, tmp_path/'run', symlinks=True))
    card = read_json(find_checkpoint(run)/'card.json')
    card['facts']['memory'] = card['facts']['memory'] | {k: v for k,v in held.items() if v is not None}
    write_json(find_checkpoint(run)/'card.json', card)
    with pytest.raises(CheckpointError) as e: load_run(run)
    for s in says: assert s in str(e.value)

def test_by_the_command_line(world, tmp_path, monkeypatch):
    "verify, train, eval, predict, report; and what cannot be"
    some = words(world, tmp_path, 'run', '--data.shots', 3)
    code,out,err = vadnb('verify', '--config', 'uniad_demo', *some)
    assert code==0 and 'none: 6 images are learned from in one pass' in out and 'a memory of 0.05 of the 8x8 tokens' in out and 'few shots' in out, out
    with monkeypatch.context() as m:
        # the page is written once, by its own command below
        m.setattr('vadnb.report.report.write_report', lambda run, *_: Path(run)/'report.html')
        code,out,err = vadnb('train', '--config', 'uniad_demo', *some)
    assert code==0 and 'done at step 1 of 1' in out, err
    for command in (['eval'], ['predict', world/'dots'/'test'/'good'], ['report']):
        code,out,err = vadnb(*command, '--run', tmp_path/'run')
        assert code==0, err
    assert 0<read_json(tmp_path/'run'/'eval.json')['metrics']['pixel_auroc']<=1
    for line,says in ((['lr-find', '--config', 'uniad_demo', *some], 'it has no learning rate to look for'),
                      (['pictures', '--run', tmp_path/'run'], 'is a memory'),
                      (['eval', '--run', tmp_path/'run', '--model.local_average', 'true'], "'model.local_average' comes to [4, 8], the run was trained with"),
                      (['train', '--config', 'uniad_demo', *some, '--train.ema', '0.9', '--name', 'b'], 'there is nothing to average')):
        code,out,err = vadnb(*line)
        assert code==2 and says in err and err.count('\n')==1, err

def test_few_shots_are_drawn_by_the_seed(world, tmp_path):
    def drawn(*more): return [r.name for r in config(world, tmp_path, 'x', *more).make_data().split('train').records]
    two,four = drawn('--data.shots', 2), drawn('--data.shots', 4)
    assert two==drawn('--data.shots', 2) and {*two}<{*four} and len(two)==4
    assert any(two!=drawn('--data.shots', 2, '--seed', s) for s in (1, 2, 3))
    assert len(drawn())==12
    code,_,err = vadnb('train', '--config', 'uniad_demo', *words(world, tmp_path, 'x', '--data.shots', 7))
    assert code==2 and "class 'dots': has 6 good images to learn from, and data.shots asks for 7" in err
    code,_,err = vadnb('train', '--config', 'uniad_demo', *words(world, tmp_path, 'x', '--data.shots', 0))
    assert code==2 and "'data.shots' must be null or 1 or more, found 0" in err

def test_a_memory_of_one_image(world, tmp_path):
    "One image of each class is a batch and a memory"
    one = train(world, tmp_path, 'one', '--data.shots', 1)
    assert one.system.head.ends.tolist()==[3, 6] and one.metrics['image_auroc']>=.5

def test_a_flat_folder_of_photographs(world, tmp_path):
    "Both heads learn from a folder that holds images and nothing else; there is nothing to test with, and that is said"
    photographs = Path(shutil.copytree(world/'dots'/'train'/'good', tmp_path/'photographs'))
    for name,head in (('m', 'memory'), ('r', 'reconstruction')):
        learner = fit(load_config('uniad_folder', [*words(photographs, tmp_path, name), '--model.head', head, '--model.backbone', 'test_resnet', '--model.pretrained', 'false',
            '--model.strides', '[4,8]', '--model.outstride', '8', '--model.hidden_dim', '32', '--model.nhead', '4', '--model.dim_feedforward', '32', '--model.neighbor_size', '[3,3]', '--train.epochs', '1']))
        assert learner.system.classes==['photographs'] and len(learner.train)==6 and learner.step>=1
    code,_,err = vadnb('eval', '--run', tmp_path/'m')
    assert code==2 and 'names no test data' in err

def test_averaged_maps_are_other_features(world, tmp_path):
    "By hand: each map averaged before the neck; the cache tells the two apart, and off is what it was"
    build = lambda *more: load_config('uniad_demo', ['--data_root', str(world), '--data.size', '[64,64]', *more]).build(dict(classes=['dots', 'weave'])).eval()
    torch.manual_seed(0)
    plain,some,every = (build('--model.local_average', a) for a in ('null', '[8]', 'true'))
    for s in (some, every): s.backbone.load_state_dict(plain.backbone.state_dict())
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fine,coarse = plain.encode(x).split(plain.backbone.channels, 1)
    assert plain.averaged==build("--model.local_average", "false").averaged==()
    with torch.no_grad(): maps = plain.backbone((x-plain.mean)/plain.std)
    slow = torch.nn.functional.unfold(torch.nn.functional.pad(maps[1], (1, 1, 1, 1)), 3).view(1, maps[1].shape[1], 9, *maps[1].shape[-2:]).sum(2)
    count = torch.nn.functional.unfold(torch.nn.functional.pad(torch.ones(1, 1, *maps[1].shape[-2:]), (1, 1, 1, 1)), 3).sum(1).view(maps[1].shape[-2:])
    a,b = some.encode(x).split(plain.backbone.channels, 1)
    assert torch.equal(a, fine) and torch.allclose(b, slow/count, atol=1e-5) and not torch.allclose(b, coarse, atol=1e-3)
    assert not torch.allclose(every.encode(x).split(plain.backbone.channels, 1)[0], fine, atol=1e-3)
    assert some.facts()['averaged']==[8] and 'averaged' not in plain.facts()
