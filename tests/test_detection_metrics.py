"Temporal detection against the values of the references: mAP, recall, suppression, seconds, fusion; and what must not matter"
import gzip, json, warnings
import numpy as np, pytest, torch
from vadnb.core import ConfigError, DataError, MetricWarning
from vadnb.metrics.detection import detection_map, fuse_video_scores, merge_windows, soft_nms, to_seconds, top_candidates
from vadnb.metrics.detection_errors import CAUSES, error_causes, label_rows, length_rows
from vadnb.results.segment_threshold import best_threshold

pytestmark = pytest.mark.filterwarnings('ignore::vadnb.core.MetricWarning')
TIOUS,FINE = (.3, .4, .5, .6, .7), tuple(np.linspace(.5, .95, 10))

def by_video(database, results, subset='validation'):
    "Detections and truth of one subset, from OpenTAD's files"
    return ({v: [(d['label'], *d['segment'], d['score']) for d in own] for v,own in results.items()},
            {v: [(a['label'], *a['segment']) for a in d['annotations']] for v,d in database.items() if d['subset']==subset})

@pytest.fixture(scope='module')
def gold(shared):
    "A reader of the fixtures by file name"
    def read(name):
        path = shared/'golden'/'adatad'/name
        return json.loads(gzip.decompress(path.read_bytes()) if path.suffix=='.gz' else path.read_text())
    return read

@pytest.fixture(scope='module')
def expected(gold): return gold('tad_map.json')['expected']

@pytest.mark.parametrize('case,subset,tious', [('small', 'validation', TIOUS), ('small_anet_tious', 'validation', FINE), ('small_training_subset', 'training', TIOUS)])
def test_small(gold, expected, case, subset, tious):
    case = expected[case]
    seen,truth = by_video(gold('tad_map_small_gt.json')['database'], gold('tad_map_small_pred.json')['results'], subset)
    got = detection_map(seen, truth, tious, unknown='count', recall_k=(1, 2, 5))
    assert [got[f'map/{t:g}'] for t in tious]==pytest.approx(case['mAP'], abs=1e-9)
    assert got['map/mean']==pytest.approx(case['average_mAP'], abs=1e-9) and got['count/events']==case['n_gt']
    rows = label_rows(seen, truth, tious, 'count')
    for label,ap in zip(case['classes'], np.array(case['ap']).T): assert [rows[label][f'ap/{t:g}'] for t in tious]==pytest.approx(ap, abs=1e-9)
    for t,row in zip(tious, case.get('recall', [])): assert [got[f'recall/{t:g}@{k}x'] for k in (1, 2, 5)]==pytest.approx(row, abs=1e-9)

def test_equal_scores_are_in_range_and_in_no_order_of_the_file(gold, expected):
    case = expected['small_ties']['range_over_28_orders']
    seen,truth = by_video(gold('tad_map_small_gt.json')['database'], gold('tad_map_small_pred_ties.json')['results'])
    got = detection_map(seen, truth, TIOUS, unknown='count')
    for t,low,high in zip(TIOUS, case['min'], case['max']): assert low-1e-9<=got[f'map/{t:g}']<=high+1e-9
    rng = np.random.default_rng(0)
    mixed = {v: [seen[v][i] for i in rng.permutation(len(seen[v]))] for v in rng.permutation([*seen])}
    assert detection_map(mixed, truth, TIOUS, unknown='count')==got

def test_large(gold, expected):
    large = gold('tad_map_large.json.gz')
    got = detection_map(*by_video(large['database'], large['results']), TIOUS)
    assert [got[f'map/{t:g}'] for t in TIOUS]==pytest.approx(expected['large']['mAP'], abs=1e-9)
    # every other detector is far worse than one that looks
    assert all(v<.1 for k,v in got.items() if k.startswith('baseline'))

def test_activitynet_sample(shared, gold, expected):
    folder = shared/'data'/'activitynet'/'mmaction2_eval_localization'
    truth = {v.removeprefix('v_'): d for v,d in json.loads((folder/'gt.json').read_text()).items()}
    got = detection_map(*by_video(truth, json.loads((folder/'result.json').read_text())['results']), FINE)
    assert got['map/mean']==pytest.approx(.6177579365, abs=1e-9)
    assert [got[f'map/{t:g}'] for t in FINE]==pytest.approx(expected['mmaction']['mAP'], abs=1e-9)

