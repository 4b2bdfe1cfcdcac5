"Records of results: each kind there and back, two runs on one page, two videos refused, and what a stranger may write"
import hashlib, json, weakref
import numpy as np, pytest
from vadnb.core import CheckpointError, ConfigError, DataError, VadnbError, VideoError
from vadnb.data.video import VideoReader, numbered_frames, write_video
from vadnb.results.arrays import array_file, digest_of
from vadnb.results.images import ImagePredictions
from vadnb.results.image import ImagePrediction
from vadnb.results.lanes import MOST_BARS, lane_figure, packed
from vadnb.results.layers import KINDS, Boxes, Classes, Curve, Heat, Map, Segments, UnknownLayer
from vadnb.results.playback import at_each_frame
from vadnb.results.record import Result, Source, read_record, write_record
from vadnb.results.saving import save_results, signed_results
from vadnb.results.thresholds import Thresholds
from vadnb.results.video import VideoPrediction

rng = np.random.default_rng(0)
run = Source('scorer', 'one', 'step-000100')
of_video = dict(anomaly=Curve(rng.normal(size=12)*1e-7, .5), flat=Curve([0]*12),
                found=Segments([(0, 12, 'a "b" </script>', -3.5), (4, 9), (4, 9, 'again', None)]), nothing=Segments([]),
                frames=Classes(['Straße', 'x'], rng.random((12, 2))),
                clips=Classes(['x'], [[1], [0]], [(0, 8), (4, 12)]),
                heat=Heat(rng.normal(size=(3, 4, 5)), [0, 5, 11], (-1, 2.5)),
                where=Boxes([(0, 12, (0, 0, 1, 1)), (1, 2, (.1, .2, .3, .4), 'a', .5)]))
of_image = dict(anomaly=Curve([3.25], 2), map=Map(rng.normal(size=(6, 7)), (0, 1), .5),
                where=Boxes([(0, 1, (0, .5, .5, 1), None, 3.)]),
                kind=Classes(['a', 'b'], [[.25, .75]]))

def video(layers=None, source=run, **facts):
    return Result(**dict(name='a.mp4', frames=12, fps=25.) | facts, layers=layers, source=source)

# ---------------------------------------------------------------- there and back

def test_every_kind_comes_back_as_itself(tmp_path):
    said = video(of_video, times=[i/25 for i in range(12)], width=320, height=240, sha256='0'*64)
    shown = Result('part/b.png', layers=of_image, source=dict(run='two'), width=9, height=8)
    assert {v.kind for v in [*said.layers().values(), *shown.layers().values()]}==set(KINDS)
    for name,result in (('v', said), ('i', shown)):
        files = write_record(tmp_path/f'{name}.layers.json', result)
        back = read_record(files[-1])
        assert back==result and list(back.layers())==list(result.layers()) and back.facts==result.facts
        for key,layer in result.layers().items():
            if layer.array() is not None: assert (back.layers()[key].array()==layer.array()).all()
        again = write_record(tmp_path/'again'/f'{name}.layers.json', back)
        assert [f.read_bytes() for f in again]==[f.read_bytes() for f in files]

def test_the_record_is_as_written_down():
    row = video(dict(found=of_video['found'], heat=of_video['heat'])).record()
    assert list(row)==['format', 'video', 'layers'] and row['format']=='vadnb-layers/1'
    assert list(row['video'])==['name', 'frames', 'fps', 'width', 'height', 'times', 'sha256']
    assert row['layers'][0]['source']==dict(system='scorer', run='one',
                                            checkpoint='step-000100') and row['layers'][0]['kind']=='segments'
    assert list(Result('a.png').record()['image'])==['name', 'width', 'height', 'sha256']

# ---------------------------------------------------------------- joining

def test_two_runs_of_one_system_keep_both():
    a,b = (video(dict(anomaly=Curve([k]*12)), Source('scorer', run)) for k,run in ((0, 'one'), (1, 'two')))
    page = a|b
    assert [(s.run, n, v.scores[0]) for (s,n),v in page.layers().items()]==[('one', 'anomaly', 0),
    ('two', 'anomaly', 1)]
    assert len(a.layers())==1 and (page|a)==page and (a|a)==a
    # the same source with something else to say would have to change what is there
    with pytest.raises(DataError, match='is said twice'):
        page|video(dict(anomaly=Curve([2]*12)), Source('scorer', 'one'))

