"Worlds of directions: the same everywhere, in the formats of others, and no picture tells where a shape goes"
import json, os, subprocess, sys
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from vadnb.core import ConfigError, DataError
from vadnb.data.video import VideoReader
from vadnb.worlds.directions import (DIRECTIONS, SHAPES, SSV2_CLASSES, direction_clips, direction_scene, group_background, make_ssv2_directions,
                                     make_ucf_directions, rolling, shape_patch)
from vadnb.worlds.stage import Scene

root = Path(__file__).resolve().parent.parent
ucf,ssv2 = dict(groups=6, test_groups=2, clips=1), dict(videos=8, valid_videos=4)

@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    at = tmp_path_factory.mktemp('directions')
    return dict(ucf=make_ucf_directions(at/'u', **ucf), ssv2=make_ssv2_directions(at/'s', **ssv2))

@pytest.mark.parametrize('kind', SHAPES)
def test_one_frame_says_nothing(kind):
    "Over all starts, the pictures at any time are one heap, whatever the direction: wrapped shapes included"
    back,size = np.add.outer(np.arange(8)*9, np.arange(10)*4)[...,None].repeat(3, 2).astype(np.uint8), (8, 10)
    for speed,t in ((1, 3), (2.75, 2), (4, 7)):
        heaps = [Counter(Scene(back, 8, [rolling(shape_patch(kind, 5, (250, 240, 230)), (x, y), (speed*dx, speed*dy), size)]).frame(t).tobytes()
                         for y in range(8) for x in range(10)) for dx,dy in DIRECTIONS.values()]
        assert all(h==heaps[0] for h in heaps) and sum(heaps[0].values())==80

def test_borders_are_nowhere():
    "A shape that leaves comes back in the same frame: every frame shows as much of it"
    patch = shape_patch('disc', 15, (255, 255, 255))
    film = Scene(np.zeros((40, 40, 3), np.uint8), 40, [rolling(patch, (30, 30), (3, 0), (40, 40))])
    assert {int((f>0).sum()) for f in film.frames()}=={int((patch[...,3]>0).sum())*3}

def test_clips_do_not_depend_on_the_direction_but_for_it():
    "Shape, size, colour, speed and start are drawn alike for every direction"
    drawn = {d: [direction_scene(np.random.default_rng(i), d, group_background(0, i, (56, 56))).frame(0) for i in range(5)] for d in DIRECTIONS}
    for i in range(5): assert len({drawn[d][i].tobytes() for d in DIRECTIONS})==1

@pytest.mark.parametrize('n,groups', [(40, range(5)), (41, [7]), (3, range(100, 200))])
def test_clips_in_memory_are_balanced(n, groups):
    clips,labels,of = direction_clips(n, groups, (32, 32), 3)
    assert clips.shape==(n, 3, 32, 32, 3) and clips.dtype==np.uint8 and labels.dtype==of.dtype==np.int64
    assert np.ptp(np.bincount(labels, minlength=4))<=1 and set(of)<=set(groups)
    assert np.ptp([*Counter(of.tolist()).values()])<=1
    assert (direction_clips(n, groups, (32, 32), 3)[0]==clips).all()
    assert (direction_clips(n, groups, (32, 32), 3, seed=1)[0]!=clips).any()

def test_groups_have_one_background_each(worlds):
    "Those that are tested have backgrounds that no clip of training has; in SSv2's folders every video has its own"
    for world in worlds.values():
        backs = {}
        for path,c in world.clips.items(): backs.setdefault(c.group, set()).add(world.scene(path).background.tobytes())
        assert all(len(b)==1 for b in backs.values()) and len(set.union(*backs.values()))==len(backs)
    groups = {p: {c.group for c in worlds['ucf'].clips.values() if c.part==p} for p in ('train', 'test')}
    assert groups['train'] and groups['test'] and not groups['train']&groups['test']

def test_the_lists_are_those_of_ucf101(worlds):
    "Read as anybody reads them: classes from 1, a split tests its groups and trains on the others, CRLF"
    world = worlds['ucf']
    index = dict(l.split()[::-1] for l in (world.lists/'classInd.txt').read_text().splitlines())
    assert sorted(index.values())==['1', '2', '3', '4']
    tested = []
    for k in (1, 2, 3):
        train,test = ((world.lists/f'{part}list0{k}.txt').read_bytes().decode() for part in ('train', 'test'))
        assert train.count('\r\n')==train.count('\n')==16 and test.count('\r\n')==8
        rows = [l.split(' ') for l in train.split('\r\n')[:-1]]
        for path,label in rows: assert index[path.split('/')[0]]==label
        paths = [p for p,_ in rows], test.split('\r\n')[:-1]
        groups = [{p.split('_g')[1][:2] for p in ps} for ps in paths]
        assert not groups[0]&groups[1] and len(groups[0]|groups[1])==6
        tested += groups[1]
        for p in paths[0]+paths[1]:
            assert (world.videos/p).is_file()
            assert world.clips[f'UCF-101/{p}'].direction==p.split('/')[0].removeprefix('Moving')
    assert sorted(tested)==['01', '02', '03', '04', '05', '06']

