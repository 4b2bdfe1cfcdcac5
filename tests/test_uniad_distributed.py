"Two processes train uniad as one does: the same parameters, features computed once, each looks at its share"
import json
import pytest
from test_processes import close, together
from toy_system import curve, rows
from vadnb.worlds.textures import texture_world
from vadnb.core import read_json
from vadnb.train.checkpoint import find_checkpoint, read_part
from vadnb.train.learner import fit

SMALL = '''--data.size [64,64] --data.hold_out 0.4 --model.hidden_dim 32 --model.nhead 4 --model.dim_feedforward 32 --model.dropout 0 --model.jitter_scale 0 --optim.name sgd --optim.lr 0.05 --optim.warmup 0
    --train.epochs 2 --train.evaluate_every 2 --train.save_every 2 --train.log_every 1 --train.progress false --train.trackers [] --train.device cpu'''.split()

@pytest.fixture(scope='module')
def world(tmp_path_factory): return texture_world(tmp_path_factory.mktemp('uniad')/'world', ['dots', 'weave'], train=10, good=1, defective=1, size=(64, 64)).root

def train(world, folder, name, batch, *more):
    "Train, and write down how many images this process encoded and looked at"
    import os
    from vadnb.systems.registry import load_config
    from vadnb.systems.uniad.scan import ImageScan
    from vadnb.systems.uniad.system import UniADSystem
    counts,encode,look = dict(encoded=0, looked=0), UniADSystem.encode, UniADSystem.look
    def counted(self, images):
        counts['encoded'] += len(images)
        return encode(self, images)
    def watched(self, batch):
        counts['looked'] += len(batch['name'])
        return look(self, batch)
    UniADSystem.encode,UniADSystem.look,ImageScan.pictures = counted, watched, lambda self: {}
    words = ['--data_root', str(world), '--runs', str(folder), '--name', name, *SMALL, '--train.batch_size', str(batch)]
    try: learner = fit(load_config('uniad_demo', [*words, *more]))
    finally: UniADSystem.encode,UniADSystem.look = encode, look
    (folder/f"{name}.counts{os.environ.get('RANK', '0')}").write_text(json.dumps(dict(counts, metrics=learner.metrics)))

def parameters(run):
    folder = find_checkpoint(run)
    return {f'{name}.{k}': v for name in ('head', 'backbone') for k,v in read_part(folder, name).items()}

def test_two_processes_are_one(tmp_path, world, monkeypatch):
    from vadnb.systems.uniad.scan import ImageScan
    monkeypatch.setattr(ImageScan, 'pictures', lambda self: {})
    train(world, tmp_path, 'one', 4, '--data.cache', 'memory')
    together(tmp_path/'two', train, world, tmp_path, 'two', 2, '--data.cache', 'disk')
    close(parameters(tmp_path/'one'), parameters(tmp_path/'two'))
    one,first,second = (json.loads((tmp_path/f).read_text()) for f in ('one.counts0', 'two.counts0', 'two.counts1'))
    # twelve to learn from; eight held out, and as many with planted defects: 28 images, wherever they were computed
    assert one['encoded']==first['encoded']+second['encoded']==28
    assert (one['looked'], first['looked'], second['looked'])==(16, 8, 8)
    assert first['metrics']==second['metrics'] and first['metrics']==pytest.approx(one['metrics'], abs=1e-3)
    assert [r['kind'] for r in curve(tmp_path/'two')]==[r['kind'] for r in curve(tmp_path/'one')]
    for a,b in zip(rows(tmp_path/'one', 'train'), rows(tmp_path/'two', 'train'), strict=True): assert a['loss']==pytest.approx(b['loss'], abs=1e-5)
    assert rows(tmp_path/'two', 'start')[0]['world']==2 and rows(tmp_path/'two', 'start')[0]['batch_size']==4
    held = [read_json(find_checkpoint(tmp_path/n)/'card.json')['calibration']['value']['scores'] for n in ('one', 'two')]
    assert held[0]==pytest.approx(held[1], abs=1e-4)
