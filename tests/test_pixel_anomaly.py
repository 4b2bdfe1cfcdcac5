"Metrics of anomaly maps against the golden values: official UniAD scores, exact pixel metrics and AUPRO, small cases done by hand"
import json, warnings
import numpy as np, pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score
from vadnb.core import DataError
from vadnb.metrics.anomaly_maps import image_scores, label_components
from vadnb.metrics.pixel_anomaly import SEVEN, pixel_metrics
from vadnb.metrics.pixel_stream import StreamingPixelMetrics
from vadnb.core import MetricWarning

PIXEL = SEVEN[3:]

def read(shared, name):
    at = shared/'golden'/'uniad'
    return json.loads((at/f'{name}.json').read_text()), load_file(at/f'{name}.safetensors')

def named(*arrays): return [{f'{i:03}': v for i,v in enumerate(a)} for a in arrays]

def streamed(maps, masks, labels, classes, scores=None, **kw):
    res = StreamingPixelMetrics(**kw)
    for k in maps: res.add(k, maps[k], masks[k], labels[k], classes[k], scores and scores[k])
    return res.compute()

def within_bounds(got, exact):
    "Every binned metric, and how many there were"
    keys = [k for k in exact if k.rsplit('/', 1)[1] in PIXEL]
    for k in keys: assert abs(got[k]-exact[k])<=got['/bound/'.join(k.rsplit('/', 1))], k
    return len(keys)

def test_golden_metrics(shared):
    meta,arrays = read(shared, 'pixel_metrics')
    maps,masks,labels,classes,scores = named(arrays['input.scores'], arrays['input.mask'], meta['image_label'], meta['clsname'], arrays['input.image_scores'])
    got = pixel_metrics(maps, masks, labels, classes, image_score=scores)
    for group,want in meta['expected'].items():
        at = group if group in ('pooled', 'mean') else f'class/{group}'
        assert [got[f'{at}/{k}'] for k in want]==pytest.approx([*want.values()], abs=1e-12), group
        if group!='mean': assert [got[f'{at}/{k}_f1max_threshold'] for k in ('image', 'pixel')]==[meta['details'][group][f'{k}_f1max_threshold'] for k in ('image', 'pixel')]
    assert sum(label_components(m>0)[1] for m in masks.values())==meta['details']['pooled']['num_components']
    assert 'class/gasket/image_auroc_max' not in got
    for bits in (12, 20):
        m = streamed(maps, masks, labels, classes, scores, bits=bits)
        assert within_bounds(m, got)==16 and m['mean/image_ap']==got['mean/image_ap']

def test_golden_small_cases(shared):
    meta,_ = read(shared, 'pixel_metrics')
    for case in meta['tiny_cases']:
        maps,masks = named(np.array(case['scores']), np.array(case['mask']))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', MetricWarning)                         # one image is not of both kinds
            got = pixel_metrics(maps, masks, pool=(1, 1))
        want = dict(case['expected'])
        assert sum(label_components(m>0)[1] for m in masks.values())==want.pop('num_components'), case['name']
        assert [got[f'pooled/{k}'] for k in want]==pytest.approx([*want.values()], abs=1e-12), case['name']

