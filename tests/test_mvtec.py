"Image anomaly data as it is found: the official lists, a real folder, and what goes wrong with files"
import json
from collections import Counter
import numpy as np, pytest, torch
from PIL import Image
from torch.utils.data import DataLoader
from vadnb.core import DataError
from vadnb.data.anomaly_images import AnomalyImages, collate
from vadnb.data.image_lists import ImageRecord, check_split, hold_out, read_meta, read_visa, write_meta
from vadnb.data.mvtec import read_folder, read_tree, write_tree_meta

# MVTec-AD: training good, test good, test defective
counts = dict(bottle=(209, 20, 63), cable=(224, 58, 92), capsule=(219, 23, 109), carpet=(280, 28, 89), grid=(264, 21, 57), hazelnut=(391, 40, 70), leather=(245, 32, 92), metal_nut=(220, 22, 93),
    pill=(267, 26, 141), screw=(320, 41, 119), tile=(230, 33, 84), toothbrush=(60, 12, 30), transistor=(213, 60, 40), wood=(247, 19, 60), zipper=(240, 32, 119))

def test_official_lists(shared, tmp_path):
    train,test = (read_meta(shared/'data/uniad_mvtec'/f'{half}.json') for half in ('train', 'test'))
    assert (len(train), len(test), sum(r.label==0 for r in test))==(3629, 1725, 467)
    check_split(train, test)
    n = Counter((half, r.cls, r.label) for half,rows in (('train', train), ('test', test)) for r in rows)
    assert {c: (n['train', c, 0], n['test', c, 0], n['test', c, 1]) for c in {r.cls for r in test}}==counts
    assert all((r.mask is not None)==bool(r.label) for r in train+test)
    official = [json.loads(line) for line in (shared/'data/uniad_mvtec/test.json').read_text().splitlines()]
    back = [json.loads(line) for line in write_meta(test, tmp_path/'test.json').read_text().splitlines()]
    assert back==official
    learn,held = hold_out(train, .1)
    assert Counter(r.cls for r in held)=={c: round(.1*n) for c,(n,_,_) in counts.items()} and len(learn)+len(held)==3629

def test_lists_that_leave_the_class_to_the_path(shared):
    path = shared/'data/uniad_mvtec/json_vis_decoder/test_bottle.json'
    rows = read_meta(path)
    assert 'clsname' not in path.read_text()
    assert len(rows)==83 and {r.cls for r in rows}=={'bottle'}

def test_visa_table(shared):
    halves = read_visa(shared/'data/uniad_mvtec/visa/1cls.csv')
    assert {k: len(v) for k,v in halves.items()}==dict(train=8659, test=2162)
    assert sum(r.label for r in halves['test'])==1200 and all((r.mask is not None)==bool(r.label) for rows in halves.values() for r in rows)
    assert len({r.cls for r in halves['test']})==12
    check_split(**halves)

@pytest.fixture
def toy(shared): return shared/'data/anomaly_images/hazelnut_toy'

def test_real_folder(toy, tmp_path):
    tree = read_tree(toy)
    train,test = (AnomalyImages(tree[k], toy, (224, 224)) for k in ('train', 'test'))
    assert (train.counts(), test.counts())==({'hazelnut_toy': dict(good=10, defective=0, unmasked=0)}, {'hazelnut_toy': dict(good=6, defective=8, unmasked=0)})
    odd = next(s for s in train if s['name']=='train/good/01.jpg')
    assert odd['original'].tolist()==[522, 512] and odd['image'].shape==(3, 224, 224)
    for s,r in zip(test, test.records):
        assert bool(s['has_mask']) and bool(s['mask'].any())==bool(r.label)
        # the area of a mask survives resizing, the pixels are the official loader's
        if r.mask: np.testing.assert_allclose(s['mask'].float().mean(), (np.asarray(Image.open(toy/r.mask))>0).mean(), rtol=.02)
        official = np.asarray(Image.open(toy/r.name).resize((224, 224), Image.BILINEAR))
        assert np.array_equal(s['image'].permute(1, 2, 0).numpy(), official)
    lists = [read_meta(p) for p in write_tree_meta(toy, tmp_path)]
    assert [[r.to_json() for r in rows] for rows in lists]==[[r.to_json() for r in tree[k]] for k in ('train', 'test')]
    assert AnomalyImages(lists[1], toy, (224, 224)).fingerprint()==test.fingerprint()
    batches = list(DataLoader(test, batch_size=4, collate_fn=collate))
    assert torch.cat([b['label'] for b in batches]).tolist()==[r.label for r in test.records]
    # the test half is at the same time a folder of good and bad images
    assert [(r.label, r.mask) for r in read_folder(toy/'test', cls='hazelnut')]==[(r.label, None) for r in tree['test']]

