"Annotation of actions and the clips read by it: what people report as broken, public files, and the same batches however they are loaded"
import json
from fractions import Fraction
import av
import numpy as np
import pytest
import torch
from vadnb.core import ConfigError, DataError
from vadnb.data.action_clips import ActionClips, ActionWindows, collate, on_clock
from vadnb.data.segments import ActionAnnotation, ActionVideo, check_decoder, read_actions
from vadnb.data.augmentation import ClipAugmentation
from vadnb.data.clip_frames import VideoSource
from vadnb.data.thumos import read_thumos, window_rows
from vadnb.data.time_grid import ClipForm, clip_words
from vadnb.data.video import VideoReader, write_video
from vadnb.train.feed import evaluation_batches
from vadnb.train.samples import DrawnSamples, SkippingCollate
from vadnb.train.system import Data, TrainConfig

def drawn(n, seed=0, height=36, width=48):
    "A bright square that wanders over a texture, its place a function of the frame"
    world = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    for i in range(n):
        x = world.copy()
        x[(2*i)%height:(2*i)%height+9, (3*i)%width:(3*i)%width+9] = 250
        yield x

LENGTHS = dict(a=150, b=40, c=96, d=30, e=61)
FORM = ClipForm(window=16, stride=2, size=(24, 24), short_side=28)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "(annotation, paths) of five small videos"
    folder = tmp_path_factory.mktemp('videos')
    paths = {k: write_video(folder/f'{k}.mp4', drawn(n, n), fps=25) for k,n in LENGTHS.items()}
    videos = {k: ActionVideo(k, 'train', n/25, n, events=(('run', .2, .9), ('jump', .5, .8))) for k,n in LENGTHS.items()}
    return ActionAnnotation('drawn.json', ['jump', 'run'], videos), paths

# ---------------------------------------------------------------- what was reported as broken
def case(shared, number):
    found, = (c for c in json.loads((shared/'cases/adatad/cases.json').read_text()) if c['id']==number)
    return shared/'cases/adatad'/found['input'] if 'input' in found else None

def test_an_unknown_subset_names_those_there_are(shared):
    with pytest.raises(DataError, match=r"01_empty_subset.json: the subset 'validation' holds no video; there are: train 1, test 1"):
        read_actions(case(shared, 1)).subset('validation')

def test_a_file_without_subsets_says_how_to_give_them(tmp_path):
    (tmp_path/'a.csv').write_text('video,start,end,label\na,1,2,jump\n')
    with pytest.raises(DataError, match="'training' holds no video; there are: without a name 1; give each video .* column 'subset'"):
        read_actions(tmp_path/'a.csv').subset('training')

def test_a_label_number_that_the_model_has_not_is_refused_by_name(shared):
    for how in (dict(num_classes=2), dict(classes=['hit', 'miss'])):
        with pytest.raises(DataError, match=r'clip_2 has label_id 2 \(hit\), and the configuration has 2 classes'): read_actions(case(shared, 2), **how)

def test_only_what_is_written_twice_in_full_goes(shared):
    a = read_actions(case(shared, 7))
    assert len(a.videos['clip'].events)==3 and a.dropped==[('clip', ('a', .1, .2), 'written twice')]

def test_a_window_that_chunks_do_not_fill_names_the_nearest():
    assert clip_words(192, 4)=='192 positions x 4 frames each = 768 frames = 48 chunks of 16'
    with pytest.raises(ConfigError, match='190 positions x 4 frames = 760 frames.*188 or 192'): ClipForm(window=190, frames_per_position=4)

def test_one_frame_is_a_note_and_one_in_a_hundred_an_error(shared):
    video = read_actions(case(shared, 9)).videos['clip']
    assert check_decoder(video, 'clip.mp4', 5090, 5090/30)==['clip: the annotation gives 5091 frames, clip.mp4 has 5090']
    with pytest.raises(DataError, match='gives 5091 frames, clip.mp4 has 5030'): check_decoder(video, 'clip.mp4', 5030, 5030/30)
    with pytest.raises(DataError, match='2040 frames and 68.00 s'): check_decoder(ActionVideo('clip', events=video.events), 'clip.mp4', 2040, 68.)

