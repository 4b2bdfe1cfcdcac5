"""Textures and planted defects: on every picture, the same in every process, worlds complete or absent, caches that
notice a change"""
import hashlib, importlib.util, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from vadnb.core import ConfigError, DataError, read_json
from vadnb.data.anomaly_images import AnomalyImages, collate
from vadnb.data.image_lists import check_split, hold_out
from vadnb.data.mvtec import read_tree, write_tree_meta
from vadnb.worlds import defects
from vadnb.worlds.defect_brushes import AREA, VISIBLE, side, visibly
from vadnb.worlds.defects import DEFECTS, PLANTING, PlantedDefects, plant
from vadnb.worlds.materials import TEXTURES
from vadnb.worlds.stage import generator
from vadnb.worlds.textures import crop_world, skimage_textures, texture_world

root = Path(__file__).resolve().parent.parent
tiny = dict(classes=['wood', 'tiles'], train=2, good=1, defective=5, size=(32, 48), seed=5)
has_skimage = importlib.util.find_spec('skimage') is not None

def check_planted(picture, kind, *seed):
    changed,mask,said = plant(picture, np.random.default_rng(seed), kind)
    seen = np.abs(changed.astype(int)-picture).max(-1)>=VISIBLE
    reach,whole = max(round(side(seen.shape)/64), 1),side(seen.shape)**2
    assert said==kind and AREA[0]*whole<=mask.sum()<=AREA[1]*whole
    near = ndimage.binary_dilation(seen, np.ones((2*reach+1,)*2))
    assert not (seen & ~mask).any() and not (mask & ~near).any()

@pytest.mark.parametrize('kind', DEFECTS)
def test_plain_pictures_take_every_kind(kind):
    "The hardest grounds: nothing to warp or to smear, and no room above white or below black"
    for level in (0, 1, 128, 254, 255, (255, 0, 0), (0, 0, 255)):
        for size in ((32, 32), (64, 96)):
            for seed in range(12): check_planted(np.full((*size, 3), level, np.uint8), kind, seed)

@pytest.mark.parametrize('size', [(32, 32), (96, 80), (224, 224), (40, 400)])
def test_photographs_take_every_kind(shared, size):
    for i,p in enumerate(sorted((shared/'data/anomaly_images/hazelnut_toy/train/good').glob('*.jpg'))[:4]):
        picture = np.asarray(Image.open(p).convert('RGB').resize(size[::-1]))
        for kind in DEFECTS: check_planted(picture, kind, i)

def test_defects_lie_on_the_object(shared):
    "A nut before a yellow ground takes more defects than its area asks for, though nobody says where it is"
    nuts = shared/'data/anomaly_images/hazelnut_toy/train/good'
    picture = np.asarray(Image.open(nuts/'00.jpg').convert('RGB').resize((128, 128)))
    nut = np.ptp(picture.astype(int), axis=-1)<110
    assert .1<nut.mean()<.4
    spots = [plant(picture, np.random.default_rng(i), 'spot')[1] for i in range(60)]
    on = np.mean([nut[s].any() for s in spots])
    anywhere = np.mean([nut[np.roll(s, generator(i).integers(128, size=2), (0, 1))].any() for i,s in enumerate(spots)])
    assert on>anywhere+.2, (on, anywhere)

# twelve defects of a kind: pixels in their masks, sum of the changes weighted by a random pattern;
# the weighted sum of four pictures of a texture
planted = dict(scratch=(2244, 5750), spot=(5155, -1965), missing=(5339, 2780), warp=(10026, 9662))
painted = dict(weave=120441, stripes=108083, bricks=107548, tiles=97984, dots=137913, marble=163683, wood=141388,
               leather=44615)

pattern = generator(3).normal(size=(96, 96, 3))

def planted_sums(kind, texture):
    pixels,change = 0,0.
    for i in range(12):
        picture = TEXTURES[texture](generator(0, kind, i), (96, 96))
        changed,mask,_ = plant(picture, generator(1, kind, i), kind)
        pixels,change = pixels+int(mask.sum()),change+float(((changed.astype(int)-picture)*pattern).sum())
    return pixels,round(change)

def painted_sum(texture):
    pictures = [TEXTURES[texture](generator(2, texture, i), (96, 96)) for i in range(4)]
    return round(sum(float((p*pattern).sum()) for p in pictures))

