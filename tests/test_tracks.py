"Keyframes to boxes against the golden values, and the import budget of a script that only reads annotations"
import json, subprocess, sys
import numpy as np, pytest, torch
from safetensors.numpy import load_file
from vadnb.data.sampling import event_indices, uniform_indices
from vadnb.data.tracks import Track
from vadnb.models.aggregate import masked_mean

@pytest.fixture(scope='module')
def golden(shared):
    at = shared/'golden'/'fgclip'
    return json.loads((at/'bbox_tracks.json').read_text()), load_file(at/'bbox_tracks.safetensors')

def tracks(case): return [Track.from_region(r, case['name'], sort=case['name']=='unsorted') for r in case['regions']]

def test_sampled_frames(golden):
    for case in golden[0]['cases']:
        for T,want in case['expected'].items():
            if want['frames'] is not None: assert uniform_indices(case['n_frames'], int(T)).tolist()==want['frames'], (case['name'], T)

def test_boxes_on_every_frame(golden):
    meta,arrays = golden
    n = 0
    for case in meta['cases']:
        for i,track in enumerate(tracks(case)):
            boxes,mask = track.at(np.arange(track.start_frame, track.end_frame+1), reference=True)
            np.testing.assert_array_equal(mask, arrays[f"{case['name']}.r{i}.full_mask"].astype(bool), case['name'])
            np.testing.assert_allclose(boxes, arrays[f"{case['name']}.r{i}.full_boxes"], rtol=0, atol=meta['tolerance']['boxes_atol'], err_msg=case['name'])
            n += 1
    assert n==sum(len(c['regions']) for c in meta['cases'])>=30

def test_boxes_masks_and_means_on_sampled_frames(golden):
    meta,arrays = golden
    atol,mean_atol = meta['tolerance']['boxes_atol'],meta['tolerance']['mean_atol']
    for case in meta['cases']:
        for T,want in case['expected'].items():
            key,frames = f"{case['name']}.T{T}",uniform_indices(case['n_frames'], int(T))
            x = torch.from_numpy(arrays[f'{key}.features'])
            unit = lambda v: torch.nn.functional.normalize(v, dim=-1).numpy()
            np.testing.assert_allclose(unit(x.mean(0)), arrays[f'{key}.global_norm'], rtol=0, atol=mean_atol)
            for i,track in enumerate(tracks(case)):
                boxes,mask = track.at(frames, reference=True)
                np.testing.assert_array_equal(mask, arrays[f'{key}.mask'][i].astype(bool), key)
                np.testing.assert_allclose(boxes, arrays[f'{key}.boxes'][i], rtol=0, atol=atol, err_msg=key)
                assert mask.sum()==want['mask_count'][i], key
                _,used,fallback = track.sample(frames, reference=True)
                assert fallback==want['fallback_index'][i], key
                mean = masked_mean(x[None], torch.from_numpy(used)[None])
                np.testing.assert_allclose(mean[0].numpy(), arrays[f'{key}.region_mean'][i], rtol=0, atol=mean_atol, err_msg=key)
                np.testing.assert_allclose(unit(mean[0]), arrays[f'{key}.region_norm'][i], rtol=0, atol=mean_atol, err_msg=key)

def test_the_default_differs_from_the_literal_rule_on_one_frame_only(golden):
    "A lone enabled keyframe has its box on its own frame; nothing else changes"
    for case in golden[0]['cases']:
        for track in tracks(case):
            f = np.arange(case['n_frames'])
            extra = track.at(f)[1] ^ track.at(f, reference=True)[1]
            assert extra.nonzero()[0].tolist()==([50] if case['name']=='one_keyframe' else []), case['name']

def test_order_is_refused_unless_sorting_is_asked_for(golden):
    from vadnb.core import DataError
    case = next(c for c in golden[0]['cases'] if c['name']=='unsorted')
    with pytest.raises(DataError, match='unsorted.keyframes.*increasing order'): Track.from_region(case['regions'][0], 'unsorted')

def test_a_region_past_the_end_is_refused_once_the_length_is_known(golden):
    from vadnb.core import DataError
    case = next(c for c in golden[0]['cases'] if c['name']=='past_the_end')
    with pytest.raises(DataError, match='end_frame: 420, but the video has 300 frames'): Track.from_region(case['regions'][0], n_frames=case['n_frames'])

def test_the_module_needs_no_torch():
    "What keeps `import vadnb.data.tracks` under a second, without a stopwatch"
    code = "import sys, vadnb.data.tracks; print([m for m in ('torch', 'transformers', 'av', 'decord', 'matplotlib', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'

