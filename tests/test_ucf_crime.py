"Real UCF-Crime files through the readers: regions, official list, a real clip"
import json, warnings
from collections import Counter
import numpy as np, pytest, torch
from vadnb.core import DataError, DataWarning, write_json
from vadnb.data.annotation import candidate_paths, find_video, frame_truth, resolve_path, video_name
from vadnb.data.regions import read_regions, token_budget
from vadnb.data.tracks import Track
from vadnb.data.ucf_crime import (TEMPLATES, AnnotatedClips, RegionClips, class_folders, collate, read_annotation,
                                  video_class)

def tokenize(texts): return torch.tensor([[len(t), *t.encode()[:5].ljust(5)] for t in texts]).reshape(len(texts), 6)

@pytest.fixture(scope='module')
def sample(shared): return shared/'golden'/'fgclip'/'ucf_region_sample.json'

def test_real_regions(sample):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        clips = read_regions(sample)
    facts = json.loads(sample.with_name('ucf_region_sample_facts.json').read_text())
    tracks = [t for c in clips for t in c.tracks]
    assert (len(clips), sum(c.normal for c in clips), len(tracks), sum(len(t.frames) for t in tracks), sum(int((~t.enabled).sum()) for t in tracks))==tuple(
        facts[k] for k in ('n_videos', 'n_normal', 'n_regions', 'n_keyframes', 'n_disabled_keyframes'))
    assert [(c.name, video_class(c.name)) for c in clips]==[(v['name'], v['cls']) for v in facts['videos']]
    # the one region that is a lone end marker covers no frame
    assert sum(int((t.spans()[:,1]-t.spans()[:,0]).sum()) for t in tracks if len(t.frames)>1)==facts['frames_covered']
    for c,item in zip(clips, json.loads(sample.read_text())): assert [t.to_region() for t in c.tracks]==item['bbox_info']

def test_list_and_mapping_agree(sample, tmp_path):
    items = json.loads(sample.read_text())
    write_json(tmp_path/'dict.json', {video_name(i['f_path']): i for i in items})
    a,b = read_regions(sample),read_regions(tmp_path/'dict.json')
    assert [(c.name, c.path, c.caption, c.tracks) for c in a]==[(c.name, c.path, c.caption, c.tracks) for c in b]

def test_no_normal_video_is_said(sample, tmp_path):
    write_json(tmp_path/'crimes.json', [i for i in json.loads(sample.read_text()) if i['bbox_info']])
    with pytest.warns(DataWarning, match='none of the 26 videos is normal'): read_regions(tmp_path/'crimes.json')

def test_flat_paths_lead_to_the_class_folders(sample, shared):
    facts = json.loads(sample.with_name('ucf_region_sample_facts.json').read_text())
    def places(f_path): return candidate_paths(f_path, TEMPLATES, class_folders)
    for item,v in zip(json.loads(sample.read_text()), facts['videos']): assert v['disk_path'] in places(item['f_path'])
    for name in 'Anomaly_Train.txt','Anomaly_Test.txt':
        for line in (shared/'data'/'ucf_crime'/name).read_text().split():
            assert f'UCF_Crimes/Videos/{line}' in places(f'UCF_Crimes_Videos/{line.split("/")[1]}')

def test_official_list(shared):
    at = shared/'data'/'ucf_crime'
    official,counted = read_annotation(at/'Temporal_Anomaly_Annotation_for_Testing_Videos.txt'),read_annotation(at/'mist'/'Temporal_Anomaly_Annotation_New.txt')
    assert len(official)==290 and sum(v.normal for v in official.values())==150
    assert {k: v.segments for k,v in official.items()}=={k: v.segments for k,v in counted.items()}
    assert sum(len(v.segments)==2 for v in official.values())==16
    truth = {k: frame_truth(v.segments, v.n_frames, k) for k,v in counted.items()}
    assert (sum(map(len, truth.values())), sum(int(t.sum()) for t in truth.values()))==(1_111_808, 84_182)
    for gt in (at/'pel4vad_single_gt').glob('*.npy'):
        want = np.load(gt, allow_pickle=False)
        np.testing.assert_array_equal(truth[gt.name.split('__')[0]][:len(want)], want.astype(bool))