@pytest.fixture(scope='module')
def cbr(shared):
    "Published detections on THUMOS-14, and the annotation of 211 videos"
    folder = shared/'data'/'thumos14'
    names = dict(line.split() for line in (folder/'afsd'/'Class_Index_Detection.txt').read_text().splitlines())
    seen = {}
    for line in (folder/'cbr'/'CBR_THUMOS-14_IoU0.3.txt').read_text().splitlines():
        video,start,end,label,score = line.split()
        seen.setdefault(video, []).append((names[label], float(start), float(end), float(score)))
    database = json.loads((folder/'opentad'/'thumos_14_anno.json').read_text())['database']
    return seen, by_video(database, {})[1]

def test_cbr(cbr):
    seen,truth = cbr
    with pytest.warns(MetricWarning, match='1771 detections end before they start'):
        got = detection_map(seen, truth, unknown='count')
    assert [100*got[f'map/{t:g}'] for t in TIOUS]==pytest.approx([50.83, 41.43, 30.55, 18.22, 8.99], abs=.03)
    assert (got['count/detections'], got['count/detections_without_length'], got['count/events'])==(10_010, 1771, 3325)
    dropped = detection_map(seen, truth, unknown='drop')
    assert [100*dropped[f'map/{t:g}'] for t in TIOUS]==pytest.approx([51.39, 41.94, 30.94, 18.39, 9.07], abs=.04)

def test_cbr_is_refused_by_default(cbr):
    with pytest.raises(DataError, match="'video_test_0000270', 'video_test_0001292'"): detection_map(*cbr)

def test_an_empty_subset_is_an_error(shared):
    case = json.loads((shared/'cases'/'adatad'/'01_empty_subset.json').read_text())
    seen,truth = by_video(case['database'], {})
    assert not truth
    with pytest.raises(DataError, match='no event in 0 videos'): detection_map(seen, truth)

def test_a_video_of_ambiguous_segments_only(shared):
    folder = shared/'cases'/'adatad'
    case = next(c for c in json.loads((folder/'cases.json').read_text()) if c['id']==13)
    seen = {v: [tuple(r) for r in rows] for v,rows in case['detections'].items()}
    _,truth = by_video(json.loads((folder/case['input']).read_text())['database'], {})
    assert detection_map(seen, truth)['map/mean']==case['expected']['preset_map']
    assert detection_map(seen, truth, protocol='thumos')['map/mean']==case['expected']['official_ap']
    # and the false alarm outside the segment is one
    seen['clip_b'][1] = ('jump', 20., 24., .95)
    assert detection_map(seen, truth, protocol='thumos')['map/mean']==.5

# ---- from the network to seconds

@pytest.fixture(scope='module')
def post(shared, gold):
    from safetensors.torch import load_file
    return gold('tad_postprocess.json'), load_file(shared/'golden'/'adatad'/'tad_postprocess.safetensors')

def check(got, want, classes, time=.0101, score=.000101):
    "Detections against rows of the reference, one to one, in any order"
    x,s,c = got
    rows,left = [(classes[k], a, b, q) for (a,b),k,q in zip(x.tolist(), c.tolist(), s.tolist())], [*map(tuple, want)]
    assert len(rows)==len(left)
    for label,a,b,q in rows:
        i = next((i for i,(wa,wb,wl,wq) in enumerate(left) if wl==label and abs(wa-a)<=time and abs(wb-b)<=time and abs(wq-q)<=score), None)
        assert i is not None, (label, a, b, q)
        left.pop(i)

def test_sliding_windows(post):
    gold,tensors = post
    case,classes,videos = gold['cases']['sliding'], gold['config']['classes'], {}
    for w in case['windows']:
        name = f"sliding/window{w['index']}"
        x,s,c = top_candidates(tensors[f'{name}/proposals'], tensors[f'{name}/scores'], .001, 300)
        x = to_seconds(x, w['snippet_stride'], w['window_start_frame'], w['offset_frames'], w['fps'], w['duration'])
        check((x, s, c), w['result'], classes)
        videos.setdefault(w['video_name'], []).append((x, s, c))
    for v,windows in videos.items(): check(merge_windows(windows, 700, reference=True, sigma=.7), case['final'][v], classes, 1e-4, 1e-6)

