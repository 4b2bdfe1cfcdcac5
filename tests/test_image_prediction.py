"What `predict` hands back for images: regions against a walk, real images, odd names and places, calibrations through a checkpoint, files that damage nothing"
import csv, json, os, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from vadnb.core import CheckpointError, ConfigError, DataError, VadnbError
from vadnb.data.anomaly_images import open_image
from vadnb.systems.uniad.system import read_input
from vadnb.core import DataWarning
from vadnb.metrics.anomaly_maps import image_scores
from vadnb.core import MetricWarning
from vadnb.plots import figure_bytes
from vadnb.results.image import ImagePrediction
from vadnb.results.images import ImagePredictions, list_inputs, output_files
from vadnb.results.saving import save_results, signed_results
from vadnb.results.panels import Case, enlarge, panels
from vadnb.results.sheets import case_sheet, contact_sheet
from vadnb.results.conformal import conformal_threshold
from vadnb.results.thresholds import RATES, Calibration, Thresholds, normal_thresholds, pixel_quantiles
from vadnb.strangers import cell_text
from vadnb.train.checkpoint import read_part, write_part
from vadnb.report.pictures import embed

limits = Thresholds(2, 1.5, .1, 99)

def predicted(path, name=None, size=None, seed=0, grid=(14, 14), stride=4, thresholds=limits):
    "Noise with a hot cell, for an image file"
    rng = np.random.default_rng(seed)
    m = rng.uniform(.5, 1, grid).astype(np.float32)
    m[tuple(rng.integers(0, grid))] = rng.uniform(.5, 5)
    if size is None: size = open_image(path).size[::-1]
    return ImagePrediction(name or Path(path).name, path, size, m, stride, image_scores(enlarge(m, stride), (4, 4))['max'], thresholds)

def picture(path, size=(40, 60), seed=0):
    "A small image file"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path

