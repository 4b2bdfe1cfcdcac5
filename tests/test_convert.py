"Converters on the real lists and sentences, and on boxes in the form in which their authors publish them"
import json, pickle, re, warnings
import numpy as np, pytest
from vadnb.core import DataError
from vadnb.data.convert import (box_tracks, from_boxes_and_captions, from_ucf_annotation, from_xd_annotation,
                                read_box_pickle, read_narration, write_new)
from vadnb.data.plain_pickle import read_plain_pickle
from vadnb.data.tracks import Track
from vadnb.core import DataWarning
from vadnb.data.annotation import truth_segments, video_name
from vadnb.data.regions import read_regions
from vadnb.data.ucf_crime import read_annotation

@pytest.fixture(scope='module')
def sample(shared):
    "The 30 real videos in the training format, and what is known about them"
    at = shared/'golden'/'fgclip'
    return json.loads((at/'ucf_region_sample.json').read_text()), json.loads((at/'ucf_region_sample_facts.json').read_text())

@pytest.fixture(scope='module')
def uca(shared): return shared/'data'/'ucf_crime'/'uca'/'UCFCrime_Test.json'

def box_file(path, items):
    "The keyframes of `items` as Liu and Ma publish them: protocol 0, pixels, pictures counted from 1, rows in no order"
    data,rng = {},np.random.default_rng(0)
    for item in items:
        name = video_name(item['f_path'])
        keys = [k for r in item['bbox_info'] for k in r['keyframes']]
        if keys: data[name] = [[f'/data/images/{name}/image_{keys[i]["frame"]+1:04d}.jpg', *(round(v*s) for v,s in zip(keys[i]['bbox'], (320, 240, 320, 240)))] for i in rng.permutation(len(keys))]
    path.write_bytes(pickle.dumps(data, 0))
    return path

def test_official_list_as_json(shared, tmp_path):
    for name in 'Temporal_Anomaly_Annotation_for_Testing_Videos.txt','mist/Temporal_Anomaly_Annotation_New.txt':
        source = shared/'data'/'ucf_crime'/name
        found = read_annotation(write_new(tmp_path/f'{len(name)}.json', from_ucf_annotation(source)))
        assert found==read_annotation(source) and len(found)==290 and sum(len(v.segments) for v in found.values())==156
    assert sum(v.n_frames for v in found.values())==1_111_808

def test_xd_violence_list_as_json(shared, tmp_path):
    source = shared/'data'/'xd_violence'/'annotations.txt'
    quiet = {f'v=quiet{i}__#1_label_A': 100+i for i in range(300)}
    found = read_annotation(write_new(tmp_path/'xd.json', from_xd_annotation(source, quiet)))
    crimes = {k: v for k,v in found.items() if not v.normal}
    assert (len(found), len(crimes))==(800, 500) and all(v.n_frames is None for v in crimes.values())
    assert {k: v.n_frames for k,v in found.items() if v.normal}==quiet
    # a second reading of the same lines, by the eye of a regular expression
    rows = re.findall(r'^(\S+?)(?:\.mp4)? ([\d ]+?) *$', source.read_text(), re.M)
    assert {k: [n for s in v.segments for n in s] for k,v in crimes.items()}=={k: list(map(int, n.split())) for k,n in rows}
    first = {c: sum(v.cls==c for v in crimes.values()) for c in {v.cls for v in crimes.values()}}
    assert first=={'Fighting': 120, 'Shooting': 84, 'Riot': 101, 'Abuse': 8, 'Car accident': 96, 'Explosion': 91}
    assert sum(len(v.labels)>1 for v in crimes.values())==47
    assert found['Bad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6'].labels==('Explosion', 'Shooting', 'Car accident')
    with pytest.warns(DataWarning, match='no normal video'): assert len(from_xd_annotation(source))==500

