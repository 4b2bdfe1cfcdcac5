"Decoder, reconstructions and queries: what must not be given, what must not be touched, and files of a run"
import random, shutil
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from torch import nn
from vadnb.core import CheckpointError, ConfigError, DataError
from vadnb.worlds.stage import generator
from vadnb.worlds.defects import PlantedDefects
from vadnb.worlds.textures import texture_world
from vadnb.models.feature_decoder import FeatureDecoder, image_loss
from vadnb.plots import figure_bytes
from vadnb.systems.uniad.config import Config, DataConfig, ModelConfig, ScoreConfig
from vadnb.systems.uniad.pictures import choose_images, collage, good_images, query_figure, reconstruction_figure, redraw, train_decoder, write_pictures
from vadnb.train.system import TrainConfig
from vadnb.train.learner import fit
from vadnb.report.report import write_report

@pytest.fixture(scope='module')
def world(tmp_path_factory): return texture_world(tmp_path_factory.mktemp('pictures')/'world', classes=['weave', 'bricks', 'dots'], train=6, good=2, defective=4, size=(48, 64), shift=1)

def config(world, name='run', **data):
    return Config(name=name, runs=str(world.root.parent/'runs'), data_root=str(world.root), seed=3, data=DataConfig(**(dict(train='.', size=[48, 64], cache='memory', hold_out=.2) | data)),
                  model=ModelConfig(backbone='test_resnet', pretrained=False, start='data', strides=[4, 8], outstride=8, hidden_dim=16, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32, neighbor_size=[3, 3]),
                  score=ScoreConfig(pool=[8, 8]), train=TrainConfig(batch_size=4, steps=2, epochs=None, workers=0, progress=False, trackers=[], resume='never'))

@pytest.fixture(scope='module')
def learner(world): return fit(config(world))

@pytest.fixture(scope='module')
def system(learner): return learner.system.eval()

@pytest.fixture(scope='module')
def train(learner): return learner.fed.split('train')

@pytest.fixture(scope='module')
def tested(learner): return learner.data.split('test')

def quick(system, data, **kw): return train_decoder(system, data, **(dict(steps=2, batch_size=2, width=16) | kw))
def state(): return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

def test_a_decoder_overfits_a_handful():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    features = torch.randn(4, 48, 2, 3)*100+7
    decoder = FeatureDecoder(48, 8, 64).fit_statistics(features)
    optim = torch.optim.AdamW(decoder.parameters(), 4e-3)
    for _ in range(120):
        optim.zero_grad(); image_loss(decoder(features), images).backward(); optim.step()
    # noise has a variance of a twelfth, which no picture that ignores its features can be better than
    assert image_loss(decoder(features), images)<.05/12

@pytest.mark.parametrize('stride', [0, -8, 3, 12, 8., True])
def test_strides_that_cannot_be_doubled_up_to(stride):
    with pytest.raises(ConfigError, match='stride: .* is not|stride: True'): FeatureDecoder(4, stride)

def test_decoder_states_travel_with_their_statistics():
    decoder = FeatureDecoder(4, 2, 16).fit_statistics(torch.randn(8, 4, 3, 3)*5+2)
    other = FeatureDecoder(4, 2, 16)
    other.load_state_dict(decoder.state_dict())
    x = torch.randn(1, 4, 5, 2)
    assert torch.equal(decoder(x), other(x))

def test_equal_seeds_give_equal_pictures_and_leave_all_generators_alone(system, train, tested):
    data,shown = train, tested
    before = state()
    (a,la),(b,lb) = quick(system, data),quick(system, data)
    first = [figure_bytes(reconstruction_figure(system, d, shown, most=2), 'png', 50) for d in (a, b)]+[figure_bytes(query_figure(system, d), 'png', 50) for d in (a, b)]
    assert state()==before
    assert la==lb and len(la)==2
    assert first[0]==first[1] and first[2]==first[3]
    torch.manual_seed(99)
    assert quick(system, data)[1]==la
    # cached features and images are the same data
    assert quick(system, data.data)[1]==la
    assert not any(p.requires_grad for p in a.parameters()) and not a.training
    with torch.no_grad(): assert quick(system, data)[1]==la

def test_another_seed_gives_another_decoder(system, train):
    old = system.cfg.seed
    try:
        losses = quick(system, train)[1]
        system.cfg.seed = old+1
        assert quick(system, train)[1]!=losses
    finally: system.cfg.seed = old

def test_training_a_decoder_leaves_the_system_alone(system, train):
    before = {k: v.clone() for k,v in system.state_dict().items()}
    quick(system, train)
    assert all(torch.equal(v, before[k]) for k,v in system.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in system.backbone.parameters())

def test_only_good_images_are_learned_from(system, train):
    planted = PlantedDefects(train.data, 0)
    with pytest.raises(DataError, match='is defective, and a decoder'): quick(system, planted)
    with pytest.raises(DataError, match='holds no image'): quick(system, [])
    for kw,says in ((dict(steps=0), 'steps: 0'), (dict(steps=2.), 'steps: 2.0'), (dict(collages=1.5), 'collages: 1.5')):
        with pytest.raises(ConfigError, match=says): quick(system, train, **kw)

