"The positions of the release, Qwen2.5-VL behind them, and the row of one token"
import json
import pytest, torch
from safetensors.torch import load_file
from vadnb.models.mrope import mrope_positions

@pytest.fixture(scope='module')
def golden(shared):
    path = shared/'golden'/'action_cls'
    return lambda name: (json.loads((path/f'{name}.json').read_text()), load_file(path/f'{name}.safetensors'))

# ---------------------------------------------------------------- positions
def test_positions_are_those_of_the_release(golden):
    meta,held = golden('mrope')
    words = {k: meta['config'][k] for k in ('vision_start_token_id', 'video_token_id', 'image_token_id')}
    for case in meta['cases']:
        def of(key): return held.get(f"{case['name']}/{key}")
        mask = of('attention_mask').bool()
        positions,delta = mrope_positions(of('input_ids'), of('attention_mask'), of('video_grid_thw'), of('image_grid_thw'),
                                          of('second_per_grid_ts'), tokens_per_second=case['tokens_per_second'], **words)
        assert positions.dtype==torch.int64 and positions.shape==(3, *mask.shape)
        assert torch.equal(positions[:,mask], of('position_ids')[:,mask]), case['name']
        assert torch.equal(delta, of('rope_deltas')), case['name']
        where = of('input_ids')==meta['config']['action_token_id']
        assert [r[w].tolist() for r,w in zip(positions[0], where)]==case['action_position'], case['name']

def test_above_two_frames_per_second_time_goes_on(shared):
    case = json.loads((shared/'cases'/'action_cls'/'case_01.json').read_text())
    given,expected = case['input'],case['expected']
    t,h,w = given['grids'][0]
    ids = torch.tensor([[1]*given['text_before']+[151652]+[151656]*(t*h*w//4)+[151653]])
    positions,_ = mrope_positions(ids, video_grid_thw=given['grids'], second_per_grid=given['second_per_grid'],
                                  tokens_per_second=given['tokens_per_second'])
    inside = positions[0,0][ids[0]==151656].reshape(t, -1)
    assert inside[:,0].tolist()==expected['temporal_ids_of_grid_rows'] and (inside==inside[:,:1]).all()
    assert int(positions[0,0,-1])==expected['next_text']

def test_positions_on_a_device_are_on_that_device(on_cuda):
    ids = torch.tensor([[1, 151652, 151656, 151653, 2]])
    host,_ = mrope_positions(ids, torch.ones_like(ids), torch.tensor([[1,2,2]]))
    with on_cuda():
        there,delta = mrope_positions(*(x.to('cuda') for x in (ids, torch.ones_like(ids), torch.tensor([[1,2,2]]))))
        assert there.is_cuda and delta.is_cuda
        assert torch.equal(there.cpu(), host)
