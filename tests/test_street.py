"Street worlds as data sets: complete or absent, the same everywhere, true in every frame at every size"
import hashlib, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from vadnb.core import ConfigError, DataError, read_json
from vadnb.data.video import VideoReader
from vadnb.worlds import street
from vadnb.worlds.stage import frame_labels
from vadnb.worlds.street import street_world
from vadnb.worlds.street_events import KINDS, street_scene

root = Path(__file__).resolve().parent.parent
tiny = dict(videos=2, valid_videos=1, test_videos=2, frames=(32,36), size=(48,64))
texts = ('train.json', 'valid.json', 'test.json', 'test_annotation.txt', 'frames.json', 'world.json')

@pytest.mark.parametrize('size', [(48,64), (96,128), (192,160)])
@pytest.mark.parametrize('kind', KINDS)
def test_events_in_sight(kind, size):
    "Whatever the seed, the size and the length, each frame of an event shows it and its boxes lie in the picture"
    h,w = size
    for i in range(12):
        n = 32+11*i
        sc = street_scene(np.random.default_rng([77, i]), kind, size, n)
        assert .14*n <= frame_labels(sc).sum() <= .61*n
        assert all(0<=e.start<e.end<=n for e in sc.events)
        assert all(a.end<b.start for a,b in zip(sc.events, sc.events[1:]))
        for e in sc.events:
            for t in range(e.start, e.end):
                x0,y0,x1,y1 = e.box(t, size)
                assert 0<=x0<x1<=w and 0<=y0<y1<=h
            areas = [(x1-x0)*(y1-y0)/(h*w) for x0,y0,x1,y1 in (e.box(t, size) for t in range(e.start, e.end))]
            assert .002<np.median(areas)<.3

def test_normal_scene_is_empty():
    sc = street_scene(np.random.default_rng(0), None)
    assert not sc.events and not frame_labels(sc).any()
    assert (sc.frame(3)==sc.without_events().frame(3)).all()

def test_same_in_another_process(tmp_path):
    "Not a function of the process, its hash seed or numpy's global state"
    np.random.seed(1)
    world = street_world(tmp_path/'here', **tiny)
    code = f"import sys; from vadnb.worlds.street import street_world; street_world(sys.argv[1], **{tiny!r})"
    env = {**os.environ, 'PYTHONHASHSEED': '5', 'PYTHONPATH': str(root)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'there')], check=True, cwd=root, env=env)
    for name in texts: assert (world.root/name).read_bytes()==(tmp_path/'there'/name).read_bytes()
    name = world.names('test')[0]
    frames = lambda r: np.stack(list(VideoReader(r)))
    assert (frames(world.path(name))==frames(tmp_path/'there'/world.path(name).relative_to(world.root))).all()

def test_seeds_differ(tmp_path):
    a,b = (street_world(tmp_path/str(s), seed=s, **tiny) for s in (0, 1))
    assert a.train.read_text()!=b.train.read_text()
    digests = [hashlib.sha256(a.path(v['name']).read_bytes()).hexdigest() for v in a.videos]
    assert len(set(digests))==len(digests)

@pytest.mark.parametrize('share', [0., 1.])
def test_share_of_anomalous(tmp_path, share):
    world = street_world(tmp_path/'w', anomalous=share, **tiny)
    assert all((v['label']!='Normal')==bool(share) for v in world.videos)
    assert all(bool(item['bbox_info'])==bool(share) for item in read_json(world.train))

def test_rate_and_size_reach_the_file(tmp_path):
    world = street_world(tmp_path/'w', fps=12.5, **tiny)
    reader = VideoReader(world.path(world.names('valid')[0]))
    assert reader.fps==12.5 and reader.size==(48,64) and len(reader)==world.frames[world.names('valid')[0]]

def test_interrupted_world_leaves_nothing(tmp_path, monkeypatch):
    "An error in the middle of writing leaves no folder, and the next call makes the world"
    real,calls = street.write_video,[]
    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls)==3: raise DataError('disk full')
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(street, 'write_video', failing)
        with pytest.raises(DataError, match='disk full'): street_world(tmp_path/'w', **tiny)
    assert list(tmp_path.iterdir())==[]
    assert street_world(tmp_path/'w', **tiny).train.is_file()

def test_two_processes_at_once(tmp_path, monkeypatch):
    "The slower of two makers finds the world of the faster one and keeps it"
    real = street.write_street
    def overtaken(world, progress):
        real(world, progress)
        if not (tmp_path/'w').exists():
            monkeypatch.setattr(street, 'write_street', real)
            street_world(tmp_path/'w', **tiny)
    monkeypatch.setattr(street, 'write_street', overtaken)
    world = street_world(tmp_path/'w', **tiny)
    assert [p.name for p in tmp_path.iterdir()]==['w'] and all(world.path(v['name']).is_file() for v in world.videos)

def test_damaged_world_is_named(tmp_path):
    world = street_world(tmp_path/'w', **tiny)
    gone = world.path(world.names('test')[0]); gone.unlink()
    missing = f'{gone.name}: missing from a finished world'
    with pytest.raises(DataError, match=missing): street_world(tmp_path/'w', **tiny)
    (world.root/'world.json').unlink()
    with pytest.raises(DataError, match='no synthetic world'): street_world(tmp_path/'w', **tiny)
    assert world.train.is_file()

@pytest.mark.parametrize('bad,message', [
    (dict(videos=-1), 'videos: -1'), (dict(size=(32,64)), 'size'), (dict(frames=(60,40)), 'frames'),
    (dict(anomalous=1.5), 'anomalous: 1.5'), (dict(every=0), 'every: 0')])
def test_nonsense_is_refused(tmp_path, bad, message):
    with pytest.raises(ConfigError, match=message): street_world(tmp_path/'w', **{**tiny, **bad})
    assert list(tmp_path.iterdir())==[]

def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DataError, match='cannot be made'): street_world(tmp_path/'file'/'w', **tiny)

def test_progress_sees_every_video(tmp_path):
    seen = []
    world = street_world(tmp_path/'w', progress=lambda videos: (seen.append(v['name']) or v for v in videos), **tiny)
    assert seen==[v['name'] for v in world.videos]

def test_folder_is_a_file(tmp_path):
    (tmp_path/'w').write_text('notes')
    with pytest.raises(DataError, match='w: is a file'): street_world(tmp_path/'w', **tiny)
    assert (tmp_path/'w').read_text()=='notes'

def test_unknown_video(tmp_path):
    world = street_world(tmp_path/'w', **tiny)
    name = world.names('train')[0]
    with pytest.raises(DataError, match=f"did you mean '{name}'"): world.path(name+'x')
