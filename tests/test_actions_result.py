"An answer of actions: what is meant, seconds and frames at an uneven clock, files that programs and players read, bounded memory"
import csv, io, json, re, tracemalloc
import numpy as np, pytest
from vadnb.core import CheckpointError, DataError, MetricWarning
from vadnb.data.video import numbered_frames, write_video
from vadnb.report.families import cure_metrics, mistakes_of
from vadnb.report.report import report_page, shipped_logs, write_report
from vadnb.report.run import Run, read_run
from vadnb.results.actions import ActionPrediction, srt_time
from vadnb.results.record import Source, read_record
from vadnb.results.saving import save_results, signed_results
from vadnb.results.segment_threshold import as_plain, as_threshold, best_threshold, f1_curve

def made_up(path='a.mp4', frames=100, fps=10., n=30, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, frames/fps-2, n)
    segments = np.stack([start, start+rng.uniform(.2, 2, n)], 1)
    given = dict(classes=['jump', 'fall', 'run'], segments=segments, labels=rng.integers(0, 3, n), scores=rng.random(n),
                 threshold=.5)
    return ActionPrediction(str(path).split('/')[-1], path, fps, frames, **given|kwargs)

def test_order_does_not_depend_on_the_order_given():
    a,p = made_up(n=40), np.random.default_rng(1).permutation(40)
    tied = a.scores.round(1)
    one,two = (made_up(segments=a.segments[i], labels=a.labels[i], scores=tied[i]) for i in (np.arange(40), p))
    assert one.table()==two.table() and one.srt()==two.srt() and one.as_json()==two.as_json()
    assert (np.diff(one.scores)<=0).all()

def test_threshold_is_reached_by_equal_scores():
    a = made_up(segments=[(0, 1), (2, 3), (4, 5)], labels=[0, 0, 0], scores=[.5, .499, .9])
    assert [r['score'] for r in a.meant()]==[.5, .9]
    assert [l['score'] for l in a.layers()[Source(), 'actions'].segments]==[.5, .9]
    assert a.meant(.95)==[] and len(a.surest(2))==2

@pytest.mark.parametrize('fps', [10., 23.976, 59.94])
def test_frames_come_back(fps):
    "A stretch of frames, said in seconds, is the same stretch of frames, at any rate, to the sixth digit"
    rng = np.random.default_rng(0)
    a = rng.integers(0, 900, 50)
    b = a+rng.integers(1, 100, 50)
    p = made_up(frames=1000, fps=fps, n=50, segments=np.round(np.stack([a, b], 1)/fps, 6), labels=np.zeros(50, int),
                scores=np.linspace(1, .5, 50))
    assert (p.spans==np.stack([a, b], 1)).all()

def test_uneven_clock_against_a_walk():
    rng = np.random.default_rng(3)
    times = np.concatenate([[0], np.cumsum(rng.choice([.02, .04, .2, .5], 79))])
    p = made_up(frames=80, fps=25., n=40, times=times.tolist(), segments=np.sort(rng.uniform(0, times[-1], (40, 2)), 1))
    edges = np.append(times, times[-1]+1/25)
    for (s,e),(a,b) in zip(p.segments, p.spans):
        assert abs(edges[a]-s)==np.abs(edges[:80]-s).min()
        assert b==a+1 or abs(edges[b]-e)==np.abs(edges-e).min()
        assert 0<=a<b<=80
    assert p.result().facts['times']==times.tolist()

def test_subtitles_are_disjoint_and_say_what_holds():
    p = made_up(n=60, threshold=.3)
    blocks = p.srt().strip().split('\n\n')
    clock = lambda t: sum(f*float(v) for f,v in zip((3600, 60, 1, .001), re.split('[:,]', t)))
    spans = [[clock(t) for t in b.split('\n')[1].split(' --> ')] for b in blocks]
    assert [int(b.split('\n')[0]) for b in blocks]==[*range(1, len(blocks)+1)]
    assert all(a<=b for a,b in spans) and all(b<=c+1e-9 for (_,b),(c,_) in zip(spans, spans[1:]))
    for (a,b),block in zip(spans, blocks):
        if b-a<.01: continue
        holds = [r for r in p.meant() if r['seconds'][0]<(a+b)/2<r['seconds'][1]]
        assert sorted(block.split('\n')[2:])==sorted(f"{r['label']} {r['score']:.2f}" for r in holds)
    assert srt_time(59.9996)=='00:01:00,000'
    assert '-->' not in made_up(classes=['a --> b\n\n7', 'b', 'c']).srt().replace(' --> 0', '')

def test_table_and_json_hold_every_segment():
    p = made_up(n=30)
    rows = list(csv.DictReader(io.StringIO(p.table())))
    assert len(rows)==30==len(p.as_json()['detections'])
    assert sum(r['meant']=='1' for r in rows)==len(p.meant())
    row = json.loads(json.dumps(p.as_json()))['detections'][0]
    assert row['label']==rows[0]['label'] and row['segment'][0]==pytest.approx(float(rows[0]['start']), abs=1e-3)

def test_saved_beside_others_and_signed(tmp_path):
    video = write_video(tmp_path/'clips'/'a.mp4', numbered_frames(100), 10)
    first,second = save_results(signed_results([made_up(video), made_up(tmp_path/'other'/'a.avi')], system='s', run='r'),
                                tmp_path, tmp_path/'out')
    assert [f.name for f in first.files]==['a.json', 'a.csv', 'a.srt', 'a.png', 'a.layers.json']
    assert isinstance(second.error, DataError)
    assert list(read_record(first.files[-1]).layers())==[(Source('s', 'r'), 'actions')]

