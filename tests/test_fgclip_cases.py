"Small inputs on which others fail: every file of cases/fgclip, and its kind without a file, gives the right behaviour"
import json, shutil, warnings
import numpy as np, pytest, torch
from PIL import Image
from vadnb.core import DataError, DataWarning, VideoError, write_json
from vadnb.data.annotation import AnnotatedVideo
from vadnb.data.clip_frames import VideoSource
from vadnb.data.picture_numbers import number_faults
from vadnb.data.regions import read_regions
from vadnb.data.segments import ActionVideo
from vadnb.data.time_grid import ClipForm
from vadnb.data.ucf_crime import AnnotatedClips, RegionClips, collate, read_annotation
from vadnb.data.video import VideoReader, numbered_frames, probe, write_video
from vadnb.train.verify import readable_row

FORM = ClipForm(window=16, stride=1, size=(24, 24), short_side=28)
GAP = '2 numbers are missing, the first between img_00006.png and img_00009.png'

def tokenize(texts): return torch.tensor([[len(t), 1] for t in texts]).reshape(len(texts), 2)

def pictures(folder, names, size=(64, 96)):
    folder.mkdir()
    for name,x in zip(names, numbered_frames(len(names), size)): Image.fromarray(x).save(folder/name)
    return folder

def test_every_file_of_the_folder_is_used(shared):
    "edit_cut.mp4 and cut.ts are used in test_video"
    here = open(__file__).read()+(open(__file__.replace('fgclip_cases', 'video')).read())
    assert [p.name for p in sorted((shared/'cases'/'fgclip').iterdir()) if p.name not in here]==[]

# ---------------------------------------------------------------- pictures in a folder

def test_a_gap_is_a_problem_and_no_event_is_matched_across_it(shared, tmp_path):
    folder = shared/'cases'/'fgclip'/'seq_gap'
    assert probe(folder).problems==[GAP]
    shutil.copytree(folder, tmp_path/'Abuse001_x264'); shutil.copytree(folder, tmp_path/'Normal_Videos001_x264')
    both = {'Abuse001_x264': AnnotatedVideo('Abuse', ((8, 12),)), 'Normal_Videos001_x264': AnnotatedVideo('Normal', ())}
    clips = AnnotatedClips(both, tmp_path, 4, (64, 64))
    for ask in (clips.check, clips.__getitem__):
        with pytest.raises(DataError, match=f'Abuse001_x264: {GAP}: events are annotated by frame'): ask(0)
    assert clips[1]['n_frames']==18 and clips.notes(1)==[f'{tmp_path/"Normal_Videos001_x264"}: {GAP}']
    name,holds,says = readable_row('valid', clips, '')
    assert holds is False and GAP in says
    # detection of actions: a time is the place of a picture
    source = VideoSource(dict(a=folder), FORM)
    with pytest.raises(DataError, match=GAP): source.lay(ActionVideo('a', fps=10., events=(('x', .8, 1.2),)))
    assert VideoSource(dict(a=folder), FORM).lay(ActionVideo('a', fps=10.)).notes==(f'{folder}: {GAP}',)

def test_regions_are_not_drawn_on_other_pictures(shared, tmp_path):
    shutil.copytree(shared/'cases'/'fgclip'/'seq_gap', tmp_path/'Abuse001_x264')
    region = dict(caption='a man', start_frame=0, end_frame=9, keyframes=[dict(frame=0, bbox=[.1, .1, .5, .5], enabled=True)])
    write_json(tmp_path/'train.json', [dict(f_path='Abuse001_x264', global_caption='x', bbox_info=[region])])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DataWarning)
        clips = RegionClips(tmp_path/'train.json', tmp_path, 4, (64, 64), tokenize)
    with pytest.raises(DataError, match=GAP): clips.draw(0, np.random.default_rng(0))

@pytest.mark.parametrize('names,says', [
    ([f'img_{i:05d}.png' for i in range(1, 5)]+[f'depth_{i:05d}.png' for i in range(1, 5)], '2 series of pictures lie in one folder: depth_00001.png … (4), img_00001.png … (4)'),
    ([f'img_{i:05d}.png' for i in range(7, 12)], 'the first is img_00007.png, and not 0 or 1'),
    (['cover.png', '1.png', '2.png'], '2 series of pictures lie in one folder'),
    ([f'{i}.png' for i in range(0, 40, 10)], 'the numbers go in steps of 10')])
def test_other_folders_whose_numbers_are_not_places(tmp_path, names, says):
    folder = pictures(tmp_path/'a', names)
    problem, = probe(folder).problems
    assert problem.startswith(says)
    with pytest.raises(VideoError, match='events are annotated by frame'): VideoReader(folder).check_order()

@pytest.mark.parametrize('names', [[f'{i}.png' for i in range(4)], [f'v2_{i:03d}_x.png' for i in range(1, 5)], ['dawn.png', 'noon.png'], ['IMG_1.PNG', 'img_2.bmp']])
def test_numbers_that_are_places(names):
    assert number_faults(sorted(names))==[]