def snapshot(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

# ---------------------------------------------------------------- thresholds

@pytest.mark.parametrize('n', [1, 2, 9, 20, 99, 100])
def test_the_rule_is_the_smallest_score_that_keeps_the_promise(n):
    s = np.sort(np.random.default_rng(n).gamma(2, size=n).astype(np.float32))
    for rate in (.01, .05, .1, .29, .34, .5, .9):
        # rank by rank: above the k-th of n lies a new one with probability 1-k/(n+1)
        fit = [k for k in range(1, n+1) if (n+1-k)<=rate*(n+1)+1e-9]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            assert conformal_threshold(s[::-1], rate)==s[(fit[0] if fit else n)-1]
        assert [w.category for w in said]==[MetricWarning]*(not fit)
        if not fit:
            more = int(str(said[0].message).split('hold out ')[1].split()[0])
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                conformal_threshold(np.arange(more), rate)
            if more>1:
                with pytest.warns(MetricWarning): conformal_threshold(np.arange(more-1), rate)

def test_tabulated_rates_fall_from_two_digits_to_nothing():
    assert len(RATES)==541 and RATES[0]==.99 and RATES[-1]==0 and RATES[-2]==1e-6 and all(a>b for a,b in zip(RATES, RATES[1:]))
    assert all(r in RATES for r in (.5, .1, .05, .01, .005, .0025, .001, 1e-4, 1e-5))

def test_pixel_table_of_negative_and_constant_maps():
    for m in (-np.random.default_rng(0).gamma(3, size=(30, 40)), np.zeros((5, 5)), np.full((3, 3), -0.)):
        m = m.astype(np.float32)
        table,n,pixels = pixel_quantiles([m])
        assert (n, pixels)==(1, m.size) and np.isin(table, m).all() and table[-1]==m.max() and (np.diff(table)>=0).all()
        assert all((m>t).sum()<=r*pixels+1e-6 for r,t in zip(RATES, table))

def test_a_rate_between_two_entries_takes_the_lower():
    cal = Calibration.of_maps(np.arange(999.), (np.arange(1000.).reshape(10, 100) for _ in range(999)))
    assert cal.thresholds(.0105).pixel==cal.thresholds(.01).pixel==989 and cal.thresholds(.011).pixel==988
    assert cal.thresholds(.01, 2e-6).pixel==999

def test_a_calibration_goes_through_a_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    cal = Calibration.of_maps(rng.gamma(2, size=50), rng.gamma(2, size=(50, 8, 8)), 'good images of "Straße"')
    write_part(tmp_path, 'extra', dict(calibration=cal.state(), epoch=3))
    back = Calibration.from_state(read_part(tmp_path, 'extra')['calibration'])
    assert all(back.thresholds(r, .05)==cal.thresholds(r, .05) for r in (.02, .05, .5)) and back.of==cal.of and back.n==50
    assert back.state().keys()==cal.state().keys() and all(torch.equal(back.state()[k], cal.state()[k]) for k in ('scores', 'pixels', 'rates'))

@pytest.mark.parametrize('change', [dict(scores=torch.tensor([2., 1.])), dict(scores=torch.tensor([])), dict(scores=[1., 2.]), dict(pixels=torch.tensor([1., np.nan])), dict(rates=torch.tensor([.5, .1])),
                                    dict(n_pixels=0), dict(n_pixels='many'), dict(extra=1), None])
def test_a_damaged_calibration_is_one_error(change):
    state = dict(scores=torch.tensor([1., 2.]), pixels=torch.tensor([1., 2.]), rates=torch.tensor([.5, 0.]), n_pixels=4, of='x')
    Calibration.from_state(state)
    with pytest.raises(CheckpointError, match='evaluate the run again'): Calibration.from_state(change and state | change)

def test_an_image_of_the_calibration_is_not_above_its_own_threshold():
    rng = np.random.default_rng(3)
    scores = rng.gamma(2, size=30)                                        # float64, as image scores are
    t = normal_thresholds(scores, rng.gamma(2, size=(30, 4, 4)), .1)
    above = [ImagePrediction(f'{i}.png', 'x', (4, 4), np.ones((4, 4)), 1, s, t).anomalous for i,s in enumerate(scores)]
    assert sum(above)==3-1 and t.image==np.float32(np.sort(scores)[27])   # k = ceil(31*.9) = 28

@pytest.mark.parametrize('values', [dict(image=np.nan), dict(pixel=np.inf), dict(rate=0), dict(rate=1), dict(pixel_rate=2), dict(normals=-1), dict(normals=1.5)])
def test_thresholds_that_are_none(values):
    with pytest.raises(ConfigError, match=f'thresholds.{next(iter(values))}'): Thresholds(**(dict(image=1, pixel=1, rate=.1, normals=9) | values))

def test_a_scale_always_rises():
    for pixel in (2, 0, -3):
        for ordinary in (None, 1, 5, -4):
            low,high = Thresholds(1, pixel, .1, 9, ordinary=ordinary).scale
            assert low<pixel<high

# ---------------------------------------------------------------- regions

def test_regions_against_a_walk_over_pixels():
    rng = np.random.default_rng(0)
    for k in range(30):
        h,w = rng.integers(1, 7, 2)
        p = ImagePrediction('a', 'a', tuple(int(v) for v in rng.integers(5, 80, 2)), rng.random((h, w)), int(rng.integers(1, 4)), 1, Thresholds(1, .6, .1, 9))
        full = p.full(); H,W = full.shape
        todo,found = {tuple(map(int, q)) for q in np.argwhere(full>np.float32(.6))}, []
        while todo:
            part,edge = set(), [todo.pop()]
            while edge:
                y,x = edge.pop(); part.add((y, x))
                near = {(y+i, x+j) for i in (-1, 0, 1) for j in (-1, 0, 1)}&todo
                todo -= near; edge += near
            ys,xs = zip(*part)
            found.append((max(full[q] for q in part), (min(xs)*p.size[1]/W, min(ys)*p.size[0]/H, (max(xs)+1)*p.size[1]/W, (max(ys)+1)*p.size[0]/H), len(part)/(H*W)))
        got = p.regions()
        assert [r['peak'] for r in got]==pytest.approx([f[0] for f in sorted(found, reverse=True)])
        assert sorted((r['peak'], *r['box'], r['share']) for r in got)==[pytest.approx((a, *b, c)) for a,b,c in sorted(found)]
        for r in got:
            x,y = r['at']
            assert r['box'][0]<x<r['box'][2] and r['box'][1]<y<r['box'][3] and full[int(y*H/p.size[0]), int(x*W/p.size[1])]==r['peak']
        if got: assert p.peak()==got[0]['at']
        assert sum(r['share'] for r in got)==pytest.approx(p.marked().mean())

def test_the_peak_lies_on_the_pixel_that_was_hot():
    # a single hot cell in each corner is found in that corner of an image of another shape
    for y,x in ((0, 0), (0, 6), (4, 0), (4, 6)):
        m = np.zeros((5, 7)); m[y,x] = 1
        px,py = ImagePrediction('a', 'a', (300, 100), m, 16, 1, limits).peak()
        assert (px<1 if x==0 else px>99) and (py<2 if y==0 else py>298)

# ---------------------------------------------------------------- real images

def test_real_images(shared, tmp_path):
    source = shared/'data'/'anomaly_images'/'hazelnut_toy'
    if not source.is_dir(): pytest.skip(f'no {source}')
    with pytest.warns(DataWarning, match='left out: ground_truth'): inputs = list_inputs(source)
    assert len(inputs)>20 and all(p.is_file() and p==source/n for n,p in inputs) and not [n for n,_ in inputs if 'ground_truth' in n]
    inputs = inputs[::5]
    found = ImagePredictions(source, [predicted(p, n, seed=i, stride=16) for i,(n,p) in enumerate(inputs)])
    files = found.save(tmp_path/'out', overlay=True)
    assert sorted(files)==sorted(snapshot(tmp_path/'out')) and len(files)==3+4*len(inputs)
    with open(files[0], newline='') as f: rows = list(csv.DictReader(f))
    assert [r['name'] for r in rows]==[n for n,_ in inputs]
    for r,p in zip(rows, found, strict=True):
        assert np.float32(r['score'])==np.float32(p.score) and (float(r['score'])>float(r['threshold']))==bool(int(r['anomalous']))==p.anomalous
        assert float(r['share'])==pytest.approx(p.marked().mean(), abs=1e-6) and (float(r['peak_x']), float(r['peak_y']))==pytest.approx(p.peak(), abs=.06)
        drawn = Image.open(tmp_path/'out'/'overlays'/Path(p.name).with_suffix('.png'))
        assert drawn.size==p.size[::-1]
    record = json.loads(files[1].read_text())
    assert record['images']==[p.as_json() for p in found] and [t['normals'] for t in record['thresholds']]==[99] and 'scores' not in record
    assert len(found.summary(3))==1+3+1+3 and all(p.name in ''.join(found.summary(99)) for p in found)

def test_an_image_that_was_turned_by_its_camera(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8); pixels[:10,:10] = 255
    exif = Image.Exif(); exif[0x0112] = 6                                 # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path/'a.png', exif=exif)
    p = predicted(tmp_path/'a.png')
    assert p.size==(60, 30) and p.read().shape==(60, 30, 3) and p.read()[:5,-5:].min()==255
    assert p.overlay().shape==(60, 30, 3)
    with pytest.raises(DataError, match='is 30x60 pixels, the predicted image was 60x30'): predicted(tmp_path/'a.png', size=(30, 60)).read()

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'I;16', '1', 'CMYK'])
def test_images_of_any_mode(tmp_path, mode):
    im = Image.fromarray((np.arange(20*30, dtype=np.uint16).reshape(20, 30)*100)) if mode=='I;16' else Image.open(picture(tmp_path/'x.png', (20, 30))).convert(mode)
    path = tmp_path/f"a.{'tif' if mode=='CMYK' else 'png'}"
    im.save(path)
    assert predicted(path).overlay().shape==(20, 30, 3)