@pytest.mark.parametrize('case', ['merge_unique', 'merge_ties'])
def test_merging(post, case):
    gold,_ = post
    classes,case = gold['config']['classes'], gold['cases'][case]
    for v,rows in case['input'].items():
        window = np.array([r[:2] for r in rows]), np.array([r[3] for r in rows]), np.array([classes.index(r[2]) for r in rows])
        check(merge_windows([window], 700, reference=True, sigma=.7), case['final'][v], classes, 1e-4, 1e-6)

def test_one_window_and_one_resized_video(post):
    gold,tensors = post
    case,classes = gold['cases']['padding'], gold['config']['classes']
    x,s,c = top_candidates(tensors['padding/proposals'], tensors['padding/scores'], .001, 600)
    x,s,c = soft_nms(x, s, c, sigma=.7, most=700, min_score=.001)
    check((to_seconds(x, 4, 0, 8, 29.97, 30.1), s, c), case['result'], classes)
    case = gold['cases']['resize']
    x,s = tensors['resize/proposals'], tensors['resize/scores'].flatten()
    x,s,_ = soft_nms(x, s, torch.zeros(len(s), dtype=torch.long), sigma=.7, most=60, min_score=.001, agnostic=True, voting=.9)
    x = to_seconds(x, 117.9/48, fps=1, duration=117.9)
    v = torch.tensor(case['class_scores']['scores'])
    for name,v,top,how in (('multiply_top2', v, 2, 'product'), ('sqrt_product_top2', v, 2, 'root'), ('sqrt_softmax_top1', v.softmax(0), 1, 'root')):
        check(fuse_video_scores(x, s, v, top, how), case['cases'][name]['result'], case['class_scores']['names'])

def runs(gold):
    for name,c in gold['cases']['nms']['runs'].items():
        method = ('zero', 'linear', 'gaussian', 'improved')[c.get('method', 2)] if c['use_soft_nms'] else 'hard'
        yield name, c, dict(method=method, iou=c.get('t1', c.get('iou_threshold', 0)), iou_per_second=c.get('t2', 0.))
    for name,c in gold['cases']['nms_actionformer']['runs'].items(): yield name, c, dict(voting_weight='score_iou')

def test_suppression(post):
    gold,tensors = post
    done = 0
    for name,c,more in runs(gold):
        x,s,k = soft_nms(tensors['nms/segments'], tensors['nms/scores'], tensors['nms/labels'], sigma=c.get('sigma', .5), min_score=c.get('min_score', 0.),
                         most=c['max_seg_num'], agnostic=not c['multiclass'], voting=c.get('voting_thresh') or None, **more)
        want = {n: tensors[f'nms/{name}/{n}'] for n in ('segments', 'scores', 'labels')}
        torch.testing.assert_close(s, want['scores'], rtol=1e-4, atol=1e-6, msg=name)
        # segments that have nothing left are in no order
        n = int((s>0).sum())
        torch.testing.assert_close(x[:n], want['segments'][:n], rtol=0, atol=1e-4, msg=name)
        assert torch.equal(k[:n], want['labels'][:n]), name
        rest = [sorted(map(tuple, torch.cat([a, b[:,None]], 1)[n:].tolist())) for a,b in ((x, k), (want['segments'], want['labels']))]
        assert np.allclose(*rest, rtol=0, atol=1e-4) if rest[0] else len(x)==n, name
        assert (n<len(x))==(name=='zero_weight')
        done += 1
    assert done==13

def test_suppressed_segments_stay_with_nothing_or_go(post):
    "Hard suppression drops exactly what a weight of 0 keeps without a score"
    _,tensors = post
    given = [tensors[f'nms/{n}'] for n in ('segments', 'scores', 'labels')]
    stay,go = (soft_nms(*given, method=m, iou=.5, most=500) for m in ('zero', 'hard'))
    kept = stay[1]>0
    assert not kept.all() and all(torch.equal(a[kept], b) for a,b in zip(stay, go))