def test_mixed_sizes_are_told_before_they_are_met(tmp_path):
    folder = pictures(tmp_path/'Normal_Videos001_x264', [f'{i}.png' for i in range(9)])
    Image.new('RGB', (96, 32)).save(folder/'5.png')
    turned = Image.new('RGB', (64, 96)); exif = turned.getexif(); exif[0x0112] = 6
    turned.save(folder/'6.png', exif=exif) # lies on its side and is shown as large as the others
    problem, = probe(folder).problems
    assert problem=='1 of 9 pictures are not 64x96 as 0.png is, such as 5.png with 32x96'
    clips = AnnotatedClips({'Normal_Videos001_x264': AnnotatedVideo('Normal', ())}, tmp_path, 2, (64, 64))
    clips[0] # neither end is one of another size
    with pytest.raises(DataError, match='such as 5.png with 32x96; bring all frames to one size'): clips.check(0)
    with pytest.raises(DataError, match='such as 5.png with 32x96'): VideoSource(dict(a=folder), FORM).check(ActionVideo('a', fps=10.))

def test_clips_of_action_classification_say_it_too(tmp_path, capsys):
    from vadnb.data.action_sets import read_entries
    from vadnb.data.action_videos import ClipReader
    from vadnb.data.clip_views import FrameSampling
    from vadnb.systems.action_cls.data import Clips
    pictures((tmp_path/'wave').mkdir() or tmp_path/'wave'/'a', [f'{i}.png' for i in (0, 1, 2, 5, 6, 7)])
    clips = Clips(read_entries(tmp_path), ClipReader(FrameSampling(frames=2), lambda *words: ([0]*3, [-100]*3), picture_fps=10.))
    assert [n.split(': ')[1] for n in clips.notes(0)]==['2 numbers are missing, the first between 2.png and 5.png']
    clips.check(0)
    Image.new('RGB', (8, 8)).save(tmp_path/'wave'/'a'/'5.png')
    with pytest.raises(DataError, match='5.png with 8x8'): clips.check(0)

# ---------------------------------------------------------------- frame counts

@pytest.fixture(scope='module')
def counted(tmp_path_factory, shared):
    "The six videos of the list, one frame shorter than it says; the first of them is a real one"
    root = tmp_path_factory.mktemp('videos')
    shutil.copy(shared/'data'/'ucf_crime'/'clips'/'Fighting033_x264_570_841.mp4', root/'Fighting033_x264.mp4')
    for name,n in (('RoadAccidents133', 181), ('Burglary001', 36), ('Normal_Videos001', 150), ('Normal_Videos002', 150), ('Normal_Videos003', 150)): write_video(root/f'{name}_x264.mp4', numbered_frames(n))
    return root

def test_counts_one_off_are_noted_and_the_video_is_right(shared, counted):
    listed = shared/'cases'/'fgclip'/'frame_count_off_by_one.txt'
    clips = AnnotatedClips(listed, counted, 4, (64, 64))
    assert [int(clips[i]['n_frames']) for i in range(6)]==[271, 181, 36, 150, 150, 150]
    name,holds,says = readable_row('test', clips, 'all open')
    assert holds is None and says.startswith('all open; ') and says.count('; the video is right')==6 and 'gives 272 frames' in says
    assert len(clips.truth('Fighting033_x264', 271))==271

def test_all_counts_beyond_the_slack_are_in_one_list(shared, counted):
    clips = AnnotatedClips(shared/'cases'/'fgclip'/'frame_count_off_by_one.txt', counted, 4, (64, 64), frame_slack=0)
    name,holds,says = readable_row('test', clips, '')
    assert holds is False and says.count('marked in another encoding')==6
    wide = AnnotatedClips({'Burglary001_x264': AnnotatedVideo('Burglary', ((2, 31),), 39)}, counted, 4, (64, 64))
    with pytest.raises(DataError, match='gives 39 frames, .* has 36; the events were marked in another encoding'): wide[0]

def test_lists_of_other_projects_say_the_same(shared, tmp_path):
    "All 290 lines of the official list, written as ekosman and UR-DMU, VadCLIP and MIST have them"
    official = shared/'data'/'ucf_crime'/'Temporal_Anomaly_Annotation_for_Testing_Videos.txt'
    found,rows = read_annotation(official), [line.split() for line in official.read_text().splitlines() if line.strip()]
    folder = lambda r: 'Testing_Normal_Videos_Anomaly' if r[1]=='Normal' else r[1]
    for form in (lambda r: [f'{folder(r)}/{r[0]}', '99999', *r[1:]], lambda r: [r[0].removesuffix('.mp4'), *r[1:]], lambda r: [*r, '99999']):
        (tmp_path/'list.txt').write_text('\n'.join('  '.join(form(r)) for r in rows)+'\n')
        other = read_annotation(tmp_path/'list.txt')
        assert {k: (v.cls, v.segments) for k,v in other.items()}=={k: (v.cls, v.segments) for k,v in found.items()}
        assert {v.n_frames for v in other.values()}<={None, 99999}
    (tmp_path/'list.txt').write_text('Abuse/Abuse028_x264 0 1411 0\n')
    with pytest.raises(DataError, match='line 1: first frame, last frame and number of a class say nothing of when'): read_annotation(tmp_path/'list.txt')