def test_the_labels_are_those_of_ssv2(worlds, shared):
    "Templates without brackets are keys, whose numbers count from 0; the names are four of the original's"
    world = worlds['ssv2']
    keys = json.loads((world.lists/'labels.json').read_text())
    official = json.loads((shared/'data'/'ssv2'/'labels.json').read_text())
    assert set(keys)<=set(official) and sorted(keys, key=lambda k: int(keys[k]))==sorted(keys)
    seen = []
    for part,n in (('train', 8), ('validation', 4)):
        rows = json.loads((world.lists/f'{part}.json').read_text())
        assert Counter(r['template'] for r in rows)==Counter({t: n//4 for t in SSV2_CLASSES})
        for r in rows:
            key = r['template'].replace('[', '').replace(']', '')
            clip = world.clips[f"20bn-something-something-v2/{r['id']}.webm"]
            assert (clip.part, clip.direction)==(part, SSV2_CLASSES[r['template']]) and world.classes[int(keys[key])]==clip.direction
            assert r['placeholders'][0] in r['label'] and '[' not in r['label'] and r['label'][0].islower()
            seen.append(r['id'])
    assert len(set(seen))==12

def test_files_are_what_they_claim(worlds):
    "AVI with MPEG-4, WebM with VP9 that does not tell its length; every frame near the drawn one"
    import av
    for world,codec,ending in ((worlds['ucf'], 'mpeg4', '.avi'), (worlds['ssv2'], 'vp9', '.webm')):
        for path in list(world.clips)[:4]:
            with av.open(str(world.root/path)) as c:
                s = c.streams.video[0]
                assert s.codec_context.name==codec and path.endswith(ending)
                if ending=='.webm': assert not s.frames and s.duration is None
            sc,video = world.scene(path), VideoReader(world.root/path)
            assert len(video)==8 and float(video.fps)==sc.fps
            off = np.abs(video.get_batch(range(8)).astype(int)-np.stack([*sc.frames()]).astype(int)).mean((1, 2, 3))
            assert off.max()<12, (path, off)

def test_same_in_another_process(worlds, tmp_path):
    code = ("import sys; from vadnb.worlds.directions import make_ucf_directions, make_ssv2_directions; "
            f"make_ucf_directions(sys.argv[1]+'/ucf', **{ucf!r}); make_ssv2_directions(sys.argv[1]+'/ssv2', **{ssv2!r})")
    env = {**os.environ, 'PYTHONHASHSEED': '5', 'PYTHONPATH': str(root)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, cwd=root, env=env)
    for name,world in worlds.items():
        for f in world.files(): assert (world.root/f).read_bytes()==(tmp_path/name/f).read_bytes(), f

def test_faults(worlds, tmp_path):
    for says,make,wrong in [('seed: -1', make_ucf_directions, dict(seed=-1)), ('groups', make_ucf_directions, dict(groups=5)),
                            ('size', make_ssv2_directions, dict(size=(56, 55))), ('videos: 0', make_ssv2_directions, dict(videos=0)),
                            ('frames: 1', make_ssv2_directions, dict(frames=1)), ('fps', make_ucf_directions, dict(fps=-1))]:
        with pytest.raises(ConfigError, match=says): make(tmp_path/'x', **wrong)
    assert not (tmp_path/'x').exists()
    with pytest.raises(DataError, match='no clip'): worlds['ucf'].scene('UCF-101/x.avi')
    with pytest.raises(DataError, match='another world'): make_ssv2_directions(worlds['ucf'].root, **ssv2)
    (worlds['ucf'].root/'ucfTrainTestlist'/'classInd.txt').rename(tmp_path/'classInd.txt')
    with pytest.raises(DataError, match='classInd.txt: missing'): make_ucf_directions(worlds['ucf'].root, **ucf)
    (tmp_path/'classInd.txt').rename(worlds['ucf'].root/'ucfTrainTestlist'/'classInd.txt')
