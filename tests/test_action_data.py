"Entries, sampling, patches and sets of action classification: the field's own programs, public cases, real clips"
import hashlib
import json
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vadnb.core import ConfigError, DataError, VideoError
from vadnb.data.action_files import entries_json, read_rows
from vadnb.data.action_sets import ActionEntries, action_folders, check_videos, match_classes, read_entries, shared_groups, ssv2, ucf101
from vadnb.data.action_videos import ActionVideos, ClipReader, collate, mirrored_classes, unlabelled
from vadnb.data.actions import chat_entry, check_entry, class_text, hold_out_groups, ssv2_classes, ssv2_entries, ucf101_classes, ucf101_entries
from vadnb.data.clip_views import FrameSampling
from vadnb.data.patches import normalised, patch_rows, patchify, resize_frames, size_steps, smart_resize
from vadnb.data.sampling import crop_boxes, dense_views, fps_indices, linspace_indices, make_even, segment_views, uniform_indices
from vadnb.data.video import VideoReader
from vadnb.train.samples import DrawnSamples

def golden(shared, name): return json.loads((shared/f'golden/action_cls/{name}.json').read_text())
def case(shared, number): return json.loads((shared/f'cases/action_cls/case_{number:02}.json').read_text())
def same(a, b): return np.array_equal(np.asarray(a), np.asarray(b))

# ---------------------------------------------------------------- frames and views
def test_frames_by_count_and_rate_as_four_programs_take_them(shared):
    g = golden(shared, 'sampling')
    for r in g['uniform']:
        at = r['frames'],r['n']
        for how,key in (('nearest', 'indices'), ('down', 'truncated'), ('float32', 'float32_round')): assert same(linspace_indices(*at, how), r[key]), (at, how)
        assert same(make_even(linspace_indices(*at)), r['indices_even'])
    for r in g['by_fps']:
        for rule,key in (('rounded', 'rounded_rule'), ('truncated', 'truncated_rule'), ('qwen_vl_utils', 'qwen_vl_utils'), ('transformers', 'transformers')):
            found,rate = fps_indices(r['frames'], r['video_fps'], r['target_fps'], r['max_frames'], rule)
            assert same(found, r[key]['indices']), (rule, r['frames'])
            assert same(make_even(found), r[key].get('indices_even', make_even(found)))
            assert rate==pytest.approx(r[key].get('sampled_fps', rate), rel=1e-9) and 2/rate==pytest.approx(r[key].get('second_per_grid', 2/rate), rel=1e-9)

def test_views_as_videomae_and_mmaction2_take_them(shared):
    g = golden(shared, 'sampling')
    for r in g['dense_views']:
        assert same(dense_views(r['frames'], r['clip_len'], r['stride'], r['clips']), r['clip_indices'])
        assert same(crop_boxes(*r['frame_size'], r['short_side'], r['crops']), r['crop_boxes_xyxy'])
    for r in g['mmaction2_views']:
        assert same(dense_views(r['frames'], r['clip_len'], r['stride'], r['clips'], 'mmaction2', r['out_of_bound']), r['clip_indices'])
    for r in g['three_crop']: assert same(crop_boxes(*r['frame_size'], r['crop'], 3, 'mmaction2'), r['crop_boxes_xyxy'])
    for r in g['ssv2_views']:
        assert same(segment_views(r['frames'], r['segments'], r['clips']), r['clip_indices'])
        assert same(crop_boxes(*r['frame_size'], r['short_side'], r['crops']), r['crop_boxes_xyxy'])
    for r in g['tsn_segments']:
        assert same(segment_views(r['frames'], r['segments'], 1)[0], r['centres']) and same(uniform_indices(r['frames'], r['segments']), r['centres'])
        assert same(segment_views(r['frames'], r['segments'], 2)[[1, 0]].ravel(), r['twice_sample'])

def test_short_clips_and_slow_rates_give_frames(shared):
    c = case(shared, 6)
    assert same(linspace_indices(c['input']['frames'], c['input']['n']), c['expected']['indices'])
    c = case(shared, 7)
    i = c['input']
    found,_ = fps_indices(i['frames'], i['fps'], i['target_fps'], i['max_frames'])
    assert len(found)==c['expected']['count'] and same(make_even(found), c['expected']['even'])

