"An answer of classes: rows over time, files that come back as they were, what is said of a folder of videos"
import csv, io, json
import numpy as np, pytest
from vadnb.core import DataError, MetricWarning
from vadnb.data.video import numbered_frames, write_video
from vadnb.plots import OTHER
from vadnb.results.class_folder import ClassFolder, class_folder
from vadnb.results.class_pictures import confusion_figure, folded, top_classes
from vadnb.results.class_rows import as_csv, as_jsonl, read_class_rows
from vadnb.results.classes import ClassPrediction
from vadnb.results.layers import Classes, Curve, layer_of
from vadnb.results.record import Result, Source, read_record
from vadnb.results.saving import save_results, signed_results
from vadnb.results.temperature import ClassTemperature, class_temperature

NAMES = ['apply eye makeup', 'archery', 'baby crawling', 'video', '=sum(a)', 'naïve, "x"']

def made_up(name='a.mp4', path=None, frames=100, rows=1, seed=0, **kw):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(len(NAMES), .4), rows).astype(np.float32)
    edges = np.linspace(0, frames-20, rows).round().astype(int) if rows>1 else [0]
    spans = [(int(a), int(a)+20) for a in edges] if rows>1 else None
    given = dict(classes=NAMES, probabilities=p, spans=spans)
    return ClassPrediction(name, path or name, 10., frames, **given|kw)

@pytest.mark.parametrize('ending,written', [('jsonl', as_jsonl), ('csv', as_csv)])
def test_rows_come_back_bit_for_bit(tmp_path, ending, written):
    "Any class name, a column of the table among them; tiny numbers; several videos; a byte order mark of a spreadsheet"
    videos = [made_up('x/ä b.mp4', rows=4), made_up('c,d.avi', seed=1, true_class='archery')]
    videos[1].probabilities[0] = np.float32([1, 1e-38, 0, 1e-7, 0, 3e-20])
    text = written([r for p in videos for r in p.rows()])
    for lead in ('', '\ufeff'):
        (tmp_path/f'x.{ending}').write_bytes((lead+text).encode())
        found = read_class_rows(tmp_path/f'x.{ending}')
        assert list(found)==['x/ä b.mp4', 'c,d.avi']
        for p in videos: assert found[p.name]==p.layer

def test_rows_as_others_read_them():
    p = made_up(rows=3, times=np.cumsum(np.r_[0, np.tile([.1, .3], 50)[:99]]).tolist())
    rows = [json.loads(l) for l in as_jsonl(p.rows()).splitlines()]
    table = list(csv.DictReader(io.StringIO(as_csv(made_up(rows=3, classes=[f'c{i}' for i in range(6)]).rows()))))
    for r,span,row in zip(rows, p.spans, p.probabilities):
        assert (r['start'], r['end'])==span and r['start_seconds']==pytest.approx(p.times[span[0]])
        assert r['probabilities'][r['class']]==r['probability']==max(r['probabilities'].values())
        assert [*r['probabilities']]==NAMES and sum(r['probabilities'].values())==pytest.approx(1, abs=1e-5) and 'true_class' not in r
    assert [float(r['start_seconds']) for r in table]==[0, 4, 8] and {r['true_class'] for r in table}=={''}
    assert all(float(r[r['class']])==float(r['probability']) for r in table)

def test_the_layer_in_a_record_and_with_others(tmp_path):
    "Read, validated, joined with what others say of the video, in either order"
    p = made_up(rows=5).from_source('classifier', 'r')
    other = Result('a.mp4', 100, 10., dict(anomaly=Curve(np.linspace(0, 1, 100))), Source('scorer'))
    both = p|other
    assert {n for _,n in both.layers()}=={'classes', 'anomaly'} and (other|p).layers()==dict([*both.layers().items()][::-1])
    files = p.save(tmp_path/'out')
    assert read_record(files[-1]).layers()==p.layers()
    row = json.loads(files[-1].read_text())
    for change,says in ((lambda l: l['classes'].append('more'), r'must be \(rows, 7\)'), (lambda l: l['probabilities'][0].__setitem__(0, 1.5), 'from 0 to 1'),
                        (lambda l: l['spans'].pop(), 'must be a list of 5'), (lambda l: l['spans'].__setitem__(0, [0, 999]), 'beyond the 100 frames'),
                        (lambda l: l['classes'].__setitem__(1, NAMES[0]), 'none of them twice')):
        wrong = json.loads(json.dumps(row))
        change(wrong['layers'][0])
        (tmp_path/'w.layers.json').write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=says): read_record(tmp_path/'w.layers.json')
    assert layer_of(p.layer.record())==p.layer
    with pytest.raises(DataError, match='is not video'): p|Result('b.mp4', 100, 10., {}, Source())

def test_answer_and_stretches_against_a_walk():
    p = made_up(rows=40, frames=200, seed=4)
    top = [NAMES[k] for k in p.probabilities.argmax(1)]
    walked,last = [], None
    for t,span in zip(top, p.spans):
        if t==last: walked[-1] = (t, walked[-1][1], span[1], walked[-1][3]+1)
        else: walked.append((t, *span, 1))
        last = t
    assert [(r['label'], r['start'], r['end'], len(r['rows'])) for r in p.stretches()]==walked
    assert NAMES[p.answer]==NAMES[p.probabilities.astype(float).mean(0).argmax()]
    for r in p.stretches(): assert r['score']==pytest.approx(p.probabilities[r['rows'], NAMES.index(r['label'])].mean(), abs=1e-6)