@pytest.mark.parametrize('facts,says', [(dict(name='b.mp4'), 'differ in name'), (dict(frames=13), 'differ in frames'),
                                        (dict(fps=24), 'differ in fps'), (dict(width=640), 'differ in width'),
                                        (dict(sha256='1'*64), 'differ in sha256'),
                                        (dict(times=[0]*12), 'differ in times'),
                                        (dict(frames=None, fps=None), 'differ in kind')])
def test_two_videos_are_not_one(facts, says):
    known = video(width=320, sha256='0'*64, times=[i/25 for i in range(12)])
    with pytest.raises(DataError, match=says): known|video(**facts)

def test_what_one_does_not_know_the_other_adds():
    page = video(sha256='0'*64)|video(width=320, height=240)
    assert (page.facts['sha256'], page.facts['width'], page.facts['times'])==('0'*64, 320, None)

# ---------------------------------------------------------------- a stranger's file

@pytest.fixture
def stranger(tmp_path):
    "Change the record of everything, and read it"
    write_record(tmp_path/'a.layers.json', video(of_video))
    def change(path, value):
        row = json.loads((tmp_path/'a.layers.json').read_text())
        *way,last = [int(k) if k.isdigit() else k for k in path.split('/')]
        at = row
        for k in way: at = at[k]
        if value is KeyError: del at[last]
        else: at[last] = value
        (tmp_path/'b.layers.json').write_text(json.dumps(row))
        return read_record(tmp_path/'b.layers.json')
    return change

places = list(of_video)
def at(name, field): return f'layers/{places.index(name)}/{field}'

@pytest.mark.parametrize('path,value,says', [
    ('format', 'vadnb-layers/2', "'format' must be 'vadnb-layers/1'"), ('format', KeyError, "'format' must be"),
                                             ('format', 1, "'format' must be"), ('video', [], 'must be an object'),
    ('video', KeyError, "'video' is missing"), ('layers', KeyError, "'layers' is missing"),
                                             ('layers', 'abc', 'must be a list'), ('layers/0', 7, 'must be an object'),
                                             ('lyers', [], "did you mean 'layers'"),
    ('video/name', '../../a.mp4', 'without ..'), ('video/name', '/etc/a.mp4', 'below a folder'),
                                             ('video/name', 3, 'must be a text'),
                                             ('video/frames', True, 'whole number'),
    ('video/frames', 12.5, 'whole number'), ('video/frames', 10**400, 'whole number'),
                                             ('video/frames', None, 'whole number'),
                                             ('video/fps', '25', 'finite number'), ('video/fps', 0, 'finite number'),
    ('video/fps', 10**400, 'finite number'), ('video/width', -1, 'whole number'),
                                             ('video/times', [0, 1], 'a list of 12'),
                                             ('video/times', [1]*11+[0], 'must not fall'),
                                             ('video/sha256', 'abc', '64 hex'),
    ('video/path', '/etc/passwd', "'path' is unknown"), (at('anomaly', 'scores'), [.5]*11,
                                                         'one per frame, 12, found 11'),
                                             (at('anomaly', 'scores'), [True]*12, 'numbers only'),
    (at('anomaly', 'scores'), ['1']*12, 'numbers only'), (at('anomaly', 'scores'), [1e39]*12, 'finite'),
                                             (at('anomaly', 'scores'), [10**400]*12, '32 bits'),
                                             (at('anomaly', 'scores'), {}, 'a list of numbers'),
    (at('anomaly', 'threshold'), 'high', 'finite number'), (at('anomaly', 'scroes'), [], "did you mean 'scores'"),
                                             (at('anomaly', 'name'), '', 'a text'),
                                             (at('anomaly', 'name'), 'flat', 'is said twice'),
    (at('anomaly', 'source'), 'me', 'must be an object'), (at('anomaly', 'source/run'), 3, 'a text'),
                                             (at('anomaly', 'source/user'), 'x', "'user' is unknown"),
                                             (at('anomaly', 'kind'), ['curve'], 'a text'),
    (at('found', 'segments/0/end'), 13, 'beyond the 12 frames'), (at('found', 'segments/0/end'), 0,
    'whole number from 1'), (at('found', 'segments/0/start'), -1, 'whole number'),
                                             (at('found', 'segments/0/score'), [], 'finite'),
    (at('frames', 'probabilities/0/0'), 1.5, 'from 0 to 1'), (at('frames', 'classes'), ['x', 'x'],
                                                              'none of them twice'), (at('clips', 'spans'), None,
    'one row per frame'), (at('clips', 'spans/1/1'), 99, 'beyond'),
    (at('heat', 'frames'), [0, 5, 12], 'beyond'), (at('heat', 'frames'), [0, 5, 5], 'must rise'),
                                             (at('heat', 'scale'), [1, 0], 'must rise'),
                                             (at('heat', 'maps'), [[[1]]], "'maps' is unknown"),
    (at('heat', 'file'), KeyError, 'must be an object'), (at('heat', 'file/name'), '../a.layers.npz',
                                                          'beside the record'), (at('heat', 'file/name'), '/etc/a.npz',
    'beside the record'),
    (at('heat', 'file/name'), '..\\a.npz', 'beside the record'), (at('heat', 'file/name'), 'gone.npz', 'is not there'),
                                             (at('heat', 'file/name'), 'a.layers.json', 'beside the record'),
                                             (at('heat', 'file/array'), '../x', 'no array'),
    (at('heat', 'file/sha256'), '0'*64, 'sha256 differs'), (at('heat', 'file/sha256'), None, '64 hex'),
                                             (at('heat', 'file/shape'), [3, 4, 6], 'says'),
                                             (at('heat', 'file/shape'), [10**9, 10**9, 10**9], 'must be'),
    (at('heat', 'file/shape'), [3, 4, -5], 'whole number'), (at('where', 'boxes/0/box'), [0, 0, 1, 2], 'from 0 to 1'),
                                             (at('where', 'boxes/0/box'), [.5, 0, .5, 1], 'width and a height')])