# ---------------------------------------------------------------- sizes and patches
def test_patches_are_those_of_the_released_processor(shared):
    g,files = golden(shared, 'patchify'),{}
    for c in g['cases']:
        held = files.setdefault(c['file'], load_file(shared/'golden/action_cls'/c['file']))
        bounds = dict(min_pixels=c['size']['shortest_edge'], max_pixels=c['size']['longest_edge'])
        found = []
        for i in range(len(c['videos'])):
            frames = held[f"{c['name']}/video{i}"].numpy()
            resized = resize_frames(frames, size_steps(*frames.shape[1:3], len(frames), **bounds))
            assert torch.equal(resized.permute(0, 2, 3, 1), held[f"{c['name']}/resized{i}"]), c['name']
            found.append(patchify(frames, **bounds))
        assert torch.equal(torch.stack([grid for _,grid in found]), held[f"{c['name']}/video_grid_thw"])
        torch.testing.assert_close(torch.cat([rows for rows,_ in found]), held[f"{c['name']}/pixel_values_videos"], atol=1e-5, rtol=0)

def test_sizes_by_the_rule_of_each_program(shared):
    g = golden(shared, 'patchify')
    assert len(g['smart_resize'])>80
    for row in g['smart_resize']:
        h,w,frames,low,high,target,tokens,theirs,capped,first,two_step = row
        def size(rule):
            try: return list(size_steps(h, w, frames, low, high, rule)[-1])
            except ValueError: return 'ValueError'
        assert size('plain')==target and size('capped')==capped, row
        # a side of nothing is no size
        assert size('qwen_vl_utils')==('ValueError' if isinstance(theirs, str) or 0 in theirs else theirs), row
        assert [list(s) for s in size_steps(h, w, frames, low, high, 'two_step')]==[first, two_step], row
        if target!='ValueError':
            assert list(smart_resize(h, w, low, high))==target and tokens==-(-frames//2)*target[0]*target[1]//784

def test_bytes_become_numbers_late_or_early_alike():
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 56, 84), dtype=np.uint8))
    mean,std = (torch.tensor(v)[:,None,None] for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    early,_ = patch_rows((frames/255-mean)/std)
    torch.testing.assert_close(normalised(patch_rows(frames)[0]), early, atol=1e-5, rtol=0)

# ---------------------------------------------------------------- converters
def digest(text): return hashlib.sha256(text.encode()).hexdigest()

def test_ucf101_lists_give_the_published_entries(shared):
    g = golden(shared, 'converters')
    root,lists = g['config']['ucf_video_root'],shared/'data/ucf101'
    names = ucf101_classes(lists/'classInd.txt')
    assert [[n, i, class_text(n)] for i,n in enumerate(names)]==g['ucf_classes'] and all(class_text(n)==t for n,t in g['text_rules'])
    for key,want in g['ucf101'].items():
        found = ucf101_entries(lists/want['source'], lists/'classInd.txt', root)
        assert len(found)==want['count'] and digest(entries_json(found))==want['json_sha256'], key
        rows = ''.join(f"{e['videos'][0].removeprefix(root+'/')}\t{e['action_label']}\t{class_text(names[e['action_label']])}\n" for e in found)
        assert digest(rows)==want['rows_digest_sha256']
        assert np.bincount([e['action_label'] for e in found], minlength=101).tolist()==want['per_label_count']
        for s in want['samples']: assert found[s['row']]==s['entry']

def test_all_three_splits_of_ucf101_are_read(shared):
    lists = shared/'data/ucf101'
    for split,counts in {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}.items():
        halves = [ucf101_entries(lists/f'{part}list0{split}.txt', lists/'classInd.txt', 'r') for part in ('train', 'test')]
        assert tuple(map(len, halves))==counts
        paths = [{e['videos'][0] for e in of} for of in halves]
        assert not paths[0] & paths[1] and len(paths[0] | paths[1])==13320
        assert any('r/HandstandPushups/v_HandStandPushups_' in v for v in paths[1]) and not any('\r' in v for v in paths[0])

def test_ssv2_annotation_gives_the_published_entries(shared):
    g = golden(shared, 'converters')
    labels,root = shared/'data/ssv2/labels.json',g['config']['ssv2_video_root']
    assert len(ssv2_classes(labels))==174
    samples = g['ssv2']['validation']['samples']
    assert ssv2_entries([s['source_row'] for s in samples], labels, root)==[s['entry'] for s in samples]
    mini = g['mini']['ssv2']
    assert ssv2_entries(mini['rows'], mini['labels'], root)==mini['entries']
    assert len(ssv2_entries(shared/'data/ssv2/validation_first300.json', labels, root))==300

def test_small_and_wrong_inputs(shared, tmp_path):
    g = golden(shared, 'converters')
    mini = g['mini']['ucf101']
    for name in ('classInd.txt', 'trainlist.txt', 'testlist.txt'): (tmp_path/name).write_bytes(mini[name].encode())
    for part in ('train', 'test'):
        assert ucf101_entries(tmp_path/f'{part}list.txt', tmp_path/'classInd.txt', g['config']['ucf_video_root'])==mini[f'{part}_entries']
    for w in g['wrong_inputs']:
        def convert():
            if w['kind']=='ssv2': return ssv2_entries(w['rows'], g['mini']['ssv2']['labels'], 'r')
            (tmp_path/'list.txt').write_bytes(w['trainlist'].encode())
            return ucf101_entries(tmp_path/'list.txt', tmp_path/'classInd.txt', 'r')
        if not w['error']: assert [e['action_label'] for e in convert()]==w['labels'], w['name']; continue
        with pytest.raises(DataError) as said: convert()
        assert all(word in str(said.value) for word in w['message_should_contain']), w['name']

def test_every_rule_of_an_entry(shared):
    v = golden(shared, 'converters')['validator']
    for row in v['entries']:
        if row['error'] is None: check_entry(row['entry'], v['num_classes']); continue
        with pytest.raises(DataError, match=f"data.json, entry 4, {row['error']}: "): check_entry(row['entry'], v['num_classes'], 'data.json', 4)
    assert {r['error'] for r in v['entries']}=={None, 'label', 'action_token', 'order', 'leak', 'videos'}

# ---------------------------------------------------------------- splits
def test_no_scene_is_on_both_sides_of_a_split(shared):
    lists = shared/'data/ucf101'
    rows = [check_entry(e, 101, 'list', i) for i,e in enumerate(ucf101_entries(lists/'trainlist01.txt', lists/'classInd.txt', 'r'))]
    train,valid = hold_out_groups(rows, .1, 3)
    assert len(train)+len(valid)==9537 and .1*9537<=len(valid)<=.16*9537
    assert not {e.group for e in train} & {e.group for e in valid}
    assert {e.label for e in train}=={e.label for e in valid}==set(range(101))
    # what a split by clip would leak
    clips = np.random.default_rng(0).permutation(9537)<954
    assert len({e.group for e,o in zip(rows, clips) if o} & {e.group for e,o in zip(rows, clips) if not o})>500
    # the official halves share no group either
    test = [check_entry(e, 101) for e in ucf101_entries(lists/'testlist01.txt', lists/'classInd.txt', 'r')]
    halves = [ActionEntries('x', (), of) for of in (rows, test)]
    assert not shared_groups(*halves) and len(shared_groups(ActionEntries('x', (), train), halves[0]))>1000

def test_a_group_of_several_classes_is_torn_nowhere():
    def entry(person, label, k): return check_entry(chat_entry(f'{person}-{label}-{k}.mp4', '<video>?<ACTION>', '', label), 3, pattern=r'(\w+)-.*')
    rows = [entry(p, label, k) for p in 'abcdefgh' for label in range(3) for k in range(2)]
    train,valid = hold_out_groups(rows, .25)
    assert not {e.group for e in train} & {e.group for e in valid} and len(valid)==12
    lone = [r for r in rows if r.label<2]+[entry('a', 2, 0)]
    with pytest.raises(DataError, match='class 2 has no group to hold out'): hold_out_groups(lone, .25)

def test_directions_are_swapped_by_name(shared):
    c = case(shared, 8)
    names = ssv2_classes(shared/'data'/c['input']['labels'])
    partner,alone = mirrored_classes(names)
    assert partner=={a: b for pair in c['expected']['swapped'] for a,b in (pair, pair[::-1])}
    assert not set(c['expected']['not_directional']) & partner.keys() and alone=={50}

# ---------------------------------------------------------------- real clips
def tokens(before, counts, after='', answer=None):
    "A token for every letter, 0 for what is seen, 1 for `<ACTION>`"
    for n in counts: before = before.replace('<video>', '['+'\0'*n+']', 1)
    ids = [*map(ord, before), 1, *map(ord, after+(answer or ''))]
    return ids, [-100]*len(ids)

@pytest.fixture(scope='module')
def real(shared, tmp_path_factory):
    "A folder with UCF101's and Something-Something's trees of the clips that there are, converted"
    folder = tmp_path_factory.mktemp('real')
    def link(to, at): at.parent.mkdir(parents=True, exist_ok=True); at.symlink_to(to)
    clips = {c: shared/f'data/video/{c}' for c in ('torchvision/v_SoccerJuggling_g23_c01.avi', 'torchvision/v_SoccerJuggling_g24_c01.avi',
                                                  'ucf101/v_ApplyEyeMakeup_g01_c01.avi')}
    for p in clips.values(): link(p, folder/'UCF-101'/p.name.split('_')[1]/p.name)
    for p in (shared/'data/ssv2/clips').iterdir(): link(p, folder/'ssv2_videos'/p.name)
    (folder/'lists').mkdir()
    (folder/'lists/classInd.txt').write_bytes((shared/'data/ucf101/classInd.txt').read_bytes())
    (folder/'lists/trainlist01.txt').write_bytes(b'SoccerJuggling/v_SoccerJuggling_g23_c01.avi 84\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\r\n')
    (folder/'lists/testlist01.txt').write_bytes(b'SoccerJuggling/v_SoccerJuggling_g24_c01.avi\r\n')
    ucf101(str(folder/'lists'), str(folder/'data'), videos=str(folder/'UCF-101'))
    (folder/'labels.json').write_bytes((shared/'data/ssv2/labels.json').read_bytes())
    rows = [dict(id=p.stem, template=t) for p,t in zip(sorted((shared/'data/ssv2/clips').iterdir()), ('Putting [something] upright on the table', 'Closing [something]'))]
    (folder/'validation.json').write_text(json.dumps(rows))
    ssv2(str(folder), str(folder/'data'), videos=str(folder/'ssv2_videos'))
    return folder

def test_real_clips_of_both_sets_become_samples(real):
    data = real/'data'
    sets = {n: read_entries(data, n) for n in ('ucf101_train01', 'ucf101_test01', 'ssv2_valid')}
    assert [len(s) for s in sets.values()]==[2, 1, 2] and len(sets['ssv2_valid'].classes)==174
    check_videos(sets)
    reader = ClipReader(FrameSampling('rate', frames=16, fps=2.), tokens, max_pixels=16384)
    train = ActionVideos(sets['ucf101_train01'], reader, number=0)
    x = train[1]
    # 164 frames at 25 a second: 13 frames in 6.56 s, made even; 84x140 pixels
    assert x['video_grid_thw'].tolist()==[[7, 6, 10]] and x['pixel_values_videos'].shape==(420, 1176) and int(x['label'])==0
    assert float(x['second_per_grid'])==pytest.approx(2*6.56/13, rel=1e-6) and int((x['input_ids']==0).sum())==7*15
    path,plan = sets['ucf101_train01'].entries[1].videos[0],reader.plan(sets['ucf101_train01'].entries[1].videos[0])
    rows,grid = patchify(VideoReader(path).get_batch(plan.indices), max_pixels=16384)
    assert torch.equal(normalised(x['pixel_values_videos']), rows) and torch.equal(grid, x['video_grid_thw'][0])
    some = ActionVideos(sets['ssv2_valid'], reader, number=1)
    batch = collate([train[0], some[0], some[1]], pad_id=7)
    assert batch['set'].tolist()==[0, 1, 1] and batch['video'].tolist()==[0, 0, 1]
    assert len(batch['pixel_values_videos'])==int(batch['video_grid_thw'].prod(1).sum())
    assert ((batch['input_ids']==7) >= (batch['attention_mask']==0)).all() and batch['attention_mask'].sum()==sum(len(d['input_ids']) for d in (train[0], some[0], some[1]))

@pytest.mark.parametrize('where', ['moviepy/no_duration.webm', 'decord/flipping_a_pancake.mkv', 'decord/video_90.mov', 'decord/unordered.mov', 'torchvision/RATRACE_wave_f_nm_np1_fr_goo_37.avi'])
def test_odd_containers_have_frames_and_a_rate(shared, where):
    path = str(shared/'data/video'/where)
    x = ClipReader(FrameSampling('rate', frames=8, fps=2.), tokens, max_pixels=16384).item(unlabelled(path))
    reader = VideoReader(path)
    assert 0<float(x['second_per_grid'])<=2*len(reader)/reader.fps+1e-6 and len(x['pixel_values_videos'])==int(x['video_grid_thw'].prod())

def test_a_damaged_clip_is_named(shared):
    with pytest.raises(VideoError, match='corrupted.mp4'): ClipReader(FrameSampling(), tokens).item(unlabelled(shared/'data/video/decord/corrupted.mp4'))

def test_a_sequence_above_the_cutoff_is_refused_before_training(shared, real):
    c = case(shared, 2)
    i = c['input']
    found = read_entries(real/'data', 'ucf101_test01')
    with pytest.raises(DataError) as said:
        ActionVideos(found, ClipReader(FrameSampling(frames=i['frames']), tokens, max_pixels=i['max_pixels'], cutoff=i['cutoff']))
    assert all(w in str(said.value) for w in c['expected']['must_name']) and 'ucf101_test01.json, entry 0' in str(said.value)
    fits = ActionVideos(found, ClipReader(FrameSampling(frames=16), tokens, max_pixels=65536, cutoff=800))
    assert not fits.budget().over and fits.budget().counts[0][:2]==(len(fits[0]['input_ids']), 560)
    # a bound that suffices opens no file
    assert not ActionVideos(found, ClipReader(FrameSampling(frames=16), tokens, max_pixels=16384)).reader.facts

def test_the_control_of_one_frame_and_dense_views(real):
    found = read_entries(real/'data', 'ucf101_test01')
    x = ActionVideos(found, ClipReader(FrameSampling('one', frames=4), tokens, max_pixels=16384))[0]
    pairs = x['pixel_values_videos'].view(2, -1, 3, 2, 196)
    assert torch.equal(pairs[0], pairs[1]) and torch.equal(pairs[...,0,:], pairs[...,1,:])
    views = ActionVideos(found, ClipReader(FrameSampling('dense', frames=4, clips=2, crops=3), tokens, max_pixels=16384))
    assert len(views)==6 and {tuple(views[k]['video_grid_thw'][0].tolist()) for k in range(6)}=={(2, 8, 8)}
    assert len({views[k]['pixel_values_videos'].sum().item() for k in range(6)})==6

def test_drawn_samples_are_a_function_of_epoch_and_place(real):
    data = ActionVideos(read_entries(real/'data', 'ucf101_train01'), ClipReader(FrameSampling(frames=4, jitter=True), tokens, max_pixels=16384), flip=.5)
    drawn = DrawnSamples(data, seed=5)
    for key in ((0, 0), (0, 1)):
        a,b = drawn[key],drawn[key]
        assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a if k!='name')
    assert not torch.equal(drawn[0, 0]['pixel_values_videos'], drawn[1, 0]['pixel_values_videos'])

