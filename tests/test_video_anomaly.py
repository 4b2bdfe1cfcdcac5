"Frame metrics on the 290 videos of the UCF-Crime test set, against the golden values and their anchors"
import json
import numpy as np, pytest
from safetensors.numpy import load_file
from vadnb.data.ucf_crime import frame_truth
from vadnb.metrics.video_anomaly import frame_metrics, trivial_baselines, trivial_scores

KEYS = dict(frame_auc='auc', frame_ap='ap_step', anomalous_auc='ano_auc', false_alarm_rate='far_at_0_5')

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

@pytest.mark.parametrize('floor', [False, True])
def test_golden_scores(golden, floor):
    meta,truth,snippets = golden
    got = frame_metrics(per_frame(snippets, truth, floor), truth)
    assert set(got)==set(KEYS)
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