def test_sentences_of_uca(uca):
    told = read_narration(uca)
    assert (len(told), sum(len(n.sentences) for n in told.values()))==(310, 4331)
    raw = json.loads(uca.read_text())
    for name,n in told.items():
        starts = [s for s,_,_ in n.sentences]
        assert starts==sorted(starts) and sorted(t for _,_,t in n.sentences)==sorted(t.strip() for t in raw[name]['sentences'])

def test_boxes_become_the_tracks_of_the_golden_sample(sample, tmp_path):
    items,facts = sample
    boxes = read_box_pickle(box_file(tmp_path/'boxes.pkl', items))
    assert len(boxes)==facts['n_abnormal'] and sum(len(f) for f,_ in boxes.values())==facts['n_keyframes']
    for item,fact in zip(items, facts['videos']):
        if not item['bbox_info']: continue
        hidden = {'split': 'split', 'gapoff': 'off'}[fact['regions'][0]['mode']]
        found = box_tracks(*boxes[fact['name']], gap=facts['gap_frames'], hidden=hidden)
        assert found==[{k: v for k,v in r.items() if k!='caption'} for r in item['bbox_info']], fact['name']

def test_golden_items_come_out_of_boxes_and_sentences(sample, uca, tmp_path):
    "Robbery109 is the one video of the sample whose sentences are among the test sentences"
    items,facts = sample
    with pytest.warns(DataWarning) as said: made = from_boxes_and_captions(read_box_pickle(box_file(tmp_path/'boxes.pkl', items)), read_narration(uca))
    names = list(json.loads(uca.read_text()))
    normal = sum(n.startswith('Normal') for n in names)
    assert [re.match(r'(.*) of \d+ videos', str(w.message))[1] for w in said]==['boxes without sentences: 25', f'sentences of crimes without boxes: {309-normal}']
    crimes = [i for i in made if i['bbox_info']]
    assert crimes==[i for i in items if 'Robbery109' in i['f_path']]
    clips = read_regions(write_new(tmp_path/'train.json', made))
    assert len(clips)==normal+1 and sum(c.normal for c in clips)==normal>100

def test_region_captions_for_the_whole_sample(sample, tmp_path):
    "Each golden region told as one sentence over its own time: the join has to give every caption back"
    items,facts = sample
    told,distinct = {},0
    for item,fact in zip(items, facts['videos']):
        regions = item['bbox_info']
        spoken = [[r['start_frame']/30, (r['end_frame']+1)/30] for r in regions] or [[0, 1]]
        texts = [f"{i}. {r['caption']}" for i,r in enumerate(regions)] or ['an empty yard']
        told[fact['name']] = dict(duration=fact['duration_s'], timestamps=spoken[::-1], sentences=texts[::-1])
    write_new(tmp_path/'told.json', told)
    made = from_boxes_and_captions(read_box_pickle(box_file(tmp_path/'boxes.pkl', items)), read_narration(tmp_path/'told.json'))
    assert [m['f_path'] for m in made]==[i['f_path'] for i in items]
    for m,i,fact in zip(made, items, facts['videos']):
        if fact['regions'] and fact['regions'][0]['mode']=='gapoff': continue      # made as `off`, read as `split`
        assert [r['caption'].split('. ', 1)[1] for r in m['bbox_info']]==[r['caption'] for r in i['bbox_info']]
        assert m['global_caption']==' '.join(told[fact['name']]['sentences'][::-1][:3])

def test_a_lone_box_can_keep_its_frame(sample, tmp_path):
    boxes = read_box_pickle(box_file(tmp_path/'boxes.pkl', sample[0]))
    lone = [r for f,b in boxes.values() for r in box_tracks(f, b, lone_enabled=True) if len(r['keyframes'])==1]
    assert lone and all(Track.from_region(r).at([r['start_frame']])[1].all() for r in lone)

def test_output_is_never_overwritten(tmp_path):
    write_new(tmp_path/'a.json', {'x': 1})
    with pytest.raises(DataError, match='may hold annotation'): write_new(tmp_path/'a.json', {})
    assert json.loads((tmp_path/'a.json').read_text())=={'x': 1}