# ---------------------------------------------------------------- files

def test_saved_twice_the_bytes_are_equal(tmp_path):
    found = [predicted(picture(tmp_path/'in'/n), n) for n in ('a.png', 'b/c.png')]
    first,second = (ImagePredictions('in', found).save(tmp_path/k, overlay=True) for k in 'xy')
    for a,b in zip(first, second, strict=True): assert a.read_bytes()==b.read_bytes(), a.name

def test_names_of_any_kind(tmp_path):
    names = ['Straße, 5 $a_b$.png', 'a "b"/<i>.v2.jpg', '=1+1.png']
    found = ImagePredictions('x', [predicted(tmp_path/'gone', n, (8, 8), i) for i,n in enumerate(names)])
    files = found.save(tmp_path/'out')
    with open(files[0], newline='', encoding='utf-8') as f: assert [cell_text(r['name']) for r in csv.DictReader(f)]==names
    assert (tmp_path/'out'/'maps'/'a "b"'/'<i>.v2.npz') in files
    assert '<i>' not in found[1]._repr_html_()

def test_a_missing_image_costs_the_pictures_only(tmp_path):
    found = ImagePredictions('x', [predicted(tmp_path/'gone.png', 'gone.png', (8, 9))])
    with pytest.raises(DataError, match='is not there any more'): found.save(tmp_path/'out', overlay=True)
    assert not (tmp_path/'out').exists()
    assert len(found.save(tmp_path/'out'))==6