def test_the_version_rises_with_the_pixels():
    """Feature caches trust `PLANTING`. When this fails, textures or defects get other pixels than before: raise
    PLANTING, then write the new values here"""
    assert PLANTING==1 and painted.keys()==TEXTURES.keys() and planted.keys()==DEFECTS.keys()
    # sums and not digests: a sine may differ in its last bit from machine to machine, and turn a few pixels by a level
    def close(found, known, name): np.testing.assert_allclose(found, known, rtol=0, atol=40, err_msg=name)
    for kind,texture in zip(DEFECTS, ('weave', 'bricks', 'tiles', 'dots')):
        close(planted_sums(kind, texture), planted[kind], kind)
    for texture in TEXTURES: close(painted_sum(texture), painted[texture], texture)

def test_same_in_another_process(tmp_path):
    "Not a function of the process, its hash seed or numpy's global state"
    np.random.seed(1)
    world = texture_world(tmp_path/'here', **tiny)
    code = f"import sys; from vadnb.worlds.textures import texture_world; texture_world(sys.argv[1], **{tiny!r}); "
    code += "assert 'skimage' not in sys.modules"
    env = {**os.environ, 'PYTHONHASHSEED': '5', 'PYTHONPATH': str(root)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'there')], check=True, cwd=root, env=env)
    files = sorted(p.relative_to(world.root) for p in world.root.rglob('*') if p.is_file())
    assert len(files)==2*(2+1+5+5)+1
    for f in files: assert (world.root/f).read_bytes()==(tmp_path/'there'/f).read_bytes(), f

def test_a_kill_leaves_nothing_half_made(tmp_path):
    def killed(rows):
        yield from rows[:3]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): texture_world(tmp_path/'w', progress=killed, **tiny)
    assert not list(tmp_path.iterdir())
    seen = []
    world = texture_world(tmp_path/'w', progress=lambda rows: seen.extend(rows) or rows, **tiny)
    assert len(seen)==16 and list(tmp_path.iterdir())==[world.root]
    # found, it is not made again
    assert texture_world(tmp_path/'w', progress=killed, **tiny)==world

def stamp(world, **changed):
    "Another stamp, with some arguments of another world"
    arguments = {**read_json(world/'world.json')['arguments'], **changed}
    (world/'world.json').write_text(json.dumps(dict(arguments=arguments)))

@pytest.mark.parametrize('harm,says', [
    (lambda w: (w/'wood/test/warp/000.png').unlink(), 'wood/test/warp/000.png: missing from a finished world; delete'),
    (lambda w: (w/'wood/ground_truth/spot/000_mask.png').unlink(), '000_mask.png: missing from a finished world'),
    (lambda w: (w/'wood/train/good/holiday.JPG').write_bytes(b''),
     'holiday.JPG: is an image that does not belong to this world; move it away'),
    (lambda w: (w/'world.json').unlink(),
     'holds something that is no world of textures; choose an empty or new folder'),
    (lambda w: (w/'world.json').write_text('{'), 'world.json, line 1'),
    (lambda w: (w/'world.json').write_text('[]'), 'another world (planting is None, asked for 1'),
    (lambda w: (w/'world.json').write_text('{"arguments": 3}'), 'another world (planting is None, asked for 1'),
    (lambda w: stamp(w, planting=0),
     'another world (planting is 0, asked for 1); choose another folder, or delete this one'),
    (lambda w: stamp(w, pictures={}), 'another world (pictures is {}, asked for None)')])
