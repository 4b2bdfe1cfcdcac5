"Real UCF-Crime files through the readers: regions, official list, a real clip"
import json, warnings
import numpy as np, pytest, torch
from vadnb.core import DataError, write_json
from vadnb.data.tracks import Track
from vadnb.data.ucf_crime import (TEMPLATES, DataWarning, RegionClips, _candidates, collate, frame_truth, read_annotation, read_regions, resolve_path, video_class, video_name)

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
    for item,v in zip(json.loads(sample.read_text()), facts['videos']): assert v['disk_path'] in _candidates(item['f_path'], TEMPLATES)
    for name in 'Anomaly_Train.txt','Anomaly_Test.txt':
        for line in (shared/'data'/'ucf_crime'/name).read_text().split():
            assert f'UCF_Crimes/Videos/{line}' in _candidates(f'UCF_Crimes_Videos/{line.split("/")[1]}', TEMPLATES)

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
    with pytest.raises(DataError, match='outside the data root'): resolve_path(root, path, where='a.json, item 0')

def test_a_region_round_trips_through_json(sample):
    for item in json.loads(sample.read_text()):
        for r in item['bbox_info']: assert Track.from_region(json.loads(json.dumps(Track.from_region(r).to_region()))).to_region()==r

def test_fingerprint_sees_an_edited_caption(tmp_path):
    "A resumed run is told when its annotation is not the one it was started with"
    import json
    from vadnb.data.synth import street_world
    world = street_world(tmp_path/'world', videos=2, valid_videos=0, test_videos=0, frames=(32, 36))
    ids = lambda texts: torch.zeros(len(texts), 4, dtype=torch.long)
    clips = lambda **kw: RegionClips(world.train, world.root, 4, (48, 64), ids, **kw)
    before = clips().fingerprint()
    assert clips().fingerprint()==before!=clips(sampling='event').fingerprint()
    items = json.loads(world.train.read_text())
    items[0]['global_caption'] += ' at noon'
    world.train.write_text(json.dumps(items))
    assert clips().fingerprint()!=before