def test_one_error_that_names_file_and_field(stranger, path, value, says):
    with pytest.raises(DataError, match=says.replace('[', '\\[')) as e: stranger(path, value)
    assert '.layers.' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('text', ['', '[]', '3', '{"format": NaN}', '{"format": "vadnb-layers/1", "format": "x"}',
                                  '['*100_000, '{"format": "vadnb-layers/1", "video": {"fps": 1e999}}', '\x00', 'null'])
def test_what_is_no_record_is_one_error(tmp_path, text):
    (tmp_path/'a.layers.json').write_text(text)
    with pytest.raises(DataError, match='a.layers.json'): read_record(tmp_path/'a.layers.json')

def test_infinity_hides_nowhere(tmp_path):
    for where in ('"scores": [1e999]', '"pitch": {"deep": [1, 1e999]}'):
        kind = 'curve' if 'scores' in where else 'sound'
        video_row = json.dumps(Result('a', 1, 1).record()['video'])
        layer = f'{{"name": "x", "kind": "{kind}", "source": {{}}, "threshold": null, {where}}}'
        text = f'{{"format": "vadnb-layers/1", "video": {video_row}, "layers": [{layer}]}}'
        (tmp_path/'a.layers.json').write_text(text)
        with pytest.raises(DataError, match='finite'): read_record(tmp_path/'a.layers.json')

@pytest.mark.parametrize('data', [b'', b'PK\x03\x04 no zip', array_file(layer_6=np.array([None]*60).reshape(3, 4, 5)),
                                  array_file(layer_6=np.full((3, 4, 5), np.nan)),
                                  array_file(layer_6=np.zeros((3, 4, 5), 'U3')), array_file(other=np.zeros((3, 4, 5)))])
def test_arrays_of_another_kind(tmp_path, data):
    record = write_record(tmp_path/'a.layers.json', video(of_video))[-1]
    row = json.loads(record.read_text())
    (tmp_path/'a.layers.npz').write_bytes(data)
    with pytest.raises(DataError, match='sha256 differs'): read_record(record)
    row['layers'][places.index('heat')]['file']['sha256'] = hashlib.sha256(data).hexdigest()
    record.write_text(json.dumps(row))
    with pytest.raises(DataError): read_record(record)