def test_golden_official_scores(shared):
    "UniAD's three image scores and its AUROCs, before it turns those below one half around"
    meta,arrays = read(shared, 'uniad_eval')
    maps,masks = (dict(zip(meta['filenames'], arrays[f'input.{k}'])) for k in ('pred', 'mask'))
    found = [image_scores(m) for m in maps.values()]
    for k,want in meta['image_scores'].items(): assert [f[k] for f in found]==pytest.approx(want, rel=meta['tolerances']['image_scores']['rtol'])
    classes = dict(zip(meta['filenames'], meta['clsname']))
    got = pixel_metrics(maps, masks, classes=classes)
    for key,want in meta['expected']['raw_without_flip'].items():
        group,kind,_ = key.rsplit('_', 2)
        at,name = 'mean' if group=='mean' else f'class/{group}', 'pixel_auroc' if kind=='pixel' else f'image_auroc_{kind}'
        assert got[f'{at}/{name}']==pytest.approx(want, abs=meta['tolerances']['auc_abs']), key
    assert got['class/tile/image_auroc_mean']<.5 and got['mean/image_auroc']==got['mean/image_auroc_max']
    assert pixel_metrics(maps, masks, classes=classes, image_score='std')['mean/image_auroc']==got['mean/image_auroc_std']
    # the label of the list counts, not that of a mask in which the defect was lost
    labelled = pixel_metrics(maps, masks, dict(zip(meta['filenames'], meta['meta_label'])), classes)
    lost = sum(a!=b for a,b in zip(meta['meta_label'], meta['image_label_from_mask']))
    assert labelled['pooled/empty_mask']==lost>0 and labelled['pooled/defective']==got['pooled/defective']+lost
    assert labelled['pooled/pixel_auroc']==got['pooled/pixel_auroc'] and labelled['class/screw/image_auroc']!=got['class/screw/image_auroc']