@pytest.mark.parametrize('frames', [1, 2, 7, 100])
def test_the_picture_shows_frames_that_were_looked_at(tmp_path, frames):
    "Any length; frames that repeat are shown once; a video that is gone costs the frames only"
    path = write_video(tmp_path/'v'/'a.mp4', numbered_frames(frames), 10)
    looked = sorted(np.linspace(0, frames-1, 16).round().astype(int).tolist())
    p = made_up('a.mp4', path, frames, looked=[looked], true_class=NAMES[2])
    at,says = p.moments()
    assert set(at)<=set(looked) and len(set(at))==len(at)==len(says)==min(6, len(set(looked)))
    names = [t for t in p.over_time().axes[0].get_yticklabels() if t.get_color()==OTHER]
    assert [t.get_text() for t in names]==[NAMES[2]]
    assert len(p.figure().axes)>len(at)
    path.unlink()
    assert 'no frames' in p.figure().get_supxlabel()

def test_many_windows_in_words():
    p = made_up(rows=200, frames=4000, seed=2)
    assert 'the 20 surest of' in p.table_rows()[0] and len(p.table_rows()[1])==20
    assert len(p.summary())==7 and 'not calibrated' in p.summary()[-1]
    kept = ClassTemperature(2., .2, .01, 50)
    assert 'temperature 2.0000' in made_up(temperature=kept).summary()[-1]
    assert made_up()._repr_html_().count('<tr>')==6 and 'svg' in p._repr_html_()

def test_top_classes():
    assert top_classes([.1, .4, .4, .1], 2)==[1, 2] and top_classes([.1, .4, .4, .1], 2, 3)==[1, 2, 3] and top_classes([.1, .9], 5)==[1, 0]

def test_fold_keeps_every_count():
    rng = np.random.default_rng(0)
    m = rng.integers(0, 4, (30, 30))
    for most in (1, 7, 29, 30, 99):
        few,names = folded(m, list(map(str, range(30))), most)
        assert few.sum()==m.sum() and len(few)==len(names)==min(30, most+(most<30))
        assert np.trace(few)>=np.trace(m)
    assert len(confusion_figure(m, list(map(str, range(30))), 12).axes[0].get_yticklabels())==13

def videos(folder, n=3):
    for k in range(n):
        for label in NAMES[:2]:
            yield write_video(folder/label/f'{k}.mp4', numbered_frames(8+k), 10), label

def test_a_folder_of_classes(tmp_path):
    "Every video is saved below its own folder before the next is predicted, and counted at the end; what is lost is not"
    def predicted():
        for i,(path,label) in enumerate(videos(tmp_path/'in')):
            if i==3: yield DataError('1.mp4: is cut off')
            else:
                p = np.full(6, .1); p[i%2 if i<4 else 0] = .5
                yield ClassPrediction(f'{label}/{path.name}', path, 10, 8+i//2, NAMES, p, true_class=label)
                assert (tmp_path/'out'/label/f'{path.stem}.jsonl').is_file()
    saved = list(save_results(signed_results(predicted(), system='s', run='r'), tmp_path/'in', tmp_path/'out'))
    assert [str(s.error) for s in saved if s.error]==['1.mp4: is cut off']
    assert [f.name for f in saved[-1].files]==['in.predictions.jsonl', 'in.predictions.csv', 'in.accuracy.json', 'in.confusion.png']
    told = json.loads(saved[-1].files[2].read_text())
    assert (told['videos'], told['of_known_class'], told['metrics']['top1'])==(5, 5, .8) and sum(map(sum, told['confusion']))==5
    assert '5 videos, 5 of known class: 0.800 right' in saved[-1].lines[0] and 'archery 0.50' in saved[-1].lines[1]
    found = read_class_rows(saved[-1].files[0])
    assert list(found)==[f'{NAMES[i%2]}/{i//2}.mp4' for i in (0, 1, 2, 4, 5)]
    assert read_record(tmp_path/'out'/NAMES[1]/'0.layers.json').layers()[Source('s', 'r'), 'classes']==found[f'{NAMES[1]}/0.mp4']

def test_videos_of_unknown_class_have_an_overview_without_accuracy(tmp_path):
    saved = list(save_results([made_up('a.mp4'), made_up('b.mp4', seed=1)], tmp_path/'in', tmp_path/'out'))
    assert [f.name for f in saved[-1].files]==['in.predictions.jsonl', 'in.predictions.csv'] and saved[-1].lines==[f"{tmp_path/'in'}: 2 videos"]
    assert len(list(save_results([made_up('a.mp4')], tmp_path/'a.mp4', tmp_path/'one')))==1
    assert class_folder('x', [made_up()]) is None
    with pytest.raises(DataError, match='other classes'): ClassFolder('x', [made_up(), made_up('b.mp4', classes=NAMES[::-1])])

def test_names_lead_nowhere_else():
    for name in ('../a.mp4', '/a.mp4', 'x/../../a.mp4'):
        with pytest.raises(DataError, match='below a folder'): made_up(name)

def test_temperature_of_probabilities_with_zeros():
    "Averaged probabilities may hold an exact 0, also where it is the right class"
    p = np.array([[1., 0], [1, 0], [.9, .1], [0, 1]]*5)
    kept = class_temperature(p, [0, 1, 0, 1]*5)
    assert kept.temperature>1 and kept.error_after<kept.error_before and kept.samples==20
    with pytest.warns(MetricWarning): assert class_temperature(p, [0, 0, 0, 1]*5).temperature==1