def test_all_wrong_lines_of_a_list_are_told(tmp_path):
    (tmp_path/'list.txt').write_text('\n'.join(['a.mp4 Abuse 9 3 -1 -1', 'b.mp4 Abuse 1 2 -1 -1', 'c.mp4 Abuse', *(f'd{i}.mp4 Normal 1 2 -1 -1' for i in range(30))]))
    with pytest.raises(DataError) as told: read_annotation(tmp_path/'list.txt')
    said = str(told.value)
    assert said.startswith('32 errors: ') and 'line 1: the event 9 to 3' in said and 'line 3: has 2 columns' in said and 'line 2:' not in said
    assert said.count('a Normal video has none')==18 and said.endswith('; and 12 more') and '\n' not in said

# ---------------------------------------------------------------- boxes

@pytest.fixture(scope='module')
def yard(tmp_path_factory):
    root = tmp_path_factory.mktemp('yard')
    (root/'UCF_Crimes_Videos').mkdir()
    write_video(root/'UCF_Crimes_Videos'/'Abuse001_x264.mp4', numbered_frames(340))
    return root

def clips_of(path, root):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        clips = RegionClips(path, root, 16, (64, 96), tokenize)
    return clips, [str(w.message) for w in said if issubclass(w.category, DataWarning)]

def test_a_box_that_rounding_puts_outside_is_cut_and_counted(shared, yard):
    clips,said = clips_of(shared/'cases'/'fgclip'/'box_rounding.json', yard)
    assert clips.clips[0].tracks[0].boxes[1].tolist()==[.3, .5, 1., .9]
    note, = [w for w in said if 'leave [0, 1]' in w]
    assert '1 boxes leave [0, 1] by no more than 0.0001 and are cut at the border: Abuse001_x264, bbox_info[0]' in note
    assert clips.region_notes[0] in note and clips[0]['region_mask'].any()

def test_a_box_that_is_outside_is_refused(shared, yard):
    with pytest.raises(DataError, match=r'box_outside.json, item 0 \(Abuse001_x264\), bbox_info\[0\].keyframes\[0\].bbox: \[-0.0021, .*leaves \[0, 1\]'): clips_of(shared/'cases'/'fgclip'/'box_outside.json', yard)

def test_a_region_that_is_switched_off_has_no_frame(shared, yard):
    path = shared/'cases'/'fgclip'/'all_disabled.json'
    track, = read_regions_quietly(path)[0].tracks
    assert not track.at(np.arange(340))[1].any() and not track.sample([0, 200, 300])[1].any() and len(track.spans())==0
    clips,said = clips_of(path, yard)
    assert any('all keyframes of 1 regions are disabled, so they have no frame' in w for w in said)
    sample = clips.draw(0, np.random.default_rng(0))
    assert sample['region_box'].shape==(0, 16, 4) and len(sample['region_text'])==0 and collate([sample, clips[0]])['region_clip'].numel()==0
    assert not clips.truth('Abuse001_x264', 340).any()

def read_regions_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DataWarning)
        return read_regions(path)

def test_all_errors_of_a_file_are_one_message(shared, tmp_path):
    item = json.loads((shared/'cases'/'fgclip'/'box_outside.json').read_text())[0]
    bad = [json.loads(json.dumps(item)) for _ in range(30)]
    for i,b in enumerate(bad): b['f_path'] = f'Abuse{i:03d}_x264.mp4'
    bad[0]['bbox_info'][0]['keyframes'][1]['bbox'] = [.5, .5, .4, .9]
    bad[1]['bbox_info'].append(dict(bad[1]['bbox_info'][0], caption=''))
    bad[2]['global_caption'] = ' '
    write_json(tmp_path/'bad.json', bad)
    with pytest.raises(DataError) as told: read_regions(tmp_path/'bad.json')
    said = str(told.value)
    assert said.startswith('32 errors: ') and said.endswith('; and 12 more') and '\n' not in said
    for at in ('item 0 (Abuse000_x264), bbox_info[0].keyframes[0].bbox', 'item 0 (Abuse000_x264), bbox_info[0].keyframes[1].bbox: x2 0.4 must', 'item 1 (Abuse001_x264), bbox_info[1].keyframes[0].bbox', 'item 2 (Abuse002_x264), global_caption: is empty'): assert at in said