@pytest.fixture(scope='module')
def made():
    rng = np.random.default_rng(5)
    masks = {f'{i}': np.pad(rng.random((8, 9))<.1*(i%3), ((5, 7), (9, 4))) for i in range(9)}
    maps = {k: (rng.normal(size=m.shape)+m).astype(np.float32) for k,m in masks.items()}
    return maps, masks, {k: 'ab'[int(k)//5] for k in maps}

def test_components_in_every_direction():
    "Both diagonals, against SciPy, up to the numbering"
    ndimage = pytest.importorskip('scipy.ndimage')
    rng = np.random.default_rng(9)
    for mask in [np.eye(5, dtype=bool), np.eye(5, dtype=bool)[::-1]]+[rng.random((31, 47))<share for share in (.05, .2, .35, .5, .8)]:
        want,n = ndimage.label(mask, np.ones((3, 3)))
        got = label_components(mask)
        assert got[1]==n and len(np.unique(np.stack([got[0], want]).reshape(2, -1), axis=1).T)==n+1

def test_order_and_sizes(made):
    "Neither the order of the images nor the order of the classes is anything; sizes may differ; positive is above zero"
    maps,masks,classes = made
    maps = dict(maps)|{'1': np.pad(maps['1'], 3)}; masks = dict(masks)|{'1': np.pad(masks['1'], 3)}
    got = pixel_metrics(maps, masks, classes=classes)
    back = lambda d: dict(reversed(d.items()))
    assert pixel_metrics(back(maps), {k: v*.25 for k,v in masks.items()}, classes=back(classes))==got
    assert pixel_metrics({k: v.astype(np.float64) for k,v in maps.items()}, masks, classes=classes)==got
    assert pixel_metrics(maps, masks, classes=dict.fromkeys(maps, 'all'))['class/all/aupro']==got['pooled/aupro']
    assert got['pooled/pixel_auroc']==pytest.approx(roc_auc_score(*(np.concatenate([d[k].ravel() for k in maps]) for d in (masks, maps))), abs=1e-12)

def test_signed_zero():
    "Minus zero ties with zero"
    zero = np.zeros((16, 32), np.float32); mask = np.zeros((16, 32), bool); mask[:, :8] = True
    for s in (zero, np.where(mask, zero, -zero), np.where(mask, -zero, zero)):
        got = pixel_metrics(dict(a=s, b=zero), dict(a=mask, b=None), dict(a=1, b=0))
        assert (got['pooled/pixel_auroc'], got['pooled/image_auroc'], got['pooled/aupro'])==(.5, .5, pytest.approx(.15))

def test_left_out(made):
    "A class without a good image, and one whose masks are not known: the metric is missing there and in no mean hidden"
    maps,masks,classes = made
    classes = classes|{'1': 'c', '2': 'c'}
    with pytest.warns(MetricWarning, match="image metrics of 'c' and the mad are not defined and left out of the mean: the images are not of both kinds"): got = pixel_metrics(maps, masks, classes=classes)
    assert 'class/c/image_ap' not in got and 'class/c/mad' not in got and got['mean/image_ap']==pytest.approx((got['class/a/image_ap']+got['class/b/image_ap'])/2)
    assert got['mean/aupro']==pytest.approx(np.mean([got[f'class/{c}/aupro'] for c in 'abc']))
    labels = {k: bool(v.any()) for k,v in masks.items()}
    with pytest.warns(MetricWarning, match='pixel metrics of .all images.'): got = pixel_metrics(maps, dict.fromkeys(maps), labels)
    assert got['pooled/without_mask']==got['pooled/defective']==sum(labels.values()) and 'pooled/pixel_ap' not in got and 'pooled/image_ap' in got
    with pytest.warns(MetricWarning, match='pixel metrics of .all images.'): assert streamed(maps, dict.fromkeys(maps), labels, dict.fromkeys(maps))==got

def test_streaming(made):
    maps,masks,classes = made
    labels = dict.fromkeys(maps)
    exact = pixel_metrics(maps, masks, classes=classes)
    errors = {}
    for bits in (10, 14, 20):
        got = streamed(maps, masks, labels, classes, bits=bits)
        assert within_bounds(got, exact)==16
        errors[bits] = got['pooled/bound/aupro']
    assert errors[10]>errors[14]>errors[20] and errors[20]<2e-3
    # the threshold is one that a pixel of its bin can reach
    fp,tp = (np.concatenate([maps[k][masks[k]==v] for k in maps])>=got['pooled/pixel_f1max_threshold'] for v in (False, True))
    assert 2*tp.sum()/(len(tp)+tp.sum()+fp.sum())==pytest.approx(got['pooled/pixel_f1max'], abs=1e-12)

@pytest.mark.parametrize('change,message', [
    (dict(maps={'3': np.zeros((3, 3, 1))}), "map of '3': one number per pixel is needed, got float64 of shape (3, 3, 1)"),
    (dict(maps={'3': np.full((20, 22), np.nan)}), "map of '3': 440 of 440 pixels are NaN or infinite"),
    (dict(masks={'3': np.zeros((22, 20))}), "mask of '3': float64 of shape (22, 20) for a map of shape (20, 22)"),
    (dict(masks={'9': None}), "masks: no map for '9'"),
    (dict(labels={'2': 0}), "mask of '2':"),
    (dict(labels={'2': None}, masks={'2': None}), "'2': neither a mask nor a label"),
    (dict(pool=(21, 1)), 'a window of 21x1 does not fit into a map of shape (20, 22)'),
    (dict(image_score={'1': 2.}), "image_score: missing for '0', '2', '3' and 5 more"),
    (dict(image_score={str(k): np.inf for k in range(9)}), "image_score of '0': inf is not a finite number"),
])
def test_faults(made, change, message):
    maps,masks,classes = made
    args = dict(maps=dict(maps), masks=dict(masks), labels=dict.fromkeys(maps), classes=classes)
    for k,v in change.items(): args[k] = args[k]|v if k in args else v
    with pytest.raises(DataError) as e: pixel_metrics(**args)
    assert message in str(e.value)

def test_given_twice(made):
    maps,masks,_ = made
    m = StreamingPixelMetrics()
    m.add('a', maps['1'], masks['1'])
    with pytest.raises(DataError, match="'a': given twice"): m.add('a', maps['2'], masks['2'])
    with pytest.raises(DataError, match='for every image or for none'): m.add('b', maps['2'], masks['2'], score=1.)
    with pytest.raises(DataError, match="class of 'b': give a class for every image or for none"): m.add('b', maps['2'], masks['2'], cls='nut')