def test_a_link_leads_nowhere_else(tmp_path):
    (tmp_path/'in').mkdir()
    record = write_record(tmp_path/'in'/'a.layers.json', video(of_video))[-1]
    (tmp_path/'in'/'a.layers.npz').rename(tmp_path/'secret.npz')
    (tmp_path/'in'/'a.layers.npz').symlink_to(tmp_path/'secret.npz')
    with pytest.raises(DataError, match='leads outside'): read_record(record)

def test_unknown_kinds_are_kept(stranger, tmp_path):
    sound = dict(name='noise', kind='sound', source=dict(system='ear', run=None, checkpoint=None),
                 pitch=[440, None, {'a': 'b'}])
    page = stranger(at('flat', 'name'), 'flat')
    page.add(Source('ear'), 'noise', UnknownLayer('sound', dict(pitch=sound['pitch'])))
    back = read_record(write_record(tmp_path/'c.layers.json', page)[-1])
    assert back.record()['layers'][-1]==sound and back==page and (video(of_video)|back).record()['layers'][-1]==sound

# ---------------------------------------------------------------- predictions

def test_a_video_prediction_knows_its_file(tmp_path):
    path = write_video(tmp_path/'in'/'a.mp4', numbered_frames(12), 25, times=np.cumsum([0, *[.04, .04, .2]*4][:12]))
    s,reader = np.linspace(0, 1, 12), VideoReader(path)
    p = VideoPrediction('a.mp4', path, reader.fps, ['normal', 'x'], np.stack([1-s, s], 1), .5, rng.random((2, 3, 4)),
                        [2, 9], source=dict(system='s', run='r'))
    files = p.save(tmp_path/'out')
    back = read_record(tmp_path/'out'/'a.layers.json')
    assert (back.facts['width'], back.facts['height'])==reader.size[::-1] and back.facts['sha256']==digest_of(path)
    np.testing.assert_allclose(back.facts['times'], reader.timestamps-reader.timestamps[0])
    assert [n for _,n in back.layers()]==['anomaly', 'segments', 'classes', 'heat', 'boxes'] and {s for s,
    _ in back.layers()}=={Source('s', 'r')}
    assert tmp_path/'out'/'a.layers.json' in files and back.layers()[Source('s', 'r'),
    'anomaly']==p.layers()[Source('s', 'r'), 'anomaly']
    # the same video by another run is the same page; a copy with other bytes is not
    assert len((back|VideoPrediction('a.mp4', path, reader.fps, ['normal', 'x'], np.stack([1-s, s], 1),
                                     .9)).layers())==8
    lost = VideoPrediction('a.mp4', tmp_path/'gone.mp4', 25, ['normal', 'x'], np.stack([1-s, s], 1), .5)
    lost.save(tmp_path/'lost')
    assert [read_record(tmp_path/'lost'/'a.layers.json').facts[k] for k in ('width', 'height', 'times',
    'sha256')]==[None]*4

def test_image_predictions_know_their_files(tmp_path):
    from PIL import Image
    limits,items = Thresholds(2, .5, .1, 99), []
    for i in range(2):
        path = tmp_path/'in'/f'{i}'/'a.png'
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)).save(path)
        items.append(ImagePrediction(f'{i}/a.png', path, (8, 9), rng.random((4, 4)), 2, 1.5+i, limits, dict(run='r')))
    found = ImagePredictions(tmp_path/'in', items)
    found.save(tmp_path/'out')
    for p in found:
        back = read_record(tmp_path/'out'/'maps'/p.name.replace('.png', '.layers.json'))
        assert back.layers()==p.layers() and back.facts==dict(name=p.name, width=9, height=8, sha256=digest_of(p.path))
    with pytest.raises(DataError, match='differ in name'): found[0]|found[1]
    assert [r['image']['name'] for r in found.record()]==['0/a.png', '1/a.png']

def test_a_video_whose_name_would_claim_the_record_of_another(tmp_path):
    p = VideoPrediction('a.layers.mp4', tmp_path/'gone.mp4', 25, ['normal', 'x'], np.full((3, 2), .5), .5)
    with pytest.raises(VadnbError, match="layers of 'a'"): p.save(tmp_path)
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------- whose they are