@pytest.mark.parametrize('where,name', [('in', 'a.png'), ('in/deep/er', 'a.png'), ('.', 'maps/a.png')])
def test_nothing_is_written_among_the_predicted(tmp_path, where, name):
    # maps/a.png of an earlier call is what `maps` would be written into
    source = tmp_path/('in' if name=='a.png' else 'maps')
    path = picture(source/'a.png')
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match='choose a'): ImagePredictions(source, [predicted(path, 'a.png')]).save(tmp_path/where, overlay=True)
    assert snapshot(tmp_path)==before

def test_a_single_image_is_never_written_over(tmp_path):
    for name,out in (('maps/a.png', '.'), ('contact_sheet.png', '.'), ('overlays/b.png', '.')):
        path = picture(tmp_path/name)
        before = snapshot(tmp_path)
        with pytest.raises(DataError, match='would be written over'): ImagePredictions(path, [predicted(path)]).save(tmp_path/out, overlay=True)
        assert snapshot(tmp_path)==before
        path.unlink()
    # also not through a link
    path = picture(tmp_path/'c.png'); (tmp_path/'out'/'maps').mkdir(parents=True); (tmp_path/'out'/'maps'/'c.png').symlink_to(path)
    with pytest.raises(DataError, match='would be written over'): ImagePredictions(path, [predicted(path)]).save(tmp_path/'out')
    # beside it is fine
    assert len(ImagePredictions(path, [predicted(path)]).save(tmp_path/'results'))==6

def test_different_names_never_share_a_file(tmp_path):
    names = ['a.png', 'b/a.png', 'a.b.png', 'maps/a.png', 'scores.png', 'b.a/x.png']
    files = output_files([(n, tmp_path/n) for n in names], 'x', tmp_path/'out', True)
    assert len(files)==3+4*len(names) and list(files.values()).count('a.png')==4
    for twins in (['a.png', 'a.jpg'], ['x/a.tif', 'x/a.tiff'], ['a', 'a.png']):
        with pytest.raises(DataError, match=f"'{twins[0]}' and '{twins[1]}' would both"): output_files([(n, n) for n in twins], 'x', 'out')

def test_a_refusing_disk_leaves_no_half_file(tmp_path, monkeypatch):
    found,replace = ImagePredictions('x', [predicted(picture(tmp_path/'in'/'a.jpg'))]), os.replace
    for part in ('scores.csv', 'predictions.json', 'contact_sheet.png', 'maps/a.png', 'maps/a.npz', 'maps/a.layers.json', 'overlays/a.png'):
        def refuse(a, b, part=part):
            if str(b).endswith(part): raise OSError(28, 'No space left on device')
            replace(a, b)
        monkeypatch.setattr(os, 'replace', refuse)
        with pytest.raises(CheckpointError, match='cannot be written'): found.save(tmp_path/'out', overlay=True)
        left = [p for p in snapshot(tmp_path/'out') if p.suffix=='.tmp' or p.as_posix().endswith(part)]
        assert not left
        monkeypatch.setattr(os, 'replace', replace)

# ---------------------------------------------------------------- inputs

def test_two_folders_that_link_to_each_other(tmp_path):
    picture(tmp_path/'a'/'x.png'); picture(tmp_path/'b'/'y.png')
    (tmp_path/'a'/'to_b').symlink_to(tmp_path/'b')
    # a second way to the same image is another name for it
    assert [n for n,_ in list_inputs(tmp_path)]==['a/to_b/y.png', 'a/x.png', 'b/y.png']
    (tmp_path/'b'/'to_a').symlink_to(tmp_path/'a')
    with pytest.raises(DataError, match='leads back to a folder above it'): list_inputs(tmp_path)