@pytest.fixture
def real(shared, tmp_path):
    "The real clip of Fighting033 (its annotated interval only) with two regions drawn by hand"
    clip = shared/'data'/'ucf_crime'/'clips'/'Fighting033_x264_570_841.mp4'
    if not clip.is_file(): pytest.skip(f'{clip} is missing')
    place = tmp_path/'UCF_Crimes_Videos'/'UCF_Crimes'/'Videos'/'Fighting'
    place.mkdir(parents=True)
    (place/'Fighting033_x264.mp4').write_bytes(clip.read_bytes())
    key = lambda f,on,*b: dict(frame=f, bbox=list(b), enabled=on)
    regions = [dict(caption='two men fight', start_frame=20, end_frame=200, keyframes=[key(20, True, .2, .3, .6, .9), key(200, False, .3, .3, .7, .9)]),
               dict(caption='a blow', start_frame=101, end_frame=104, keyframes=[key(101, True, .4, .4, .6, .6), key(104, False, .4, .4, .6, .6)])]
    item = dict(f_path='UCF_Crimes_Videos/Fighting033_x264.mp4', global_caption='a fight on camera', bbox_info=regions)
    def make(change=lambda i: i, **kw):
        write_json(tmp_path/'train.json', [change(json.loads(json.dumps(item)))])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DataWarning)
            return RegionClips(tmp_path/'train.json', tmp_path, **{**dict(frames=8, size=(64, 96), tokenize=tokenize), **kw})
    return make

def test_a_real_clip(real):
    s = real()[0]
    assert s['frames'].shape==(8, 3, 64, 96) and s['frames'].dtype==torch.uint8 and s['frames'].float().std()>10
    assert s['region_mask'].sum(1).tolist()[1]==1 and s['region_fallback'].tolist()==[False, True]      # the blow of four frames was missed
    batch = collate([s, s])
    assert batch['region_clip'].tolist()==[0, 0, 1, 1] and batch['frames'].shape==(2, 8, 3, 64, 96)

def test_event_sampling_is_for_training_only(real):
    ds = real(sampling='event', event_share=.5)
    for seed in range(5):
        s = ds.draw(0, np.random.default_rng(seed))
        assert not s['region_fallback'].any() and s['region_mask'].any(1).all()
    assert ds[0]['frame_index'].tolist()==real()[0]['frame_index'].tolist()

def test_a_draw_is_a_function_of_the_generator(real):
    ds = real(sampling='segment', flip=.5)
    rng = np.random.default_rng(7); ds.draw(0, rng); state = rng.bit_generator.state
    a = ds.draw(0, rng)
    fresh = np.random.default_rng(0); fresh.bit_generator.state = state
    b = real(sampling='segment', flip=.5).draw(0, fresh)
    for k,v in a.items(): assert (v==b[k] if k=='name' else torch.equal(v, b[k])), k
    assert rng.bit_generator.state==fresh.bit_generator.state

def test_workers_give_what_the_main_process_gives(real):
    ds = real()
    loader = torch.utils.data.DataLoader(ds, batch_size=1, collate_fn=collate, num_workers=1)
    for a,b in zip(loader, [collate([ds[0]])]): assert torch.equal(a['frames'], b['frames']) and a['name']==b['name']

def test_annotation_past_the_end_names_both(real):
    def change(i): i['bbox_info'][0]['end_frame'] = 100000; return i
    with pytest.raises(DataError, match=r'train.json, item 0 \(Fighting033_x264\), bbox_info\[0\].end_frame: 100000, but .*Fighting033_x264.mp4 has \d+ frames'): real(change)[0]

@pytest.mark.parametrize('path', ['../train.json', '/etc/passwd', 'UCF_Crimes_Videos/../../x.mp4', 'link/hosts'])
def test_no_path_leaves_the_data_root(tmp_path, path):
    root = tmp_path/'root'; (root/'UCF_Crimes_Videos').mkdir(parents=True); (root/'link').symlink_to('/etc')
    with pytest.raises(DataError, match='outside the data root'):
        resolve_path(root, path, TEMPLATES, 'a.json, item 0', class_folders)

def test_a_region_round_trips_through_json(sample):
    for item in json.loads(sample.read_text()):
        for r in item['bbox_info']: assert Track.from_region(json.loads(json.dumps(Track.from_region(r).to_region()))).to_region()==r

def test_fingerprint_sees_an_edited_caption(tmp_path):
    "A resumed run is told when its annotation is not the one it was started with"
    import json
    from vadnb.worlds.street import street_world
    world = street_world(tmp_path/'world', videos=2, valid_videos=0, test_videos=0, frames=(32, 36))
    ids = lambda texts: torch.zeros(len(texts), 4, dtype=torch.long)
    clips = lambda **kw: RegionClips(world.train, world.root, 4, (48, 64), ids, **kw)
    before = clips().fingerprint()
    assert clips().fingerprint()==before!=clips(sampling='event').fingerprint()
    items = json.loads(world.train.read_text())
    items[0]['global_caption'] += ' at noon'
    world.train.write_text(json.dumps(items))
    assert clips().fingerprint()!=before

@pytest.fixture(scope='module')
def facts(sample): return json.loads(sample.with_name('ucf_region_sample_facts.json').read_text())