def test_only_what_nobody_signed_is_signed():
    mixed = video({'found': of_video['found'], (Source('ear'), 'noise'): of_video['flat']}, source=None, path='a.mp4')
    signed = mixed.from_source('scorer', 'one', 'step-000100')
    assert list(signed.layers())==[(run, 'found'), (Source('ear'), 'noise')] and signed.path=='a.mp4'
    assert list(mixed.layers())[0]==(Source(), 'found') and signed.from_source('other')==signed
    with pytest.raises(DataError, match='source, run: must be a text'): mixed.from_source(run=3)

class Drawn(Result):
    "A system may add to a plain result"
    def summary(self): return ['of its own']

def test_a_result_of_its_own_stays_what_it_is():
    signed = Drawn('a.mp4', 12, 25., of_video).from_source('scorer')
    assert type(signed) is Drawn and signed.summary()==['of its own'] and len(signed.layers())==len(of_video)

# ---------------------------------------------------------------- plain results

def test_a_system_with_segments_has_picture_and_record(tmp_path):
    path = write_video(tmp_path/'in'/'a.mp4', numbered_frames(12), 25)
    said = Result('part/a.mp4', 12, 25., dict(found=of_video['found']), path=path).from_source('detector', 'one')
    files = said.save(tmp_path/'out')
    assert [f.relative_to(tmp_path/'out').as_posix() for f in files]==['part/a.png', 'part/a.layers.json']
    assert files==said.files(tmp_path/'out') and files[0].read_bytes()[:4]==b'\x89PNG'
    back = read_record(files[-1])
    assert back.layers()==said.layers() and back.facts['sha256']==digest_of(path) and back.facts['width']
    assert str(tmp_path) not in files[-1].read_text()
    before = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in said.save(tmp_path/'out')]==before
    for other in (Result('a.mp4', 12, 25.), Result('a.png', path=tmp_path/'a.png')):
        with pytest.raises(ConfigError, match='no overlay'): other.save(tmp_path/'out', overlay=True)

def test_the_video_is_played_again_with_what_is_said(tmp_path):
    frames,times = list(rng.integers(0, 255, (12, 34, 50, 3), dtype=np.uint8)), np.cumsum([0, *[.04, .04, .2]*4][:12])
    path = write_video(tmp_path/'a.mkv', frames, 25, times=times, pix_fmt='yuv444p')
    reader = VideoReader(path)
    said = Result('a.mkv', 12, reader.fps, of_video, path=path)
    film,*rest = said.save(tmp_path/'out', overlay=True)
    assert [f.name for f in (film, *rest)]==['a_overlay.mp4', 'a.png', 'a.layers.npz', 'a.layers.json']
    drawn = VideoReader(film)
    assert len(drawn)==12 and drawn.size[1]==50 and drawn.size[0]>34
    np.testing.assert_allclose(drawn.timestamps, reader.timestamps, atol=2e-3)
    gone = Result('a.mkv', 12, 25., of_video, path=tmp_path/'gone.mkv')
    with pytest.raises(VideoError, match='gone.mkv'): gone.save(tmp_path/'none', overlay=True)
    assert not (tmp_path/'none').exists()

def test_playing_asks_few_boxes():
    rows = sorted((int(a), int(a+n)) for a,n in zip(rng.integers(0, 90, 60), rng.integers(1, 30, 60)))
    for i,held in enumerate(at_each_frame(rows, 120)):
        assert held==[r for r in rows if r[0]<=i<r[1]]

def test_what_a_system_says_of_its_file_stays(tmp_path):
    path = write_video(tmp_path/'a.mp4', numbered_frames(12), 25, times=np.cumsum([0, *[.04, .04, .2]*4][:12]))
    times = [float(t) for t in range(12)]
    said = video(dict(flat=of_video['flat']), path=path, times=times, width=7)
    told = read_record(said.save(tmp_path/'out')[-1]).facts
    assert (told['times'], told['width'], told['sha256'])==(times, 7, digest_of(path))
    assert said.facts['sha256'] is None