class Attack:
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f, self.args

class Plain: "A class without harm, refused all the same"

@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL+1))
@pytest.mark.parametrize('where', ['top', 'key', 'row', 'number'])
def test_a_malicious_pickle_is_refused_by_name(tmp_path, protocol, where):
    mark = tmp_path/'ran'
    bad = Attack(open, str(mark), 'w')
    data = dict(top=bad, key={bad: []}, row={'Abuse001_x264': [bad]}, number={'Abuse001_x264': [['image_0001.jpg', 1, 2, bad, 4]]})[where]
    (tmp_path/'evil.pkl').write_bytes(pickle.dumps(data, protocol))
    with pytest.raises(DataError, match=r'evil.pkl, byte \d+: asks for the class (_?io).open'): read_box_pickle(tmp_path/'evil.pkl')
    assert not mark.exists()

@pytest.mark.parametrize('data,says', [
    (pickle.dumps(Plain(), 2), 'Plain'), (pickle.dumps(np.zeros(2)), 'numpy'), (b"cos\nsystem\n(S'true'\ntR.", 'os.system'), (b"(ios\nsystem\n.", 'os.system'), (b"(S'x'\nios\nsystem\n.", 'os.system'),
    (b'\x80\x04\x8c\x02os\x8c\x06system\x93.', 'os.system'), (b"S'x'\n(tR.", 'REDUCE'), (b"Pid\n.", 'PERSID'), (b"\x82\x01.", 'EXT1'), (b"}}b.", 'BUILD'), (b"(o.", 'OBJ')])
def test_every_way_to_an_object_is_closed(tmp_path, data, says):
    (tmp_path/'evil.pkl').write_bytes(data)
    with pytest.raises(DataError, match=f'evil.pkl, byte .*{says}'): read_plain_pickle(tmp_path/'evil.pkl')

def test_damaged_pickles_are_one_line_errors(tmp_path):
    whole = pickle.dumps({'Abuse001_x264': [['image_0001.jpg', 1, 2, 30, 40]]*3}, 0)
    rng = np.random.default_rng(0)
    for i in range(300):
        data = bytearray(whole[:rng.integers(1, len(whole))] if i%2 else whole)
        if not i%2: data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path/'bad.pkl').write_bytes(bytes(data))
        try: read_box_pickle(tmp_path/'bad.pkl')
        except DataError as e: assert str(e).startswith(str(tmp_path/'bad.pkl')) and '\n' not in str(e)
    with pytest.raises(DataError, match='nowhere.pkl: cannot be read'): read_plain_pickle(tmp_path/'nowhere.pkl')

def test_bad_rows_are_skipped_only_on_request(tmp_path):
    rows = [['image_0001.jpg', 1, 2, 30, 40], ['image_0017.jpg', 30, 2, 1, 40], ['image_0033.jpg', 1, 2, 30, 400]]
    (tmp_path/'b.pkl').write_bytes(pickle.dumps({'Abuse001_x264': rows}, 0))
    with pytest.raises(DataError, match=r'b.pkl, Abuse001_x264, row 1, frame 17, .*x2 .* must be greater'): read_box_pickle(tmp_path/'b.pkl')
    with pytest.warns(DataWarning, match='left out as no boxes: 2'): assert read_box_pickle(tmp_path/'b.pkl', skip_bad=True)['Abuse001_x264'][0].tolist()==[0]

def test_both_truths_agree(sample, tmp_path):
    "Regions written as an annotation give the segments that the regions give"
    (tmp_path/'r.json').write_text(json.dumps(sample[0]))
    clips = read_regions(tmp_path/'r.json')
    segments = truth_segments(clips)
    write_new(tmp_path/'t.json', {k: {'class': 'Normal' if not s else 'Crime', 'segments': [list(p) for p in s]} for k,s in segments.items()})
    assert truth_segments(read_annotation(tmp_path/'t.json'))==segments
