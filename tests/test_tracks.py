"Keyframes to boxes against the golden values, and the import budget of a script that only reads annotations"
import json, subprocess, sys
import numpy as np, pytest, torch
from safetensors.numpy import load_file
from vadnb.data.sampling import uniform_indices
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