def test_everything_known_about_the_real_regions(sample, facts):
    clips = read_regions(sample)
    tracks = [t for c in clips for t in c.tracks]
    count = lambda values: {k: n for k,n in Counter(values).items()}
    assert (sum(not c.normal for c in clips), sum(len(t.frames)==1 for t in tracks), sum(bool((~t.enabled[:-1]).any()) for t in tracks))==tuple(
        facts[k] for k in ('n_abnormal', 'n_single_keyframe_regions', 'n_regions_with_mid_disabled'))
    keys = sorted(len(t.frames) for t in tracks)
    assert dict(min=keys[0], median=keys[len(keys)//2], max=keys[-1])==facts['keyframes_per_region']
    assert count(video_class(c.name) for c in clips)==facts['videos_per_class']
    assert count(video_class(c.name) for c in clips for _ in c.tracks)==facts['regions_per_class']
    gaps = count(str(g) for t in tracks for g in np.diff(t.frames))
    assert {k: gaps[k] for k in facts['keyframe_gap_frames']}==facts['keyframe_gap_frames']
    captions = Counter(t.caption for t in tracks)
    assert (len(captions), sum(n for n in captions.values() if n>1))==(facts['distinct_region_captions'], facts['regions_sharing_a_caption'])
    boxes = np.concatenate([t.boxes for t in tracks])
    sides = boxes[:,2:]-boxes[:,:2]
    np.testing.assert_allclose((sides.prod(1).mean(), sides.min()), (facts['mean_box_area'], facts['min_box_side']), rtol=1e-9)
    for c,v in zip(clips, facts['videos']):
        assert [(len(t.frames), int((~t.enabled).sum())) for t in c.tracks]==[(r['n_keyframes'], r['n_disabled']) for r in v['regions']]
        assert not c.tracks or max(t.end_frame for t in c.tracks)<v['approx_frames']

@pytest.fixture(scope='module')
def clip_tokens():
    "CLIP's own tokenizer"
    from vadnb.models.clip_tokens import clip_tokenizer
    return clip_tokenizer(overflow='cut')

def test_token_budget_of_the_real_captions(sample, facts, clip_tokens, shared):
    clips = read_regions(sample)
    videos = token_budget([(c.where, c.caption) for c in clips], clip_tokens)
    regions = token_budget([(f'{c.where}, bbox_info[{j}]', t.caption) for c in clips for j,t in enumerate(c.tracks)], clip_tokens)
    assert list(videos.counts)==[v['global_tokens'] for v in facts['videos']]
    assert list(regions.counts)==[r['caption_tokens'] for v in facts['videos'] for r in v['regions']]
    assert (len(videos.over), len(regions.over), videos.over[0][0], regions.over[0][0])==tuple(
        facts[k] for k in ('global_captions_over_77_tokens', 'region_captions_over_77_tokens', 'max_global_caption_tokens', 'max_region_caption_tokens'))
    assert 'Abuse033_x264' in str(videos)
    strings = json.loads((shared/'golden'/'fgclip'/'tokenizer.json').read_text())['strings']
    assert token_budget([('', s['text']) for s in strings], clip_tokens).counts==tuple(s['n_tokens'] for s in strings)
    chinese = {s['text']: s['n_tokens'] for s in strings if s['category'].startswith('chinese')}
    assert max(chinese.values())>77 and sorted(n for n in chinese.values() if n>77)==sorted(n for n,_ in token_budget([('', t) for t in chinese], clip_tokens).over)

def test_cut_captions_are_counted_with_the_longest_and_its_place(sample, facts, clip_tokens, tmp_path):
    for v in facts['videos']:
        place = tmp_path/v['disk_path']
        place.parent.mkdir(parents=True, exist_ok=True); place.touch()
    with pytest.warns(DataWarning, match=r'7 of 69 captions are longer than the text encoder and are cut; the longest has 206 tokens: .*\(Abuse033_x264\), global_caption'):
        ds = RegionClips(sample, tmp_path, 8, (64, 64), clip_tokens)
    assert len(ds.caption_warnings())==7 and any('148 tokens' in w for w in ds.caption_warnings())
    clip_tokens.overflow = 'raise'
    with pytest.raises(DataError, match=r'global_caption: caption .* has 122 tokens.*6 of 30 captions have more than 77 tokens; the longest has 206'): RegionClips(sample, tmp_path, 8, (64, 64), clip_tokens)
    clip_tokens.overflow = 'cut'

def test_an_official_list_over_real_files(real, tmp_path):
    "The real clip stands where the official layout has it; its length is checked against the list"
    captioned = real()
    line = 'Fighting033_x264.mp4  Fighting  {}  {}  -1  -1  {}\n'
    (tmp_path/'list.txt').write_text(line.format(0, 271, 271))
    ds = AnnotatedClips(tmp_path/'list.txt', tmp_path, 8, (64, 96))
    a,b = ds[0],captioned[0]
    assert set(a)=={'name', 'frames', 'frame_index', 'n_frames'} and all(a[k]==b[k] if k=='name' else torch.equal(a[k], b[k]) for k in a)
    assert ds.truth('Fighting033_x264', 271).all() and ds.annotation['Fighting033_x264'].cls=='Fighting'
    batch,full = collate([a, a]),collate([b, b])
    assert set(batch)=={*a, 'clip_key'} and all(batch[k]==full[k] if k=='name' else torch.equal(batch[k], full[k]) for k in batch)
    with pytest.raises(ValueError, match='without'): collate([a, b])
    (tmp_path/'list.txt').write_text(line.format(0, 271, 1412))
    with pytest.raises(DataError, match=r'Fighting033_x264: the annotation gives 1412 frames, .*Fighting033_x264.mp4 has 271'): AnnotatedClips(tmp_path/'list.txt', tmp_path, 8, (64, 96))[0]
    with pytest.raises(DataError, match='gives 1412 frames'): real(annotation=tmp_path/'list.txt')[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DataWarning)
        assert real().fingerprint()==captioned.fingerprint()!=real(annotation=tmp_path/'list.txt').fingerprint()

def test_missing_videos_are_one_error(shared, tmp_path):
    official = shared/'data'/'ucf_crime'/'Temporal_Anomaly_Annotation_for_Testing_Videos.txt'
    with pytest.raises(DataError, match=r'Testing_Videos.txt: 290 of 290 videos are not below .*: Abuse028_x264, Abuse030_x264, Arrest001_x264, \.\.\. \(tried .*check the data root'):
        AnnotatedClips(official, tmp_path, 8, (64, 64))
    with pytest.raises(DataError, match='no such folder'): AnnotatedClips(official, tmp_path/'nowhere', 8, (64, 64))
    for line in (shared/'data'/'ucf_crime'/'Anomaly_Test.txt').read_text().split():
        place = tmp_path/'UCF_Crimes_Videos'/'UCF_Crimes'/'Videos'/line
        place.parent.mkdir(parents=True, exist_ok=True); place.touch()
    for root in tmp_path,tmp_path/'UCF_Crimes_Videos',tmp_path/'UCF_Crimes_Videos'/'UCF_Crimes'/'Videos':
        ds = AnnotatedClips(official, root, 8, (64, 64))
        assert len(ds)==290 and [p.stem for p in ds.paths]==ds.names

@pytest.mark.parametrize('name', ['../secret', '/etc/passwd', 'link/hosts'])
def test_no_name_of_an_annotation_leaves_the_data_root(tmp_path, name):
    root = tmp_path/'root'; root.mkdir(); (root/'link').symlink_to('/etc')
    (tmp_path/'secret.mp4').touch()
    with pytest.raises(DataError, match="outside the data root"): find_video(root, name, TEMPLATES, folders=class_folders)

def test_negatives_of_a_batch_belong_to_their_regions(real):
    def harder(i):
        i['bbox_info'][0]['negative_captions'] = ['two men dance', 'two women fight']
        i['bbox_info'][1] |= dict(flag_short_neg=1, short_expr_negs={'0': 'a kiss'})
        return i
    ds,plain = real(harder),real()
    s,p = ds[0],plain[0]
    assert s['region_negative_region'].tolist()==[0, 0, 1] and torch.equal(s['region_negative'], tokenize(['two men dance', 'two women fight', 'a kiss']))
    batch = collate([p, s, p, s])
    assert batch['region_negative_region'].tolist()==[2, 2, 3, 6, 6, 7] and batch['region_key'].tolist()==batch['region_key'][:2].tolist()*4
    assert batch['region_clip'][batch['region_negative_region']].tolist()==[1, 1, 1, 3, 3, 3]
    assert ds.fingerprint()!=plain.fingerprint() and ds.clips[0].tracks[1].negatives==('a kiss',)

def test_bad_negatives_name_file_item_and_field(real):
    def bad(i): i['bbox_info'][1]['negative_captions'] = ['a hug', 'A  blow']; return i
    with pytest.raises(DataError, match=r"train.json, item 0 \(Fighting033_x264\), bbox_info\[1\].negative_captions\[1\]: 'A  blow' says the same as the caption"): real(bad)
    def empty(i): i['bbox_info'][0]['negative_captions'] = []; return i
    with pytest.raises(DataError, match=r'bbox_info\[0\].negative_captions: holds no text'): real(empty)
