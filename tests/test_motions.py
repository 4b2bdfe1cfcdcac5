"Worlds of motions: the same everywhere, true in every frame and at every size, and no picture tells what happens"
import os, subprocess, sys
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from vadnb.core import ConfigError, DataError, read_json
from vadnb.data.video import VideoReader
from vadnb.worlds.motions import MOTIONS, PLACES, Rail, make_motions, motion_scene
from vadnb.worlds.stage import Scene, blank, disc, frame_labels

root = Path(__file__).resolve().parent.parent
tiny = dict(videos=2, valid_videos=1, test_videos=1, frames=(150, 170))

@pytest.fixture(scope='module')
def world(tmp_path_factory): return make_motions(tmp_path_factory.mktemp('motions')/'w', **tiny)

@pytest.mark.parametrize('size', [(32, 32), (48, 64), (64, 34)])
def test_in_sight_and_apart(size):
    "Whatever the seed and the size, the disc is wholly in the picture in every frame, and rests lie between motions"
    for i in range(25):
        sc = motion_scene(np.random.default_rng([3, i]), size, 200+3*i)
        assert all(a.end+10<=b.start for a,b in zip(sc.events, sc.events[1:]))
        assert sc.events[0].start>=10 and len(sc)-sc.events[-1].end>=10
        discs = [a for e in sc.events for a in e.actors]+[a for a in sc.actors if a.depth==1]
        on_stage = Counter(t for a in discs for t in range(a.start, a.end))
        assert on_stage==Counter(range(len(sc))), 'one disc in every frame'
        for t in range(0, len(sc), 7):
            (place,) = [p for a in discs if (p := a.place(t, size))]
            assert place[0].shape[:2]==discs[0].look(0).shape[:2], 'nothing of it is cut off'

@pytest.mark.parametrize('places', PLACES)
def test_order_is_all(places):
    "The pictures of an event are the same heap whatever the motion, and their order is not"
    ball = blank(9, 9)
    disc(ball, 4.5, 4.5, 4, 4, (250, 220, 90))
    for rest in (0, places//2, places-1):
        rail,films = Rail(5, 27, 16, places, rest, ball), {}
        for m in MOTIONS:
            e = rail.moving(m, 0, 2)
            films[m] = [f.tobytes() for f in Scene(np.zeros((32, 32, 3), np.uint8), e.end, events=[e]).frames()]
        heaps = {tuple(sorted(f)) for f in films.values()}
        assert len(heaps)==1 and len({tuple(f) for f in films.values()})==4
        assert len(set(films['Leap']))==places

def test_classes_are_balanced():
    "Motions are dealt from a pack of four: no video has one class twice more often than another"
    for i in range(20):
        counts = Counter(e.label for e in motion_scene(np.random.default_rng(i), frames=448).events)
        assert max(counts.values())-min(counts[m] for m in MOTIONS)<=1

def test_annotation_is_the_truth(world):
    database = read_json(world.annotation)['database']
    assert list(database)==list(world.videos)
    assert world.class_list.read_text().split()==list(MOTIONS)
    for name,row in database.items():
        sc,video = world.scene(name),VideoReader(world.path(name))
        assert len(video)==len(sc)==row['frame'] and row['duration']==pytest.approx(len(sc)/10)
        inside = np.zeros(len(sc), bool)
        for a in row['annotations']: inside[round(a['segment'][0]*10):round(a['segment'][1]*10)] = True
        assert (inside==frame_labels(sc)).all()
        assert [(a['label'], *a['segment']) for a in row['annotations']]==world.truth(row['subset'])[name]

def test_longer_than_a_window(tmp_path):
    "With the default lengths no window of 128 frames holds a video"
    w = make_motions(tmp_path/'w', videos=1, valid_videos=1, test_videos=1)
    assert all(128<v['frame'] for v in read_json(w.annotation)['database'].values())

def test_same_in_another_process(world, tmp_path):
    code = f"import sys; from vadnb.worlds.motions import make_motions; make_motions(sys.argv[1], **{tiny!r})"
    env = {**os.environ, 'PYTHONHASHSEED': '5', 'PYTHONPATH': str(root)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'there')], check=True, cwd=root, env=env)
    for f in world.files(): assert (world.root/f).read_bytes()==(tmp_path/'there'/f).read_bytes(), f

def test_seeds_differ(world, tmp_path):
    other = make_motions(tmp_path/'w', **tiny, seed=1)
    assert other.annotation.read_text()!=world.annotation.read_text()
    assert world.scene(world.names('test')[0]).events!=world.scene(world.names('training')[0]).events

def test_faults(world, tmp_path):
    for says,wrong in [('seed: -1', dict(seed=-1)), ('videos: True', dict(videos=True)), ('size', dict(size=(30, 32))),
                       ('rest: (0, 9)', dict(rest=(0, 9))), ('frames: (90, 100)', dict(frames=(90, 100))),
                       ('fps', dict(fps=0))]:
        with pytest.raises(ConfigError, match=says.replace('(', r'\(').replace(')', r'\)')):
            make_motions(tmp_path/'x', **tiny|wrong)
    assert not (tmp_path/'x').exists()
    with pytest.raises(DataError, match='did you mean'): world.scene('motions_test_000003')