@pytest.fixture(scope='module')
def real(shared):
    "The abnormal videos of the real sample: name, length, tracks"
    at = shared/'golden'/'fgclip'
    facts = json.loads((at/'ucf_region_sample_facts.json').read_text())['videos']
    items = json.loads((at/'ucf_region_sample.json').read_text())
    return [(v['name'], v['approx_frames'], [Track.from_region(r) for r in i['bbox_info']]) for v,i in zip(facts, items) if i['bbox_info']]

def test_stand_ins_on_real_regions_are_those_without_a_covered_frame(real):
    "The rule for an empty mask, told once more frame by frame"
    counts = {}
    for T in 16,64,256:
        for name,n,regions in real:
            frames = uniform_indices(n, T)
            for t in regions:
                covered = [a<=f<b or f==t.frames[-1] for f in frames for a,b in [(t.frames[0], t.frames[-1])]] if len(t.frames)>1 else [False]*T
                for k in np.flatnonzero(~t.enabled[:-1]): covered = [c and not t.frames[k]<=f<t.frames[k+1] for c,f in zip(covered, frames)]
                boxes,mask,index = t.sample(frames)
                if any(covered): assert index==-1 and mask.tolist()==covered, name
                else:
                    nearest = min(range(T), key=lambda i: (abs(2*int(frames[i])-t.start_frame-t.end_frame), i))
                    keys = np.flatnonzero(t.enabled) if t.enabled.any() else [0]
                    key = min(keys, key=lambda k: abs(int(t.frames[k])-int(frames[nearest])))
                    assert index==nearest and mask.nonzero()[0].tolist()==[nearest]
                    np.testing.assert_allclose(boxes[nearest], t.boxes[key], atol=1e-6)
                counts[T] = counts.get(T, 0)+(index>=0)
    assert counts[16]>counts[64]>counts[256]>=1       # the lone end marker needs one at any T

def test_event_sampling_leaves_only_the_lone_marker_to_a_stand_in(real):
    for name,n,regions in real:
        spans = np.concatenate([t.spans() for t in regions])
        for seed in range(5):
            frames = event_indices(n, 64, spans, .5, np.random.default_rng(seed))
            for t in regions:
                boxes,mask,index = t.sample(frames)
                if len(t.frames)>1: assert index==-1 and mask.any(), name
                else:
                    # its own frame was sampled, so the stand-in is the box that was drawn there
                    assert frames[index]==t.frames[0]
                    np.testing.assert_allclose(boxes[index], t.boxes[0], atol=1e-6)

@pytest.mark.parametrize('extra,says', [
    (dict(negative_captions=[]), r'negative_captions: holds no text'), (dict(negative_captions='a dog'), 'list of texts'), (dict(negative_captions=['']), r'negative_captions\[0\]: is empty'),
    (dict(negative_captions=['a Man']), 'says the same as the caption'), (dict(negative_captions=['x', 'X ']), r'says the same as negative_captions\[0\]'), (dict(short_expr_negs=['x']), 'mapping from key to text'),
    (dict(short_expr_negs={'a': None}), r'short_expr_negs\[a\]: must be text'), (dict(flag_short_neg=2, short_expr_negs={'a': 'x'}), 'must be 0 or 1'), (dict(flag_short_neg=0, short_expr_negs={'a': 'x'}), 'would not be used'),
    (dict(flag_short_neg=1), 'is missing'), (dict(short_expr_negs={'a': 'x'}, negative_captions=['y']), 'keep one'), (dict(negative_caption=['y']), "did you mean 'negative_captions'")])
def test_bad_negatives(extra, says):
    from vadnb.core import DataError
    region = dict(caption='a man', start_frame=0, end_frame=9, keyframes=[dict(frame=0, bbox=[.1, .1, .5, .5], enabled=True)])
    with pytest.raises(DataError, match=f'train.json, item 3, bbox_info\\[0\\].*{says}'): Track.from_region(region|extra, 'train.json, item 3, bbox_info[0]')

def test_both_forms_of_negatives_say_the_same():
    region = dict(caption='a man', start_frame=0, end_frame=9, keyframes=[dict(frame=0, bbox=[.1, .1, .5, .5], enabled=True)])
    ours = Track.from_region(region|dict(negative_captions=['a woman', '一个女人']))
    theirs = Track.from_region(region|dict(flag_short_neg=1, short_expr_negs={'0': 'a woman', '1': '一个女人'}))
    assert ours==theirs!=Track.from_region(region) and Track.from_region(json.loads(json.dumps(theirs.to_region())))==ours
    assert 'negative_captions' not in Track.from_region(region|dict(flag_short_neg=0, short_expr_negs={})).to_region()