def test_the_clock_of_an_uneven_video_rules_over_a_nominal_rate(tmp_path):
    path = uneven(tmp_path/'a.mp4')
    video = ActionVideo('a', 'train', fps=25., events=(('x', .8, 1.8),))
    laid = VideoSource(dict(a=path), FORM).lay(video)
    assert not laid.clock.even and 'gives 25 frames per second' in laid.notes[0] and 'its own clock' in laid.notes[0]
    assert laid.to_grid([.8, 1.8]).tolist()==pytest.approx([10, 17.5])
    # what is wrong by its length is wrong at any rate
    with pytest.raises(DataError, match='gives 9 s'): VideoSource(dict(a=path), FORM).lay(ActionVideo('a', duration=9., fps=25.))

def test_a_video_that_stops_early_says_where_and_what_is_lost(shared):
    a = read_actions(case(shared, 10))
    source = VideoSource(dict(corrupted=shared/'data/video/decord/corrupted.mp4'), FORM)
    clips = ActionClips(a, ['corrupted'], source)
    said = r"corrupted: .*28 of 50 announced frames decode.*'b' from 1.1 to 1.5 s lies behind frame 28"
    with pytest.raises(DataError, match=said): clips.draw(0, np.random.default_rng(0))
    batch = SkippingCollate(collate)([DrawnSamples(clips, 0, 'skip')[0, 0]])
    assert list(batch)==['skipped'] and '28 of 50' in batch['skipped'][0].why
    windows = ActionWindows(a, ['corrupted'], source)
    for ask in (windows.check, lambda i: list(windows.stream(i))):
        with pytest.raises(DataError, match='28 of 50'): ask(0)
    with pytest.raises(DataError) as bare: source.lay(ActionVideo('corrupted'))
    assert '28 of 50' in str(bare.value) and 'segment' not in str(bare.value)
    # it has no window, so that the others can be dealt and read
    assert windows.pieces==[0]

# ---------------------------------------------------------------- public files
def test_the_public_annotation_of_thumos(shared):
    a = read_thumos(shared/'data/thumos14/opentad/thumos_14_anno.json', shared/'data/thumos14/opentad/category_idx.txt')
    held = {s: a.subset(s) for s in ('training', 'validation')}
    assert {s: (len(v), sum(len(x.events) for x in v.values())) for s,v in held.items()}==dict(training=(200, 3003), validation=(211, 3325))
    for reference,count in ((False, 791), (True, 792)):
        assert sum(len(window_rows(v.frames, 768, 4, .5, reference)) for v in held['validation'].values())==count
    # a class file with other numbers before the names gives the same classes in its order
    assert read_thumos(a.source, shared/'data/thumos14/afsd/Class_Index_Detection.txt').classes==a.classes

def test_windows_are_those_of_the_reference(shared):
    facts = json.loads((shared/'golden/adatad/thumos14_dataset.json').read_text())['facts']['test_windows']
    for overlap,found in facts.items():
        for rows in found['examples'].values():
            # the examples give first frame, last frame and length: the video is as long as its last window says
            frames = rows[-1][1]+1
            ours = window_rows(frames, 768, 4, float(overlap), reference=True)
            assert [[4*s, 4*(e-1), e-s] for s,e in ours.tolist()]==rows

@pytest.mark.parametrize('n', [1, 15, 16, 17, 24, 32, 33, 100, 767, 768, 769, 2304])
@pytest.mark.parametrize('overlap', [0, .25, .5, .9])
def test_windows_cover_all_and_none_comes_twice(n, overlap):
    rows = window_rows(3*n-1, 16, 3, overlap)
    assert len(set(map(tuple, rows.tolist())))==len(rows) and (np.diff(rows[:,0])>0).all()
    assert set(range(n))=={i for s,e in rows.tolist() for i in range(s, e)} and (rows[:,1]-rows[:,0]<=16).all()

def test_activitynet_without_a_database_around_it(shared):
    a = read_actions(shared/'data/activitynet/mmaction2_eval_localization/gt.json')
    assert len(a.videos)==2 and len(a.classes)==2 and {v.subset for v in a.videos.values()}=={'validation'}