def image(path, size=(20, 30), mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.zeros(size, np.uint8); a[5:9, 6:12] = 255
    Image.fromarray(a if mask else np.arange(a.size, dtype=np.uint32).reshape(size).astype(np.uint8)).save(path)
    return path

@pytest.fixture
def tree(tmp_path):
    root = tmp_path/'data'
    for cls in ('nut', 'tile'):
        for i in range(3): image(root/cls/'train/good'/f'{i}.png')
        image(root/cls/'test/good/0.png'); image(root/cls/'test/hole/0.png'); image(root/cls/'ground_truth/hole/0_mask.png', mask=True)
    return root

def samples(root): return list(AnomalyImages(read_tree(root)['test'], root, (10, 10)))

def test_bad_trees_are_refused(tree):
    samples(tree)
    hole,masks = tree/'nut/test/hole',tree/'nut/ground_truth/hole'
    def fails(says, *made):
        with pytest.raises(DataError) as e: samples(tree)
        assert says in str(e.value) and '\n' not in str(e.value)
        for p in made: p.unlink()
        samples(tree)
    fails('is a mask without image', image(masks/'7_mask.png', mask=True))
    fails('could have the mask', image(masks/'0.png', mask=True))
    fails('could be the mask of', image(hole/'0.jpg'))
    fails('lies beside the folders', image(hole.parent/'9.png'))
    fails('lies beside folders of masks', image(masks.parent/'9.png', mask=True))
    (tree/'nut/test/crack').mkdir()
    fails('is a mask without image; there is no folder', image(tree/'nut/ground_truth/cracks/0.png', mask=True))
    (tree/'nut/train/hole').mkdir()
    fails('is no good image and lies in train', image(tree/'nut/train/hole/0.png'))
    (hole/'more').mkdir()
    with pytest.raises(DataError, match='is a folder among images'): samples(tree)

def test_empty_class_is_refused(tree):
    for p in (tree/'tile/train/good').iterdir(): p.unlink()
    with pytest.raises(DataError, match="class 'tile' is empty"): read_tree(tree)

@pytest.mark.parametrize('harm,says', [
    (lambda p: image(p, (21, 30), mask=True), 'is 30x21, its image'),
    (lambda p: Image.new('L', (30, 20)).save(p), 'marks nothing, but its image is listed as defective'),
    (lambda p: p.write_bytes(p.read_bytes()[:60]), '0_mask.png cannot be decoded'),
    (lambda p: p.write_text('no image'), 'cannot be decoded'),
    (lambda p: p.write_bytes(b''), 'cannot be decoded')])
def test_bad_masks_are_refused(tree, harm, says):
    harm(tree/'tile/ground_truth/hole/0_mask.png')
    with pytest.raises(DataError) as e: samples(tree)
    assert says in str(e.value) and 'tile/ground_truth/hole/0_mask.png' in str(e.value) and 'maskname' in str(e.value)

@pytest.mark.parametrize('keep', [0, 1, 30, 200, .5, .99])
def test_cut_photographs_are_refused(toy, tmp_path, keep):
    raw = (toy/'train/good/00.jpg').read_bytes()
    (tmp_path/'good').mkdir()
    (tmp_path/'good/a.jpg').write_bytes(raw[:keep if isinstance(keep, int) else int(keep*len(raw))])
    ds = AnomalyImages(read_folder(tmp_path), tmp_path, (32, 32))
    with pytest.raises(DataError, match=r'good/a\.jpg cannot be decoded \(.*copy it again'): ds[0]

def test_rows_that_point_nowhere(tree):
    rows = read_tree(tree)['test']
    def fails(says, **change):
        r = ImageRecord(**{**vars(rows[1]), 'where': 'test.json, line 2', **change})
        with pytest.raises(DataError) as e: AnomalyImages([rows[0], r], tree, (10, 10), classes=['nut', 'tile'])[1]
        assert says in str(e.value)
    fails('test.json, line 2, filename', name='nut/test/hole/8.png')
    fails('test.json, line 2, maskname', mask='nut/ground_truth/hole/8.png')
    fails('leads outside the data root', name='../../etc/passwd')
    fails("clsname: 'nuts' is unknown; the classes are nut, tile; did you mean 'nut'?", cls='nuts')
    fails('marks a defect, but its image is listed as good', label=0)
    fails('is listed before', name=rows[0].name)

def test_fingerprint_sees_lists_files_and_settings(tree):
    rows = read_tree(tree)['test']
    def mark(rows=rows, size=(10, 10), **kw): return AnomalyImages(rows, tree, size, **kw).fingerprint()
    first = mark()
    assert first==mark()
    others = [mark(rows[::-1]), mark(rows[:-1]), mark(size=(10, 12)), mark(hflip=.5), mark(classes=['tile', 'nut']), mark([ImageRecord(r.name, r.label, r.cls) for r in rows])]
    image(tree/'nut/test/hole/0.png', (40, 60))
    assert len({first, mark(), *others})==8