def test_many_images_are_taken_evenly(train):
    data = train.data
    assert len(good_images(data, 1000))==len(data)
    few = good_images(data, 3)
    assert [torch.equal(x, data[i]['image']) for x,i in zip(few, (0, round((len(data)-1)/2), len(data)-1))]==[True]*3

def test_a_collage_changes_rectangles_and_nothing_else():
    images = torch.zeros(3, 3, 48, 64, dtype=torch.uint8); images[1] = 100; images[2] = 200
    mixed = collage(images, generator(1), pieces=1, colour=0.)
    for before,after in zip(images, mixed):
        ys,xs = (after!=before).any(0).nonzero().T
        if len(ys): assert (after!=before).any(0)[ys.min():ys.max()+1, xs.min():xs.max()+1].all() and 3<=np.ptp(ys.numpy())+1<=16 and 4<=np.ptp(xs.numpy())+1<=21
    assert images.unique().tolist()==[0, 100, 200]==mixed.unique().tolist()
    assert collage(images, generator(1), colour=.3).dtype==torch.uint8
    assert collage(images[:1,:,:8,:8], generator(0)).shape==(1, 3, 8, 8)

class Listed:
    "A data set that has only a list"
    classes = ['a', 'b', 'c']
    def __init__(self, rows): self.records = [SimpleNamespace(name=f'{self.classes[c]}/test/{k or "good"}/{i}.png', label=int(bool(k)), cls=c) for i,(c,k) in enumerate(rows)]
    def __len__(self): return len(self.records)
    def tags(self, i): return dict(name=self.records[i].name, cls=torch.tensor(self.records[i].cls))

def test_choice_of_images():
    rows = [(c, k) for c in (0, 1, 2) for k in ('', '', 'hole', 'hole', 'crack')]
    chosen = lambda most, rows=rows: [rows[i] for i in choose_images(Listed(rows), most)]
    assert chosen(6)==[(c, k) for c in (0, 1, 2) for k in ('hole', '')]
    assert chosen(9)==[(c, k) for c in (0, 1, 2) for k in ('hole', '', 'crack')]
    assert chosen(5)==[(0, 'hole'), (0, ''), (2, 'hole'), (2, '')]
    assert chosen(1)==[(0, 'hole')]
    assert sorted(chosen(1000))==sorted(rows)
    assert choose_images(Listed(rows), 1000)==sorted(set(choose_images(Listed(rows), 1000)), key=choose_images(Listed(rows), 1000).index)
    # a class of one sort
    assert chosen(4, [(0, ''), (0, ''), (1, 'hole')])==[(0, ''), (0, ''), (1, 'hole')]
    with pytest.raises(ConfigError, match='most: 0'): choose_images(Listed(rows), 0)

def test_rows_show_what_the_system_sees(system, train, tested):
    decoder,_ = quick(system, train)
    data = tested
    bad = next(i for i in range(len(data)) if data.records[i].label)
    row, = redraw(system, decoder, data, [bad])
    found = system.look(dict(image=data[bad]['image'][None]))['distance'][0].numpy()
    assert np.allclose(row.case.map, system.full(found), atol=1e-5) and row.case.score==pytest.approx(system.image_score(found), rel=1e-5)
    assert row.seen.shape==row.rebuilt.shape==(48, 64, 3) and (row.case.image==data[bad]['image'].permute(1, 2, 0).numpy()).all() and row.case.mask.any()
    with torch.no_grad(): expected = decoder(system.encode(data[bad]['image'][None]))[0].permute(1, 2, 0).numpy()
    assert np.allclose(row.seen, expected, atol=1e-6)
    with pytest.raises(DataError, match='no image to show'): reconstruction_figure(system, decoder, data, [])

def test_queries_of_a_fresh_model_are_copies(system, world, train):
    decoder,_ = quick(system, train)
    below = lambda s: [ax.get_xlabel() for ax in query_figure(s, decoder).axes]
    assert below(config(world).build())[1]=='0.0% off layer 1'
    with torch.no_grad():
        fresh = config(world).build(); fresh.head.transformer.decoder.layers[1].learned_embed.weight += 5
    assert below(fresh)[1]!='0.0% off layer 1'

def test_a_run_gets_its_pictures_again_and_the_report_shows_them(learner, system):
    run,seen = learner.run,[]
    weights = {p.name: p.read_bytes() for p in run.rglob('*.safetensors')}
    def counted(x): seen.extend(x); return x
    paths = write_pictures(run, steps=2, most=2, progress=counted)
    assert [p.name for p in paths]==['reconstruction.png', 'queries.png'] and len(seen)==2
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_pictures(run, which='last', steps=2, most=2)]==first
    assert {p.name: p.read_bytes() for p in run.rglob('*.safetensors')}==weights
    page = write_report(run).read_text()
    assert '<figcaption>reconstruction' in page and '<figcaption>queries' in page

def test_pictures_of_a_run_without_test_images(world):
    shutil.copytree(world.root/'dots'/'train', world.root.parent/'plain')
    run = fit(config(world, 'plain', train='../plain', classes=None)).run
    assert all(p.is_file() for p in write_pictures(run, steps=1, most=4))

def test_runs_that_have_no_such_pictures(tmp_path):
    with pytest.raises(CheckpointError): write_pictures(tmp_path/'nothing')
    (tmp_path/'config.yaml').write_text('system: fgclip\n')
    with pytest.raises(ConfigError, match='is a run of fgclip'): write_pictures(tmp_path)