def test_a_plain_result_damages_nothing(tmp_path):
    path = write_video(tmp_path/'a.mp4', numbered_frames(12), 25)
    with pytest.raises(DataError, match='has 12 frames, the prediction 13'):
        Result('a.mp4', 13, 25., path=path).save(tmp_path/'out')
    (tmp_path/'a.png').write_bytes(path.read_bytes())
    with pytest.raises(DataError, match='would be written over'):
        video(dict(flat=of_video['flat']), path=tmp_path/'a.png').save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir())==['a.mp4', 'a.png']

def test_lanes_of_everything(tmp_path):
    fig = lane_figure(video(of_video)|video(dict(found=Segments([(0, 12, 'x')])), Source('scorer', 'two')))
    assert [ax.get_ylabel().split('\n')[0] for ax in fig.axes]==['anomaly', 'flat', 'found', 'nothing', 'frames', 'clips',
                                                                  'found']
    assert all('scorer' in ax.get_ylabel() for ax in fig.axes) and fig.axes[0].get_xlim()==(0, 12)
    assert lane_figure(Result('b.png', layers=of_image)) is None and lane_figure(video(dict(h=of_video['heat']))) is None

def test_thousands_of_detections_are_a_picture():
    a = rng.integers(0, 9000, 3000)
    rows = [(int(s), int(s)+int(n), f'c{k%30}', float(p)) for k,(s,n,p) in
            enumerate(zip(a, rng.integers(1, 900, 3000), rng.random(3000)))]
    fig = lane_figure(Result('a.mp4', 10_000, 25., dict(found=Segments(rows))))
    assert f'{MOST_BARS} of 3000' in fig.axes[0].get_ylabel() and fig.get_figheight()<8
    assert max(packed([r[:2] for r in rows]))<3000

# ---------------------------------------------------------------- saved as they come

def made(name, n=12, **layers): return Result(name, n, 25., layers or dict(anomaly=Curve([0]*n)))

def test_in_order_with_errors_in_their_place(tmp_path):
    lost = VideoError('b.mp4: cannot be decoded')
    results = signed_results([made('a.mp4'), lost, made('sub/c.mp4')], 'scorer', 'one', 'step-000100')
    a,b,c = save_results(results, 'in', tmp_path)
    assert (a.error, b, c.error)==(None, ([], [], lost), None)
    assert [f.relative_to(tmp_path).as_posix() for f in c.files]==['sub/c.png', 'sub/c.layers.json']
    assert c.lines==['sub/c.mp4: 12 frames', '  anomaly, scorer one step-000100: 12 values from 0 to 0']
    assert {s for s,_ in read_record(a.files[-1]).layers()}=={run}

def test_two_of_one_name_are_refused_before_anything_is_written_over(tmp_path):
    a,b = save_results([made('a.mp4'), made('a.avi', 9)], 'in', tmp_path)
    assert isinstance(b.error, DataError) and "'a.mp4' and 'a.avi' would both be written to" in str(b.error)
    assert read_record(a.files[-1]).facts['frames']==12 and '\n' not in str(b.error)
    # also when they come from two sources that share the folder
    written = {}
    one, = save_results([made('a.mp4')], 'in', tmp_path, written=written)
    two, = save_results([made('a.avi')], 'more', tmp_path, written=written)
    assert one.error is None and 'would both be written' in str(two.error)

def test_a_folder_that_cannot_be_written_ends_it(tmp_path):
    (tmp_path/'out').write_text('')
    with pytest.raises(CheckpointError): list(save_results([made('a.mp4'), made('b.mp4')], 'in', tmp_path/'out'))

def test_maps_do_not_pile_up(tmp_path):
    alive = []
    def results():
        for k in range(4):
            assert not any(r() for r in alive)
            heat = Heat(np.zeros((3, 4, 4)), [0, 1, 2])
            alive.append(weakref.ref(heat))
            res = made(f'{k}.mp4', heat=heat)
            del heat
            yield res
            del res
    # `dict` keeps no result either: only names and paths are remembered
    assert len(list(save_results(signed_results(results(), 's'), 'in', tmp_path, written={})))==4

def test_maps_are_left_where_they_are_when_nobody_shows_them(tmp_path):
    maps,record = write_record(tmp_path/'a.layers.json', video(of_video))
    maps.unlink()
    assert [n for _,n in read_record(record, maps=False).layers()]==[n for n in of_video if n!='heat']
    with pytest.raises(DataError, match='is not there'): read_record(record)