def test_a_link_to_nothing_is_an_input_that_cannot_be_read(tmp_path):
    "An image, a video or a clip that is listed as lost, not one that is left out without a word"
    from vadnb.data.action_sources import class_folders, listed_clips
    from vadnb.data.annotation import videos_of
    picture(tmp_path/'a'/'x.png')
    for name in ('y.png', 'wood', 'notes.txt'): (tmp_path/'a'/name).symlink_to('gone')
    assert [n for n,_ in list_inputs(tmp_path)]==['a/wood', 'a/x.png', 'a/y.png']
    assert all(isinstance(read_input(tmp_path/'a'/n, (32, 32)), DataError) for n in ('y.png', 'wood'))
    (tmp_path/'v'/'run').mkdir(parents=True); (tmp_path/'v'/'run'/'a.mp4').touch(); (tmp_path/'v'/'run'/'b.mp4').symlink_to('gone')
    assert [p.name for p in videos_of(tmp_path/'v'/'run')]==[p.name for p,_ in listed_clips(tmp_path/'v'/'run')]==['a.mp4', 'b.mp4']
    (tmp_path/'v'/'jump').symlink_to('gone')
    for ask in (listed_clips, class_folders):
        with pytest.raises(DataError, match='jump: is a link to what is not there'): ask(tmp_path/'v')

def test_only_masks_are_no_images(tmp_path):
    picture(tmp_path/'p'/'masks'/'a.png')
    with pytest.raises(DataError, match='holds no image .* outside of masks'): list_inputs(tmp_path/'p')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(list_inputs(tmp_path/'p'/'masks'))==1

# ---------------------------------------------------------------- pictures