def test_other_contents_are_refused(tmp_path, harm, says):
    world = texture_world(tmp_path/'w', **tiny)
    write_tree_meta(world.root, world.root); (world.root/'notes.txt').write_text('mine')
    texture_world(world.root, **tiny)                            # lists and notes beside the images disturb nobody
    harm(world.root)
    with pytest.raises(DataError) as e: texture_world(world.root, **tiny)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_places_that_cannot_be_made(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(DataError, match='file: is a file, a folder is needed'): texture_world(tmp_path/'file', **tiny)
    cannot = r'file/w: cannot be made \(.*choose a folder you may write to'
    with pytest.raises(DataError, match=cannot): texture_world(tmp_path/'file/w', **tiny)

def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, path, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    says = r'000\.png: cannot be written \(No space left on device\); free some space'
    with pytest.raises(DataError, match=says): texture_world(tmp_path/'w', **tiny)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('wrong,says', [
    (dict(train=2.5), 'train: 2.5 is not a whole number of 1 or more'), (dict(good=-1), 'good: -1 is not'),
    (dict(seed='0'), "seed: '0' is not"), (dict(defective=True), 'defective: True is not'),
    (dict(size=(32,)), 'size: (32,)'),
    (dict(size=(64, 31)), 'size: (64, 31); give a height and width of at least 32 pixels'),
    (dict(size=(64., 64)), 'size: (64.0, 64)'), (dict(classes=[]), 'classes: [] is empty')])
def test_wrong_arguments(tmp_path, wrong, says):
    with pytest.raises(ConfigError) as e: texture_world(tmp_path/'w', **{**tiny, **wrong})
    assert says in str(e.value) and not list(tmp_path.iterdir())

def test_a_world_without_defects_and_one_without_test(tmp_path):
    good,none = {**tiny, 'defective': 0},{**tiny, 'defective': 0, 'good': 0}
    assert [len(v) for v in read_tree(texture_world(tmp_path/'a', **good).root).values()]==[4, 2]
    assert [len(v) for v in read_tree(texture_world(tmp_path/'b', **none).root).values()]==[4, 0]

def test_pictures_that_cannot_be_cropped(tmp_path):
    good = np.zeros((64, 64, 3), np.uint8)
    for pictures,says in (
        ({}, 'pictures: is empty'), ({'train': good}, "'train' cannot be the folder"),
        ({'..': good}, "'..' cannot be the folder"), ({'.a': good}, "'.a' cannot be"),
        ({'a': good/2}, "pictures: 'a' is float64"), ({'a': good[...,0]}, "'a' is uint8 (64, 64)"),
        ({'a': good, 'b': good[:40, :40]}, 'into a picture of 40x40')):
        with pytest.raises(ConfigError) as e: crop_world(tmp_path/'w', pictures, size=(32, 32))
        assert says in str(e.value)
    assert not list(tmp_path.iterdir())
    # other pixels under the same name are another world
    crop_world(tmp_path/'w', {'a': good}, 1, 1, 0, (32, 32))
    with pytest.raises(DataError, match='another world'): crop_world(tmp_path/'w', {'a': good+1}, 1, 1, 0, (32, 32))

def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match='run: pip install scikit-image'): skimage_textures()

@pytest.mark.skipif(not has_skimage, reason='scikit-image is not installed')
def test_crops_of_photographs(tmp_path):
    pictures = skimage_textures()
    import skimage.data
    for name,p in pictures.items(): assert (p==getattr(skimage.data, name)()[...,None]).all()
    world = crop_world(tmp_path/'w', pictures, train=3, good=2, defective=4, size=(128, 128))
    check_split(world.train, world.test)
    for r in world.train+[r for r in world.test if not r.label]:
        crop,whole = np.asarray(Image.open(world.root/r.name))[...,0],pictures[r.cls][...,0]
        starts = np.argwhere(whole[:-127,:-127]==crop[0, 0])
        found = [(y, x) for y,x in starts if (whole[y:y+128, x:x+128]==crop).all()]
        assert found and all(x+128<=256 if '/train/' in r.name else x>=256 for _,x in found), r.name

@pytest.fixture(scope='module')
def held(tmp_path_factory):
    world = texture_world(tmp_path_factory.mktemp('planted')/'w', **{**tiny, 'train': 6})
    return hold_out(world.train, .5)[1],world.root

def test_workers_and_the_order_of_questions_change_nothing(held):
    ds = PlantedDefects(AnomalyImages(*held, (48, 64)))
    forwards = list(ds)
    backwards = [ds[i] for i in reversed(range(len(ds)))][::-1]
    batches = list(DataLoader(ds, batch_size=5, num_workers=2, collate_fn=collate))
    for k in ('image', 'mask', 'has_mask', 'label', 'original', 'cls'):
        direct = torch.stack([s[k] for s in forwards])
        assert torch.equal(direct, torch.stack([s[k] for s in backwards])), k
        assert torch.equal(direct, torch.cat([b[k] for b in batches])), k
    assert [n for b in batches for n in b['name']]==[ds.tags(i)['name'] for i in range(len(ds))]
    assert forwards[1]['image'].dtype==torch.uint8 and forwards[1]['mask'].dtype==torch.bool
    assert forwards[1]['image'].is_contiguous()
    assert len({s['name'] for s in forwards})==len(ds)==12
    with pytest.raises(IndexError): ds[12]
    with pytest.raises(IndexError): ds[-1]

