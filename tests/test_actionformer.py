"ActionFormer against golden values of OpenTAD, and what the padding must not change"
import json
import pytest
import torch
from safetensors.torch import load_file
from vadnb.models.actionformer import ActionFormer
from vadnb.models.actionformer import padding_unit

def close(a, b, **tol): torch.testing.assert_close(a, b, **(tol or dict(atol=1e-5, rtol=1e-5)))
def part(gold, start): return {k.removeprefix(start): v for k,v in gold.items() if k.startswith(start)}

@pytest.fixture(scope='module')
def golden(shared):
    folder = shared/'golden'/'adatad'
    return lambda name: (json.loads((folder/f'{name}.json').read_text()), load_file(folder/f'{name}.safetensors'))

def detector(c, **kw):
    "A detector from the official names of its settings"
    own = dict(in_channels=c['in_channels'], num_classes=c['num_classes'], channels=c['out_channels'], heads=c['n_head'],
               arch=c['arch'], window=c['win'], max_seq_len=c['max_seq_len'], abs_position=c['use_abs_pe'],
               ranges=c['regression_range'], head_channels=c['feat_channels'], head_convs=c['num_convs'])
    return ActionFormer(**{**own, **kw})

HEADS = ['actionformer_head', 'actionformer_head_local', 'actionformer_head_abspe']

@pytest.mark.parametrize('name', HEADS)
def test_forward_and_decoded_segments(golden, name):
    meta,gold = golden(name)
    net = detector(meta['config'], reference=True).eval()
    assert net.load_reference(part(gold, 'sd/'))==['rpn_head.loss_normalizer']
    tol = meta['tolerances']
    with torch.no_grad(): out = net(gold['features'], gold['masks'])
    for l in range(len(meta['config']['strides'])):
        torch.testing.assert_close(out.points[l], gold[f'out/points{l}'], atol=0, rtol=0)
        assert torch.equal(out.masks[l], gold[f'out/mask{l}'])
        valid = gold[f'out/mask{l}'][:,None]
        for found,want in ((out.logits[l], gold[f'out/cls{l}']), (out.distances[l], gold[f'out/reg{l}'])):
            assert found.shape==want.shape
            close(found*valid, want*valid, **tol)
    for i,(segments,scores) in enumerate(net.decode(out)):
        close(segments, gold[f'out/proposals{i}'], **tol)
        close(scores, gold[f'out/scores{i}'], **tol)

@pytest.mark.parametrize('name', HEADS)
def test_without_leaks_a_whole_window_is_the_same(golden, name):
    meta,gold = golden(name)
    net = detector(meta['config']).eval()
    net.load_reference(part(gold, 'sd/'))
    whole = gold['masks'].all(1)
    if gold['features'].shape[-1]!=meta['config']['padded_len']: pytest.skip('every sample of this fixture is padded')
    with torch.no_grad(): out = net(gold['features'], gold['masks'])
    assert whole.any() and not whole.all()
    for l,x in enumerate(out.logits): close(x[whole], gold[f'out/cls{l}'][whole], **meta['tolerances'])