def cases(n, seed=0, size=(30, 40), **more):
    "Noise, every second one with a defect"
    rng = np.random.default_rng(seed)
    res = []
    for i in range(n):
        mask = np.zeros(size, bool); mask[size[0]//4:size[0]//2+1,size[1]//4:size[1]//2+1] = i%2
        res.append(dict(image=rng.integers(0, 255, (*size, 3), dtype=np.uint8), map=rng.random((4, 4))+i%2, stride=4, score=float(rng.random()+i%2), name=f'{i:03d}.png', label=i%2, mask=mask if i%2 else None, kind='scratch' if i%2 else 'good') | more)
    return res

def test_pictures_of_extreme_shapes_and_values():
    odd = [dict(size=s) for s in ((4, 200), (200, 4), (1, 1))]+[dict(map=np.zeros((4, 4))), dict(map=np.full((4, 4), 1e9)), dict(image=None, mask=None), dict(mask=np.ones((30, 40), bool), label=1), dict(name='x'*300, kind='$\\frac{'), dict(score=-1e-9)]
    for change in odd:
        given = cases(2, **change)
        for fig in (panels(given, threshold=.5), contact_sheet(given, .5), case_sheet({'a_b': given}, threshold=.5)):
            assert figure_bytes(fig, 'png', 30)[:4]==b'\x89PNG'

@pytest.mark.parametrize('change', [dict(image=np.zeros((3, 8, 8))), dict(map=np.zeros((2, 2, 2))), dict(map=[[np.nan]]), dict(mask=np.zeros(4)), dict(label=2), dict(scroe=1)])
def test_what_cannot_be_drawn_is_one_error(change):
    for draw in (panels, contact_sheet, lambda c: case_sheet({'x': c})):
        with pytest.raises(VadnbError): draw(cases(1, **change))

def test_a_sheet_of_fifteen_classes_fits_into_a_report(tmp_path):
    sheet = case_sheet({f'class_{k}': cases(6, k, (64, 64)) for k in range(15)}, 0, 2, 1)
    (tmp_path/'s.png').write_bytes(figure_bytes(sheet, 'png', 110))
    uri,w,h = embed(tmp_path/'s.png', 480_000)
    assert w==1100 and h<3000 and len(uri)<660_000
    # nothing is cut off at the right, and no picture covers another
    boxes = np.array([ax.get_position().extents for ax in sheet.axes])
    assert len(boxes)==15*8 and boxes.min()>=0 and boxes.max()<=1
    inside = lambda a, b: (np.minimum(a[2:], b[2:])>np.maximum(a[:2], b[:2])+1e-9).all()
    assert not [1 for i,a in enumerate(boxes) for b in boxes[:i] if inside(a, b)]

def test_the_contact_sheet_of_a_folder_shows_the_highest(tmp_path):
    found = ImagePredictions('in', [predicted(picture(tmp_path/f'{i}.png', seed=i), seed=i) for i in range(7)])
    fig = found.contact_sheet(3)
    said = [ax.get_xlabel().split('\n')[1] for ax in fig.axes[:3]]
    assert said==[p.name for p in sorted(found, key=lambda p: -p.score)[:3]] and '3 of 7 images' in fig.get_suptitle()

def test_a_coarse_case_is_enlarged_as_the_model_does():
    m = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    assert (Case(None, m, 1, stride=8).map==enlarge(m, 8)).all() and Case(None, m, 1).map.shape==(5, 6)

# ---------------------------------------------------------------- one by one

def test_images_that_come_one_by_one_are_saved_as_a_folder(tmp_path):
    paths = [picture(tmp_path/'in'/f'{k}.png', seed=k) for k in range(4)]
    items = [predicted(p, seed=k) for k,p in enumerate(paths)]
    lost = DataError('2.png: is cut off')
    come = signed_results([*items[:2], lost, items[3]], 'scorer', 'one', 'step-000100')
    error,saved = save_results(come, tmp_path/'in', tmp_path/'out', overlay=True)
    whole = ImagePredictions(tmp_path/'in', [items[0], items[1], items[3]]).from_source(system='scorer', run='one',
                                                                                   checkpoint='step-000100')
    files = whole.save(whole.place(tmp_path/'other'), overlay=True)
    assert error==([], [], lost) and saved.lines==whole.summary() and saved.error is None
    assert [f.relative_to(tmp_path/'out') for f in saved.files]==[f.relative_to(tmp_path/'other') for f in files]
    for a,b in zip(saved.files, files): assert a.read_bytes()==b.read_bytes(), a.name

def test_of_two_images_that_would_share_files_the_first_is_saved(tmp_path):
    items = [predicted(picture(tmp_path/'in'/n), n) for n in ('a.png', 'a.jpg')]
    refused,saved = save_results(items, tmp_path/'in', tmp_path/'out')
    assert "'a.png' and 'a.jpg' would both be written to" in str(refused.error) and saved.lines[0].endswith('in: 1 image, 0 anomalous')
    mixed = [items[0], predicted(picture(tmp_path/'in'/'b.png'), thresholds=Thresholds(3, 1, .1, 9))]
    refused, = save_results(mixed, tmp_path/'in', tmp_path/'mixed')
    assert 'judged by other thresholds' in str(refused.error) and not (tmp_path/'mixed'/'in'/'scores.csv').exists()

@pytest.mark.parametrize('pictures,panels', [('all', 3), ('worst', 2), ('none', 0)])
def test_each_image_is_written_as_it_comes_and_drawn_as_asked(tmp_path, monkeypatch, pictures, panels):
    monkeypatch.setattr('vadnb.results.images.WORST', 2)
    place = tmp_path/'out'/'in'
    def come():
        for k in range(3):
            yield predicted(picture(tmp_path/'in'/f'{k}.png'), seed=k)
            assert (place/'maps'/f'{k}.layers.json').exists() and not (place/'scores.csv').exists()
    saved, = save_results(come(), tmp_path/'in', tmp_path/'out', pictures=pictures)
    assert sorted(saved.files)==sorted(p for p in place.rglob('*') if p.is_file())
    assert len([*(place/'maps').glob('*.png')])==panels and (place/'contact_sheet.png').exists()==(pictures!='none')
    scores = {r['name']: float(r['score']) for r in csv.DictReader((place/'scores.csv').open())}
    drawn = {p.name for p in (place/'maps').glob('*.png')}
    if pictures=='worst': assert drawn=={n for n in sorted(scores, key=scores.get)[1:]}
