"The detection loss against golden values of OpenTAD"
import json
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import load_file
from vadnb.losses.detection import DetectionLoss
from vadnb.losses.detection import assign_targets
from vadnb.losses.detection import diou_loss
from vadnb.losses.detection import sigmoid_focal

def close(a, b, atol=1e-6, rtol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

@pytest.fixture(scope='module')
def golden(shared):
    folder = shared/'golden'/'adatad'
    return json.loads((folder/'tad_losses.json').read_text()), load_file(folder/'tad_losses.safetensors')

def levels(gold, name): return [gold[f'{name}{l}'] for l in range(4)]

def outputs(gold):
    "What a detector said, with leaves that take a gradient"
    logits,distances = ([x.clone().requires_grad_() for x in levels(gold, f'in/{k}')] for k in ('cls', 'reg'))
    return SimpleNamespace(logits=logits, distances=distances, points=levels(gold, 'out/points'), masks=levels(gold, 'in/mask'))

def truth(gold, samples=range(4)): return tuple([gold[f'gt/{k}{i}'] for i in samples] for k in ('segments', 'labels'))

OWN = dict(label_smoothing='label_smoothing', loss_weight='reg_weight', loss_normalizer='normalizer',
           filter_similar_gt='filter_similar', center_sample_radius='radius')

def detection_loss(options):
    "A loss from the official names of its settings"
    own = {OWN[k]: v for k,v in options.items() if k in OWN}
    if options.get('center_sample')=='none': own['radius'] = None
    return DetectionLoss(6, **own)

@pytest.mark.parametrize('name,kw', [('default', {}), ('multilabel', dict(filter_similar=False)),
                                     ('nocenter', dict(radius=None)), ('radius_alt', dict(radius=.75))])
def test_assignment(golden, name, kw):
    _,gold = golden
    points,valid = torch.cat(levels(gold, 'out/points')), torch.cat(levels(gold, 'in/mask'), 1)
    for i,(segments,labels) in enumerate(zip(*truth(gold))):
        classes,distances = assign_targets(points, segments, labels, 6, **kw)
        assert torch.equal(classes, gold[f'assign_{name}/cls'][i])
        close(distances, gold[f'assign_{name}/reg'][i])
        assert torch.equal((classes.sum(1)>0)&valid[i], gold[f'assign_{name}/pos'][i])

def test_each_element(golden):
    _,gold = golden
    for alpha in (.25, -1., .5):
        for gamma in (2., 1.5):
            for target in (0., 1., .3):
                if (key := f'unit/focal_a{alpha}_g{gamma}_t{target}') in gold:
                    close(sigmoid_focal(gold['unit/logits'], torch.full((25,), target), alpha, gamma), gold[key])
    close(1-diou_loss(gold['unit/boxes_a'], gold['unit/boxes_b']), gold['unit/diou'])
    close(diou_loss(gold['diou/pred_segments'], gold['diou/target_segments']), gold['diou/per_element'])

@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', ['default', 'smooth', 'weight2', 'auto', 'multilabel', 'nocenter', 'radius_alt'])
def test_losses(golden, name, mode):
    meta,gold = golden
    variant = meta['expected']['variants'][name]
    loss = detection_loss(variant['options']).train(mode=='train')
    out = outputs(gold)
    got,want = loss(out, *truth(gold)), variant[mode]
    for own,theirs in (('cls', 'cls_loss'), ('reg', 'reg_loss'), ('loss', 'total')):
        close(got[own].detach(), torch.tensor(want[theirs]), atol=0)
    close(loss.normalizer, torch.tensor(want['loss_normalizer_after']))
    if name=='default':
        got['loss'].backward()
        for l in range(4):
            for own,k in ((out.logits[l], 'cls'), (out.distances[l], 'reg')):
                close(own.grad, gold[f'grad_{mode}/{k}{l}'], atol=1e-7, rtol=1e-4)

def test_the_running_count(golden):
    meta,gold = golden
    loss = DetectionLoss(6).train()
    for step in meta['expected']['normaliser_trajectory']:
        out = outputs(gold)
        got = loss(out, *truth(gold, step['gt_of_samples']))
        got['loss'].backward()
        close(got['cls'].detach(), torch.tensor(step['cls_loss'])); close(got['reg'].detach(), torch.tensor(step['reg_loss']))
        close(loss.normalizer, torch.tensor(step['normalizer_after']))
        assert step['reg_grad_is_zero']==all(not x.grad.any() for x in out.distances)
    nothing = DetectionLoss(6).eval()(outputs(gold), *truth(gold, [1]*4))
    close(nothing['cls'].detach(), torch.tensor(meta['expected']['empty_eval']['cls_loss']))