# ---------------------------------------------------------------- time
def uneven(path):
    "60 frames, of which the second half comes three times as slowly"
    with av.open(str(path), 'w') as c:
        stream = c.add_stream('mpeg4', rate=25)
        stream.height,stream.width,stream.pix_fmt,stream.codec_context.time_base = 36, 48, 'yuv420p', Fraction(1, 1000)
        for i,x in enumerate(drawn(60)):
            frame = av.VideoFrame.from_ndarray(x, format='rgb24')
            frame.pts,frame.time_base = 40*i+80*max(0, i-30), Fraction(1, 1000)
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    return path

def test_a_video_of_uneven_rate_is_laid_by_its_clock(tmp_path):
    path = uneven(tmp_path/'a.mp4')
    assert VideoReader(path).info.variable_rate
    a = ActionAnnotation('a', ['x'], dict(a=ActionVideo('a', 'train', events=(('x', .8, 1.8),))))
    windows = ActionWindows(a, ['a'], VideoSource(dict(a=path), FORM))
    assert windows.events(0)[0].tolist()==pytest.approx(np.array([[10, 17.5]]))     # frame 20, and frame 30 + 0.6 s / 0.12 s
    x = list(windows.stream(0))[1]
    assert on_clock(x['segments'], x['clock']).tolist()==[pytest.approx([.8, 1.8])]

# ---------------------------------------------------------------- loading
class Videos(Data):
    collate = staticmethod(collate)
    def __init__(self, items): self.items = items
    def split(self, name): return self.items

def test_batches_are_the_same_in_any_number_of_workers_and_processes(world):
    annotation,paths = world
    def batches(processes, workers):
        # a fresh set, as every process makes it
        data = Videos(ActionWindows(annotation, paths, VideoSource(paths, FORM)))
        cfg = TrainConfig(batch_size=2, valid_batch_size=3, workers=workers)
        return [b for r in range(processes) for b in evaluation_batches(data, 'test', cfg, 'cpu', processes, r)]
    def content(bs): return sorted((b['name'], b['row'].tolist(), b['frames'].sum((1, 2, 3, 4)).tolist(), b['clock'].tolist()) for b in bs)
    alone = batches(1, 0)
    assert all(len(set(b['name']))==1 and len(b['name'])<=3 for b in alone)
    assert [n for b in alone for n in b['name']]==[n for n,k in zip('abcde', (9, 2, 5, 1, 3)) for _ in range(k)]
    for how in ((1, 2), (2, 0), (2, 1)): assert content(batches(*how))==content(alone), how
    single = ActionWindows(annotation, paths, VideoSource(paths, FORM))
    assert all(torch.equal(x, single[k]['frames']) for k,x in enumerate(x for b in alone for x in b['frames']))

def test_every_source_frame_is_asked_for_once(world, monkeypatch):
    annotation,paths = world
    asked,stream = [],VideoReader.stream
    monkeypatch.setattr(VideoReader, 'stream', lambda self, indices, *args, **how: asked.append(list(indices)) or stream(self, indices, *args, **how))
    list(ActionWindows(annotation, ['a'], VideoSource(paths, FORM)).stream(0))
    assert asked==[list(range(0, 150, 2))]

def test_a_sample_is_a_function_of_its_generator(world):
    annotation,paths = world
    clips = ActionClips(annotation, paths, VideoSource(paths, FORM, ClipAugmentation()))
    first = [clips.draw(i, np.random.default_rng([7, i])) for i in range(5)]
    torch.manual_seed(99), np.random.seed(99)
    for i in (4, 0, 3, 1, 2):
        again = clips.draw(i, np.random.default_rng([7, i]))
        assert all(torch.equal(v, again[k]) if isinstance(v, torch.Tensor) else v==again[k] for k,v in first[i].items())

def test_a_video_that_stops_early_says_by_which_clock(shared):
    path = shared/'data/video/decord/corrupted.mp4'
    # 28 frames last 2.8 s by the container, which may be wrong of its rate as of its frames
    for fps,events,said in ((None, (('b', 1.1, 1.5),), r'no segment is lost.*28, at 2.80 s by the 10 frames per second of the file; add fps'),
                            (None, (('b', 1.1, 2.9),), r'lies behind frame 28, at 2.80 s by the 10 .* of the file; add fps'),
                            (25., (('b', 1.1, 1.5),), r'lies behind frame 28, at 1.12 s by the 25 frames per second of the annotation$')):
        with pytest.raises(DataError, match=said):
            VideoSource(dict(a=path), FORM).lay(ActionVideo('a', 'train', fps=fps, events=events))