def test_content_notices_what_a_sample_depends_on(held, monkeypatch):
    rows,folder = held
    def contents(seed=0, size=(48, 64), kinds=None, classes=None, rows=rows):
        ds = PlantedDefects(AnomalyImages(rows, folder, size, classes), seed, kinds)
        return [ds.content(i) for i in range(len(ds))]
    first = contents()
    assert len(set(first))==12 and contents()==first and contents(classes=['marble', 'tiles', 'wood'])==first
    assert first[::2]==[AnomalyImages(rows, folder, (48, 64)).content(i) for i in range(6)]
    def differ(second): return [[a!=b for a,b in zip(first[k::2], second[k::2])] for k in (0, 1)]
    assert differ(contents(seed=1))==[[False]*6, [True]*6]
    assert differ(contents(size=(48, 48)))==[[True]*6]*2
    # the set of kinds matters only where it changes the kind
    data = AnomalyImages(rows, folder, (48, 64))
    kinds = [PlantedDefects(data, 0, k).kind(i) for k in (None, ['warp']) for i in range(6)]
    assert differ(contents(kinds=['warp']))==[[False]*6, [a!=b for a,b in zip(kinds[:6], kinds[6:])]]
    monkeypatch.setattr(defects, 'PLANTING', PLANTING+1)
    assert differ(contents())==[[False]*6, [True]*6]

def test_equal_content_is_an_equal_sample(held):
    "What a cache relies on, over seeds and sizes"
    seen = {}
    for seed in (0, 1):
        for kinds in (None, ['spot', 'warp']):
            ds = PlantedDefects(AnomalyImages(*held, (32, 48)), seed, kinds)
            for i,s in enumerate(ds):
                pixels = hashlib.sha256(s['image'].numpy().tobytes()+s['mask'].numpy().tobytes()).hexdigest()
                assert seen.setdefault(ds.content(i), pixels)==pixels
    assert len(set(seen.values()))==len(seen)

def test_fingerprints(held):
    data = AnomalyImages(*held, (48, 64))
    prints = [PlantedDefects(data, seed, kinds).fingerprint() for seed in (0, 1) for kinds in (None, ['warp'])]
    assert len({*prints, data.fingerprint(), PlantedDefects(AnomalyImages(*held, (48, 48))).fingerprint()})==6
    assert PlantedDefects(AnomalyImages(*held, (48, 64))).fingerprint()==prints[0]

def test_tags_open_no_file(tmp_path):
    world = texture_world(tmp_path/'w', **tiny)
    ds = PlantedDefects(AnomalyImages(world.train, world.root, (48, 64)))
    named = [s['name'] for s in ds]
    for r in world.train: (world.root/r.name).unlink()
    assert [ds.tags(i)['name'] for i in range(len(ds))]==named and ds.tags(7)['cls']==1
    with pytest.raises(DataError, match='is not there'): ds[1]

def test_what_cannot_be_planted_is_named(held, monkeypatch):
    data = AnomalyImages(*held, (48, 64))
    with pytest.raises(ConfigError, match='did you mean'): PlantedDefects(data, kinds=['wrap'])
    with pytest.raises(ConfigError, match='size: 31x64 is too small'): PlantedDefects(AnomalyImages(*held, (31, 64)))
    def invisible(image, rng): return image,np.ones(image.shape[:2], bool)
    monkeypatch.setitem(DEFECTS, 'spot', visibly(invisible))
    ds = PlantedDefects(data, kinds='spot')
    assert ds[2]['label']==0
    with pytest.raises(DataError) as e: ds[3]
    assert held[0][1].name in str(e.value) and 'in 60 attempts no change came out' in str(e.value)
    assert '\n' not in str(e.value)
