"The detection loss against golden values of OpenTAD"
import json
from types import SimpleNamespace
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vadnb.core import DataError
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

# ---------------------------------------------------------------- several processes

def batch(step, samples):
    "Answers and ground truth of some of four samples; the last has none"
    g = torch.Generator().manual_seed(step)
    logits,distances = torch.randn(4, 3, 32, generator=g), 3*torch.rand(4, 2, 32, generator=g)
    start = 20*torch.rand(4, 5, generator=g)
    segments = torch.stack([start, start+1+9*torch.rand(4, 5, generator=g)], 2)
    labels = torch.randint(0, 3, (4, 5), generator=g)
    points = torch.stack([torch.arange(32.), torch.zeros(32), torch.full((32,), 100.), torch.ones(32)], 1)
    out = SimpleNamespace(logits=[logits[samples].requires_grad_()], distances=[distances[samples].requires_grad_()],
                          points=[points], masks=[torch.ones(len(samples), 32).bool()])
    n = [0 if i==3 else i+1 for i in samples]
    return out, [segments[i,:k] for i,k in zip(samples, n)], [labels[i,:k] for i,k in zip(samples, n)]

def steps(samples, kw):
    "Losses, gradients and the count of three steps"
    loss,res = DetectionLoss(3, normalizer=20, **kw).train(), []
    for step in range(3):
        out,*truth = batch(step, samples)
        got = loss(out, *truth)
        got['loss'].backward()
        res.append(dict(loss=got['loss'].detach(), reg=got['reg'].detach(), n=loss.normalizer.clone(),
                        grads=[out.logits[0].grad, out.distances[0].grad]))
    return res

SHARES = [[0, 1], [2, 3]]
KINDS = [dict(), dict(reg_weight=0), dict(label_smoothing=.1, filter_similar=False)]

def worker(rank, port, folder):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.save([steps(SHARES[rank], kw) for kw in KINDS], f'{folder}/{rank}.pt')
    # of its own: the other process evaluates nothing
    if not rank: DetectionLoss(3).eval()(*batch(0, [0]))
    dist.destroy_process_group()

def test_two_processes_are_one(two_processes):
    ranks = two_processes(worker)
    for k,kw in enumerate(KINDS):
        for step,one in enumerate(steps([0, 1, 2, 3], kw)):
            both = [r[k][step] for r in ranks]
            for name in ('loss', 'reg'): close(sum(b[name] for b in both)/2, one[name])
            for b in both: close(b['n'], one['n'])
            for i,g in enumerate(one['grads']): close(torch.cat([b['grads'][i] for b in both])/2, g, atol=1e-7)

# ---------------------------------------------------------------- a GPU that is not there, and what is wrong

def moved(x, device): return [v.to(device, non_blocking=True) for v in x]

def test_on_a_gpu_ground_truth_of_the_host_costs_no_wait(on_cuda):
    def run(device, there):
        out,*truth = batch(1, [0, 1, 2, 3])
        for name,x in vars(out).items(): setattr(out, name, [v.detach() for v in moved(x, device)])
        leaves = [v.requires_grad_() for v in out.logits+out.distances]
        loss = DetectionLoss(3).to(device).train()
        if there: there.waits.clear()
        got = loss(out, *truth)
        got['loss'].backward()
        if there:
            assert not there.total, there.listed()
            # on the device already: both lists in one wait
            loss.eval()(out, *(moved(t, device) for t in truth))
            assert there.total==1, there.listed()
        return [got['loss'], got['reg'], loss.normalizer, *(x.grad for x in leaves)]
    plain = run('cpu', None)
    with on_cuda() as there: found = [x.detach().cpu() for x in run('cuda', there)]
    for a,b in zip(found, plain): close(a, b.detach(), atol=1e-6)

def wrong(change, says, device='cpu', names=None):
    "A message, before a kernel is given a label out of range"
    out,segments,labels = batch(0, [1, 2])
    change(segments, labels)
    for name,x in vars(out).items(): setattr(out, name, moved(x, device))
    loss = DetectionLoss(3).to(device)
    with pytest.raises(DataError, match=says): loss(out, moved(segments, device), moved(labels, device), names)
    assert loss.normalizer.item()==100

@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_ground_truth_that_cannot_be(device, on_cuda):
    def label(value):
        def change(segments, labels): labels[1][2] = value
        return change
    def bound(a, b):
        def change(segments, labels): segments[1][0] = torch.tensor([a, b])
        return change
    with on_cuda():
        wrong(label(3), r'clip_2: label 3 .* not one of the 3 classes 0 to 2', device, ['clip_1', 'clip_2'])
        wrong(label(-1), r'sample 1 of the batch: label -1', device)
        for a,b in ((5, 4), (5, 5), (float('nan'), 4), (-float('inf'), 4)):
            wrong(bound(a, b), 'does not end behind its start', device)

def test_lists_that_do_not_fit():
    wrong(lambda s, l: s.pop(), '1 lists of segments for 2 samples')
    wrong(lambda s, l: l.__setitem__(0, l[0][:1]), 'give every segment one label')
    wrong(lambda s, l: l.__setitem__(0, l[0].float()), 'whole numbers')

def test_no_batch_gives_a_nan():
    for kw in KINDS:
        for train in (True, False):
            loss = DetectionLoss(3, **kw).train(train)
            out,segments,labels = batch(2, [3])
            # nothing, an action so short that no place answers, distances of zero, an overlong action; one at a time
            for truth in (torch.zeros(0, 2), torch.tensor([[3.2, 3.3]]), torch.tensor([[3., 5.]]), torch.tensor([[-1e4, 1e5]])):
                out.distances[0].data.zero_(); out.logits[0].data.fill_(60.)
                got = loss(out, [truth], [torch.zeros(len(truth)).long()])
                got['loss'].backward()
                assert all(v.isfinite() for v in got.values())
                assert out.logits[0].grad.isfinite().all() and out.distances[0].grad.isfinite().all()

def test_memory_of_diou_follows_the_number_of_pairs():
    "The largest tensor that loss and gradient make of n pairs holds their 2n bounds"
    class Largest(TorchDispatchMode):
        numbers = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            made = op(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
            return made
    a,b = torch.rand(2, 1000, 2).cumsum(-1)
    with Largest() as largest: diou_loss(a.requires_grad_(), b).sum().backward()
    assert largest.numbers<=2000
