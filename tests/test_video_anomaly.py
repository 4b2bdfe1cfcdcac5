"Frame metrics on the 290 videos of the UCF-Crime test set, against the golden values and their anchors; events and boxes against slow references"
import hashlib, json
import numpy as np, pytest
from safetensors.numpy import load_file
from vadnb.core import DataError
from vadnb.data.annotation import frame_truth
from vadnb.data.ucf_crime import read_annotation
from vadnb.core import MetricWarning
from vadnb.metrics.boxes import box_iou
from vadnb.metrics.events import TIOUS, temporal_map
from vadnb.metrics.intervals import frame_intervals, per_class_metrics
from vadnb.metrics.video_anomaly import frame_metrics, trivial_baselines, trivial_scores

KEYS = dict(frame_auc='auc', frame_ap='ap_step', frame_ap_trapezoid='ap_trapezoid', anomalous_auc='ano_auc', anomalous_ap='ano_ap_step', macro_auc='macro_auc_over_abnormal_videos',
            false_alarm_rate='far_at_0_5', video_auc='video_auc_of_max', video_accuracy='video_accuracy_max_over_0_5')

@pytest.fixture(scope='module')
def golden(shared):
    at = shared/'golden'/'fgclip'
    meta,arrays = json.loads((at/'ucf_crime_eval.json').read_text()),load_file(at/'ucf_crime_eval.safetensors')
    truth = {v['name']: frame_truth(v['segments'], v['n_frames'], v['name']) for v in meta['videos']}
    snippets = {v['name']: arrays['scores'][a:b] for v,a,b in zip(meta['videos'], arrays['offsets'], arrays['offsets'][1:])}
    return meta, truth, snippets