# ---------------------------------------------------------------- sets
def test_a_folder_of_pictures_is_a_clip_with_a_rate_that_is_given(real, tmp_path):
    from PIL import Image
    for name in ('walk/one', 'run/two'):
        (tmp_path/'tree'/name).mkdir(parents=True)
        for i in range(5): Image.fromarray(np.full((56, 84, 3), 40*i, np.uint8)).save(tmp_path/'tree'/name/f'{i:03}.png')
    action_folders(str(tmp_path/'tree'), str(tmp_path/'data'))
    found = read_entries(tmp_path/'data', 'clips_train')
    assert found.classes==('run', 'walk')
    with pytest.raises(DataError, match='folder_fps'): ActionVideos(found, ClipReader(FrameSampling(frames=4), tokens))[0]
    x = ActionVideos(found, ClipReader(FrameSampling(frames=4), tokens, picture_fps=10.))[1]
    assert float(x['second_per_grid'])==pytest.approx(2*.5/4) and x['pixel_values_videos'][0].unique().tolist()==[0, 40]

def test_another_order_of_classes_is_matched_and_foreign_ones_are_refused(real):
    found = read_entries(real/'data', 'ucf101_train01')
    turned = match_classes(found, found.classes[::-1])
    assert [turned.classes[e.label] for e in turned.entries]==['SoccerJuggling', 'ApplyEyeMakeup']
    with pytest.raises(DataError, match="'SoccerJuggling' is none of the 1"): match_classes(found, ['ApplyEyeMakeup'])

def test_written_files_are_json_that_others_read(real):
    path = real/'data/ucf101_train01.json'
    assert path.read_text().rstrip('\n')==json.dumps(json.loads(path.read_text()), indent=2, ensure_ascii=False)
    info = json.loads((real/'data/dataset_info.json').read_text())['ucf101_train01']
    assert info['file_name']==path.name and info['columns']==dict(messages='messages', videos='videos')
    assert info['tags'].items()>=dict(role_tag='role', content_tag='content', user_tag='user', assistant_tag='assistant').items()
    assert len(read_rows(path))==2

def test_choices_that_contradict_each_other_are_refused(real):
    for bad in (dict(clips=3), dict(how='middle'), dict(how='dense', crops=2, protocol='mmaction2')):
        with pytest.raises(ConfigError, match='sampling'): FrameSampling(**bad)
    with pytest.raises(ConfigError, match='flip'): ActionVideos(read_entries(real/'data', 'ucf101_test01'), ClipReader(FrameSampling(), tokens), flip=2.)