def test_overlay_in_bounded_memory(tmp_path):
    "Ten times the frames take no more memory; each frame is drawn before the next is read"
    def peak(n):
        p = made_up(frames=n, n=20, segments=np.stack([np.arange(20)*.1, np.arange(20)*.1+1], 1))
        frames = (np.zeros((120, 160, 3), np.uint8) for _ in range(n))
        tracemalloc.start()
        for _ in p.overlay_frames(frames): pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(30)
    assert peak(400)<1.5*peak(40)

def test_faults():
    for wrong,says in [(dict(segments=[(0, 20)], labels=[0], scores=[1]), 'cut them off'),
                       (dict(segments=[(0, np.inf)], labels=[0], scores=[1]), 'NaN or infinity'),
                       (dict(segments=[(0, 1)], labels=[3], scores=[1]), 'labels lie between 0 and 2'),
                       (dict(segments=[(0, 1)], labels=[-1], scores=[1]), 'labels lie between')]:
        with pytest.raises(DataError, match=says): made_up(**wrong)
    p = made_up(segments=[(3, 2), (1, 1), (0, 1)], labels=[0]*3, scores=[.9]*3)
    assert p.without_length==2 and '2 segments without length left out' in p.summary()[0]

# ---------------------------------------------------------------- threshold

def test_case_14_the_threshold_is_shown_with_what_it_was_worth():
    "cases.json 14: a stated default, best F1 at tIoU 0.5 on validation, kept with precision and recall"
    truth = {'v': [('jump', 10*i, 10*i+5) for i in range(10)]}
    said = {'v': [('jump', 10*i, 10*i+5, .9-.01*i) for i in range(8)]+[('jump', 10*i+6, 10*i+9, .5) for i in range(9)]}
    best = best_threshold(said, truth)
    assert (best.threshold, best.precision, best.recall, best.kept)==(pytest.approx(.83), 1., .8, 8)
    assert as_threshold(json.loads(json.dumps(as_plain(best))))==best
    p = made_up(threshold=best.threshold, calibrated=best)
    assert '100% of the segments it keeps are right and 80% of the events are found' in p.summary()[-1]
    assert 'not calibrated' in made_up(threshold=.3, calibrated=best).summary()[-1]
    with pytest.raises(CheckpointError, match='evaluate the run again'): as_threshold({'threshold': .5})

def test_curve_does_not_depend_on_order_and_ties_fall_together():
    rng = np.random.default_rng(0)
    truth = {v: [('a', 10*i, 10*i+6) for i in range(6)] for v in 'xy'}
    rows = {v: [('a', 10*i+rng.normal(), 10*i+6+rng.normal(), rng.integers(1, 5)/4) for i in range(6) for _ in range(2)]
            for v in 'xy'}
    other = {v: [rows[v][i] for i in rng.permutation(12)] for v in 'yx'}
    for a,b in zip(f1_curve(rows, truth), f1_curve(other, truth)): np.testing.assert_array_equal(a, b)
    assert f1_curve(rows, truth)[1][-1]==24
    with pytest.warns(MetricWarning): best_threshold(rows | {'y': [('a', 5, 5, .9)]}, truth)

# ---------------------------------------------------------------- report

def test_report_against_the_guide(tmp_path):
    "The guide's numbers come by name, and stand beside the run's own"
    start = dict(kind='start', step=0, system='adatad', metric='map/mean')
    rows = [start]
    for e in (1, 2):
        rows += [{'kind': 'train', 'step': 25*e, 'epoch': e, 'loss': 1/e, 'loss/cls': .6/e, 'loss/reg': .4/e,
                  'peak_memory': 3.5, 'samples_per_second': 7.},
                 {'kind': 'valid', 'step': 25*e, 'epoch': e, 'map/0.3': .3*e, 'map/0.5': .2*e, 'map/mean': .25*e,
                  **cure_metrics({'missed': dict(count=5, map=.2*e+.1)}, 'map/0.5')}]
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'log.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    page = write_report(tmp_path/'run', against='guide').read_text()
    for said in ('By threshold', 'What goes wrong', 'Compared with guide', '0.6864', '0.8350', '3.5 GiB', 'guide, epoch 60'):
        assert said in page, said
    assert [m for m in mistakes_of(rows[-1])]==['map/0.5']
    assert 'By threshold' not in report_page(Run(tmp_path/'x', [start, rows[1]], None, None))
    assert shipped_logs(Run(tmp_path/'x', [start|dict(system='../adatad')], None, None))=={}

def test_the_guide_adds_up(tmp_path):
    start = dict(kind='start', step=0, system='adatad')
    log = read_run(shipped_logs(Run(tmp_path/'x', [start], None, None))['guide'])
    train,valid = log.of('train'), log.of('valid')
    assert [r['epoch'] for r in train]==[*range(49, 61)]
    assert all(r['loss']==pytest.approx(r['loss/cls']+r['loss/reg'], abs=1e-9) for r in train)
    last = valid[-1]
    assert np.mean([last[f'map/{t}'] for t in (.3, .4, .5, .6, .7)])==pytest.approx(last['map/mean'], abs=5e-5)