def per_frame(snippets, truth, floor=False):
    "Frame f takes snippet f//16; with `floor` only whole snippets exist and the last is repeated"
    res = {}
    for name,s in snippets.items():
        n = len(truth[name])
        i = np.arange(n)//16
        res[name] = s[np.minimum(i, max(1, n//16)-1) if floor else i]
    return res

def close(got, want, meta):
    for key,name in KEYS.items():
        if name in want and key in got: assert got[key]==pytest.approx(want[name], abs=meta['tolerance']['abs']), key

def test_counts(golden):
    meta,truth,_ = golden
    assert (len(truth), sum(map(len, truth.values())), sum(int(t.sum()) for t in truth.values()))==(290, 1_111_808, 84_182)
    assert hashlib.sha256(np.concatenate([truth[k] for k in sorted(truth)]).astype(np.uint8).tobytes()).hexdigest()==meta['gt_sha256']

def test_truth_of_the_official_annotation(golden, shared):
    "Events from the official list, lengths from another file, joined by name: the truth, and what its trivial baselines get"
    at = shared/'data'/'ucf_crime'
    official,counted = read_annotation(at/'Temporal_Anomaly_Annotation_for_Testing_Videos.txt'),read_annotation(at/'mist'/'Temporal_Anomaly_Annotation_New.txt')
    truth = {k: frame_truth(v.segments, counted[k].n_frames, k) for k,v in official.items()}
    assert (len(truth), sum(map(len, truth.values())), sum(int(t.sum()) for t in truth.values()))==(290, 1_111_808, 84_182)
    base = trivial_baselines(truth)
    for scorer,want in dict(perfect_video_label=(81.57, 18.19, 50.0), perfect_video_label_centre=(86.52, 24.02, 63.4)).items():
        assert [100*base[f'baseline/{k}/{scorer}'] for k in ('frame_auc', 'frame_ap', 'anomalous_auc')]==pytest.approx(want, abs=.05)
    assert 100*base['baseline/frame_auc/centre']==pytest.approx(61.88, abs=.005)
    meta,theirs,snippets = golden
    assert all(np.array_equal(truth[k], t) for k,t in theirs.items()) and truth.keys()==theirs.keys()
    got = frame_metrics(per_frame(snippets, truth), truth, classes={k: v.cls for k,v in official.items()})
    for c,want in meta['expected_ceil']['per_class'].items(): assert got[f'class/{c}/auc']==pytest.approx(want['auc_class_videos_only'], abs=meta['tolerance']['abs'])

@pytest.mark.parametrize('floor', [False, True])
def test_golden_scores(golden, floor):
    meta,truth,snippets = golden
    got = frame_metrics(per_frame(snippets, truth, floor), truth)
    # the official code has no F1 at a threshold
    assert got.pop('frame_f1')>=0 and set(got)==set(KEYS)
    close(got, meta['expected_floor' if floor else 'expected_ceil'], meta)

def test_the_order_of_the_videos_is_nothing(golden):
    meta,truth,snippets = golden
    scores = per_frame(snippets, truth)
    assert frame_metrics(dict(reversed(scores.items())), truth)==frame_metrics(scores, dict(reversed(truth.items())))

def test_anchors(golden):
    meta,truth,_ = golden
    base,scores = trivial_baselines(truth),trivial_scores(truth)
    for scorer,anchor in dict(perfect_video_label='perfect_video_label_flat', perfect_video_label_centre='perfect_video_label_plus_half_centre', centre='centre_only', constant='constant').items():
        close({k: base[f'baseline/{k}/{scorer}'] for k in ('frame_auc', 'frame_ap', 'anomalous_auc')}, meta['anchors'][anchor], meta)
        if scorer!='constant': close(frame_metrics(scores[scorer], truth), meta['anchors'][anchor], meta)
    for scorer,want in dict(perfect_video_label=(81.57, 18.19, 50.0), perfect_video_label_centre=(86.52, 24.02, 63.4)).items():
        got = [100*base[f'baseline/{k}/{scorer}'] for k in ('frame_auc', 'frame_ap', 'anomalous_auc')]
        assert got==pytest.approx(want, abs=.05)
    assert frame_metrics(scores['perfect_video_label'], truth)['false_alarm_rate']==0

def test_equal_to_scikit_learn(golden):
    from sklearn.metrics import average_precision_score, roc_auc_score
    meta,truth,snippets = golden
    scores = per_frame(snippets, truth)
    y,s = (np.concatenate([d[k] for k in truth]) for d in (truth, scores))
    got = frame_metrics(scores, truth)
    assert got['frame_auc']==pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert got['frame_ap']==pytest.approx(average_precision_score(y, s), abs=1e-12)

def classes_of(meta): return {v['name']: v['cls'] for v in meta['videos']}

def test_golden_classes(golden):
    meta,truth,snippets = golden
    got = per_class_metrics(per_frame(snippets, truth), truth, classes_of(meta), resamples=200)
    for c,want in meta['expected_ceil']['per_class'].items():
        assert got[f'class/{c}/videos']==want['n_videos']
        assert got[f'class/{c}/auc']==pytest.approx(want['auc_class_videos_only'], abs=meta['tolerance']['abs'])
        assert got[f'class/{c}/auc_with_normal']==pytest.approx(want['auc_class_plus_normal_videos'], abs=meta['tolerance']['abs'])
        assert got[f'class/{c}/low']<got[f'class/{c}/auc']<got[f'class/{c}/high']
    assert len(got)==5*13 and not any('Normal' in k for k in got)

def test_intervals_are_quantiles_of_resampled_data_sets():
    "The table of pairs against drawing the videos and sorting all frames again"
    rng = np.random.default_rng(3)
    truth = {f'v{i}': rng.random(rng.integers(20, 60))<(.3 if i<6 else 0) for i in range(12)}
    scores = {k: np.round(rng.normal(size=len(t))+t, 1) for k,t in truth.items()}
    got = frame_intervals(scores, truth, resamples=4000, seed=5)
    names = sorted(truth)
    values = {'frame_auc': [], 'anomalous_auc': []}
    for _ in range(4000):
        bad = rng.choice([k for k in names if truth[k].any()], 6)
        for key,drawn in (('anomalous_auc', bad), ('frame_auc', [*bad, *rng.choice([k for k in names if not truth[k].any()], 6)])):
            y,s = (np.concatenate([d[k] for k in drawn]) for d in (truth, scores))
            _,inverse,n = np.unique(s, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(n)-(n-1)/2)[inverse]
            p = y.sum()
            values[key].append((ranks[y].sum()-p*(p+1)/2)/(p*(len(y)-p)))
    for key,v in values.items(): assert [got[f'interval/{key}/low'], got[f'interval/{key}/high']]==pytest.approx(np.quantile(v, (.025, .975)), abs=.01)

def test_a_video_without_ordinary_frames_and_one_class_video():
    truth = dict(cut=np.ones(10, bool), fire=np.arange(10)<3, fire2=np.arange(10)>6, walk=np.zeros(10, bool))
    scores = {k: np.linspace(0, 1, 10)+t for k,t in truth.items()}
    with pytest.warns(MetricWarning) as said: got = per_class_metrics(scores, truth, dict(cut='Cut', fire='Arson', fire2='Arson'))
    assert sum('class/Cut/low' in str(w.message) for w in said)==1 and sum('class/Cut/auc' in str(w.message) for w in said)==1
    assert np.isfinite(list(got.values())).all() and got['class/Cut/videos']==1 and 'class/Cut/auc' not in got and 'class/Cut/low' not in got and 'class/Arson/high' in got
    with pytest.raises(DataError, match="classes: missing for 'cut'"): per_class_metrics(scores, truth, dict(fire='Arson', fire2='Arson'))

# events

def slow_proposals(s, way):
    "Runs of one curve, frame by frame: (start, end, confidence)"
    n = len(s); k = n//16
    if way=='corrected': k = max(k, 1)
    top = sum(sorted(s)[n-k:])/k if k else 0
    if way=='vadclip' and top<=0: s = [0*v for v in s]
    limit = max(s)-(max(s)-min(s))*.6
    runs,start = [], None
    for f,v in enumerate([*s, limit]):
        if v>limit and start is None: start = f
        if v<=limit and start is not None: runs.append((start, f)); start = None
    res = sorted(((a, b, max(s[a:b])+.7*top) for a,b in runs if b-a>1), key=lambda r: -r[2])
    kept = []
    for r in res:                                               # suppression, which runs over one threshold never need
        if all(len({*range(*r[:2])}&{*range(*o[:2])})<=.6*len({*range(*r[:2])}|{*range(*o[:2])}) for o in kept): kept.append(r)
    assert len(kept)==len(res)
    return kept

def slow_map(class_scores, segments, classes, normal, way, tiou):
    "The procedure of VadCLIP and its corrected form, with sets of frames and lists"
    aps = []
    for c,cls in enumerate(classes):
        found,events = [], []
        for name in sorted(segments):
            rows,n = segments[name],len(class_scores[name])
            found += [(name, *r) for r in slow_proposals(class_scores[name][:,c].tolist(), way)]
            if way=='vadclip': events += [(name, {*range(a, b)}) for k,a,b in rows[:2] if k==cls]
            else: events += [(name, {*range(a, min(b, n))}) for k,a,b in rows if k==cls]
        if not found and way=='vadclip': return 0.
        if not events:
            if way=='vadclip': aps.append(0.)
            continue
        total,hits,ap = len(events),0,0.
        for place,(name,a,b,_) in enumerate(sorted(found, key=lambda r: -r[3]), 1):
            near = [(len(e&{*range(a, b)})/len(e|{*range(a, b)}), -i) for i,(k,e) in enumerate(events) if k==name]
            if near and max(near)[0]>=tiou: hits += 1; ap += hits/place; del events[-max(near)[1]]
        aps.append(ap/total)
    return sum(aps)/len(aps)

def event_world(rng, videos=24, classes=('Normal', 'Arson', 'Fighting', 'Robbery')):
    "Smooth curves that lean to the events, up to four per video, one beyond the end of its video"
    class_scores,segments = {}, {}
    for v in range(videos):
        n = int(rng.integers(10, 200)); name = f'v{(v*7)%videos:02}'
        s = rng.normal(size=(n, len(classes)))
        s = np.apply_along_axis(lambda x: np.convolve(x, np.ones(5)/5, 'same'), 0, s)
        segments[name] = []
        for e in range(int(rng.integers(0, 5)) if v%3 else 0):
            c = int(rng.integers(1, len(classes))); a = int(rng.integers(0, n-5)); b = a+int(rng.integers(3, 40))
            segments[name].append((classes[c], a, b)); s[a:b, c] += 1.2
        p = np.exp(s)
        class_scores[name] = p/p.sum(1, keepdims=True)
    return class_scores, segments, list(classes)

@pytest.mark.parametrize('way', ['vadclip', 'corrected'])
@pytest.mark.parametrize('seed', range(3))
def test_events_equal_the_slow_reference(way, seed):
    class_scores,segments,classes = event_world(np.random.default_rng(seed))
    got = temporal_map(class_scores, segments, classes, way=way)
    want = [slow_map(class_scores, segments, classes, 'Normal', way, t) for t in TIOUS]
    assert [got[f'map/{t}'] for t in TIOUS]==pytest.approx(want, abs=1e-12) and want[0]>want[-1]>0
    assert got['map/mean']==pytest.approx(np.mean(want), abs=1e-12)
    again = temporal_map(dict(reversed(class_scores.items())), dict(reversed(segments.items())), classes, way=way)
    assert again==got

def test_logits_below_zero_have_no_proposals_in_the_old_way():
    class_scores,segments,classes = event_world(np.random.default_rng(4))
    logits = {k: np.log(s) for k,s in class_scores.items()}
    assert temporal_map(logits, segments, classes, way='vadclip')['map/mean']==slow_map(logits, segments, classes, 'Normal', 'vadclip', .1)==0
    assert temporal_map(logits, segments, classes)['map/0.1']==pytest.approx(slow_map(logits, segments, classes, 'Normal', 'corrected', .1), abs=1e-12)

def test_real_events_found_by_their_own_labels(golden):
    "The truth itself as score: every event found in the corrected way, one class in fourteen always lost in the old one"
    meta,truth,_ = golden
    classes = ['Normal', *sorted({v['cls'] for v in meta['videos']}-{'Normal'})]
    segments = {v['name']: [(v['cls'], *s) for s in v['segments']] for v in meta['videos']}
    scores = {}
    for v in meta['videos']:
        scores[v['name']] = s = np.zeros((v['n_frames'], 14), np.float32)
        s[:,classes.index(v['cls'])] = truth[v['name']]; s[:,0] = ~truth[v['name']]
    got,old = (temporal_map(scores, segments, classes, way=way) for way in ('corrected', 'vadclip'))
    assert [got[f'map/{t}'] for t in TIOUS]==[1]*5
    assert old['map/0.1']==pytest.approx(13/14, abs=1e-12)
    # a whole video is right about its one event exactly where the event fills that share of it
    alone = {}
    for v in meta['videos']:
        if v['segments']: alone.setdefault(v['cls'], []).append(max(b-a for a,b in v['segments_clipped'])/v['n_frames'])
    bound = np.mean([np.mean(np.array(share)>=.5) for share in alone.values()])
    assert 0<got['baseline/map/0.5/perfect_video_label']<=bound<1
    for scored,want in ((got, (.507, .051, .221)), (old, (.471, .047, .205))):
        assert [scored[f'baseline/map/{k}/perfect_video_label'] for k in ('0.1', '0.5', 'mean')]==pytest.approx(want, abs=5e-4)

# boxes

def test_box_overlap_counted_in_pixels():
    rng = np.random.default_rng(0)
    a,b = (np.sort(rng.integers(0, 21, (200, 2, 2)), 1).reshape(200, 4) for _ in range(2))
    def pixels(box): m = np.zeros((20, 20), bool); m[box[1]:box[3], box[0]:box[2]] = True; return m
    want = [(pixels(p)&pixels(q)).sum()/max(1, (pixels(p)|pixels(q)).sum()) for p,q in zip(a, b)]
    np.testing.assert_allclose(box_iou(a/20, b/20), want, atol=1e-12)