def test_suppression_in_every_precision_and_order():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 50, 700)
    x,s,c = np.stack([start, start+rng.uniform(1, 20, 700)], 1), rng.uniform(.01, 1, 700), rng.integers(0, 4, 700)
    want = soft_nms(x, s, c, sigma=.7)
    assert (np.diff(want[1])<=0).all() and len(want[1])==700
    order = rng.permutation(700)
    for a,b in zip(want, soft_nms(x[order], s[order], c[order], sigma=.7)): assert np.allclose(a, b, rtol=1e-9, atol=0)
    single = soft_nms(*(torch.tensor(a) for a in (x.astype(np.float32), s.astype(np.float32), c)), sigma=.7)
    assert single[1].dtype==torch.float32 and single[2].dtype==torch.int64
    # what is worth a look has the same score; a thousandth of a thousandth may be in another place
    assert np.allclose(single[1][:300].numpy(), want[1][:300], rtol=2e-5)

def test_a_segment_without_length_stays_where_it_is():
    x,s,_ = soft_nms(torch.tensor([[5., 5], [0, 4], [1, 4]]), torch.tensor([.9, .8, .7]), torch.zeros(3, dtype=torch.long), agnostic=True, voting=.5)
    assert torch.isfinite(x).all() and x[0].tolist()==[5, 5] and x[1].tolist()!=[0, 4]

# ---- what is wrong

def test_causes_are_all_of_the_false_alarms_and_cures_never_hurt(gold):
    large = gold('tad_map_large.json.gz')
    seen,truth = by_video(large['database'], large['results'])
    got = error_causes(seen, truth)
    now = detection_map(seen, truth, (.5,))
    assert got['map']==pytest.approx(now['map/mean'], abs=1e-12)
    assert sum(got[c]['count'] for c in CAUSES)==got['all_false_alarms']['count']
    assert got['all_misses']['count']>=got['missed']['count'] and all(got[c]['gain']>=-1e-12 for c in got if c!='map')
    assert got['all_false_alarms']['map']>max(got[c]['map'] for c in CAUSES)
    rows = length_rows(seen, truth, (.5,))
    assert sum(r['events'] for r in rows)==now['count/events'] and len(rows)==3

def test_causes_follow_the_protocol(gold):
    "What is left without any cure is the mAP of the same rules, where nobody knows included"
    large = gold('tad_map_large.json.gz')
    seen,truth = by_video(large['database'], large['results'])
    for k,(v,own) in enumerate(truth.items()):
        if k%3==0: own.append(('Ambiguous', own[0][2], own[0][2]+30))
    found = {p: (detection_map(seen, truth, (.5,), protocol=p)['map/mean'], error_causes(seen, truth, protocol=p)) for p in ('activitynet', 'thumos')}
    for ap,got in found.values():
        assert got['map']==pytest.approx(ap, abs=1e-12) and sum(got[c]['count'] for c in CAUSES)==got['all_false_alarms']['count']
    assert found['thumos'][0]!=found['activitynet'][0]
    assert found['thumos'][1]['all_false_alarms']['count']<found['activitynet'][1]['all_false_alarms']['count']

@pytest.mark.parametrize('f', [detection_map, label_rows, length_rows, error_causes, best_threshold])
def test_a_rule_for_unknown_videos_that_is_none_names_those_there_are(f):
    with pytest.raises(ConfigError, match="unknown is 'foo'; it must be 'error', 'drop' or 'count'"): f({}, dict(a=[('jump', 0, 1)]), unknown='foo')

def test_only_the_planted_mistake_is_found():
    truth = {f'v{i}': [('jump', 0, 10), ('run', 20, 30)] for i in range(5)}
    right = {v: [(*e, .5+.01*i) for i,e in enumerate(own)] for v,own in truth.items()}
    assert error_causes(right, truth)['map']==1
    planted = dict(duplicate=('jump', 1, 10, .9), badly_placed=('jump', 8, 16, .9), wrong_class=('run', 0, 9, .9),
                   wrong_class_and_place=('run', 7, 15, .9), background=('jump', 50, 60, .9))
    for name,extra in planted.items():
        got = error_causes({**right, 'v0': [*right['v0'], extra]}, truth)
        assert {c: got[c]['count'] for c in CAUSES if got[c]['count']}=={name: 1}, name
        assert got['map']<1 and got[name]['map']==1, name
