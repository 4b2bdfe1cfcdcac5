"What a classifier's answers cost and are worth: golden values, hand-worked cases, slow references, processes"
import json
import numpy as np, pytest, torch
from safetensors.torch import load_file
from torch import nn
from vadnb.core import ConfigError, DataError, MetricWarning
from vadnb.losses.classification import class_balanced_weights, classification_loss, loss_terms, mean_over_processes
from vadnb.metrics.classification import (average_views, calibration_error, class_accuracy, confusion_matrix, fit_temperature, hardest_classes, label_ranks,
                                          mean_class_accuracy, most_confused, predicted, softmax, topk_accuracy, with_temperature)
from vadnb.metrics.classification_tables import classification_metrics, trivial_answers

@pytest.fixture(scope='module')
def golden(shared):
    def read(name):
        at = shared/'golden'/'action_cls'/name
        return json.loads(at.with_suffix('.json').read_text()), load_file(at.with_suffix('.safetensors'))
    return read

# ---------------------------------------------------------------- loss
VARIANTS = { # name → arguments; `w` class weights, `b` class-balanced weights
    'ce': {}, 'ce_sum': dict(reduction='sum'), 'ce_ignore': {}, 'ce_class_weights': dict(weight='w'),
    'ce_class_weights_batch_mean': dict(weight='w', reduction='batch_mean'), 'ce_smoothing': dict(smoothing=.1),
    'ce_smoothing2': dict(smoothing=.25), 'ce_smoothing_class_weights': dict(smoothing=.1, weight='w'),
    'ce_smoothing_class_weights_ignore': dict(smoothing=.1, weight='w'), 'focal_g0.5': dict(gamma=.5),
    'focal_g1.5': dict(gamma=1.5), 'focal_g2.0': dict(gamma=2.), 'focal_alpha_weighted_mean': dict(gamma=1.5, weight='w'),
    'focal_alpha_batch_mean': dict(gamma=1.5, weight='w', reduction='batch_mean'), 'focal_sum': dict(gamma=1.5, reduction='sum'),
    'class_balanced_ce': dict(weight='b'), 'class_balanced_focal': dict(weight='b', gamma=1.5)}

def heads(g):
    "The two stored decoders"
    res = dict(linear=nn.Linear(24, 9), mlp=nn.Sequential(nn.Linear(24, 17), nn.GELU(), nn.Linear(17, 9)))
    for name,head in res.items():
        stem = f'{name}/head.'
        head.load_state_dict({k[len(stem):]: v for k,v in g.items() if k.startswith(stem)})
    return res

def test_golden_losses_and_gradients(golden):
    meta,g = golden('action_cls_loss')
    w = dict(w=g['class_weights'], b=class_balanced_weights(g['class_counts'], meta['config']['class_balanced_beta']))
    torch.testing.assert_close(w['b'], g['class_balanced_weights'], atol=1e-6, rtol=1e-5)
    assert {v['variant'] for v in meta['values']}==VARIANTS.keys()
    for v in meta['values']:
        head,x = heads(g)[v['decoder']], g['hidden_rows'].clone().requires_grad_()
        logits = head(x)
        logits.retain_grad()
        kw = VARIANTS[v['variant']]
        kw = kw | {k: w[kw[k]] for k in kw if k=='weight'}
        loss = classification_loss(logits, g['labels_with_ignore' if 'ignore' in v['variant'] else 'labels'], **kw)
        assert loss.item()==pytest.approx(v['loss'], abs=1e-5, rel=1e-5), v
        loss.backward()
        at = f"{v['decoder']}/{v['variant']}/grad_"
        for name,found in (('hidden', x.grad), ('logits', logits.grad), *((f'head.{k}', p.grad) for k,p in head.named_parameters())):
            torch.testing.assert_close(found, g[at+name], atol=1e-5, rtol=1e-4, msg=lambda m: f'{at}{name}: {m}')

def test_order_and_offset_do_not_matter():
    "A constant added to a row is nothing to softmax; samples in another order are the same batch"
    torch.manual_seed(0)
    z,y,w,p = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5)+.1, torch.randperm(6)
    for kw in (dict(), dict(gamma=.7), dict(smoothing=.2, gamma=2.)):
        one = classification_loss(z, y, w, **kw)
        torch.testing.assert_close(classification_loss(z+torch.randn(6, 1)*50, y, w, **kw), one, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(classification_loss(z[p], y[p], w, **kw), one)

def test_an_ignored_sample_is_as_good_as_absent():
    torch.manual_seed(0)
    z,y = torch.randn(5, 4), torch.tensor([0, 3, -1, 2, -1])
    z[2] = float('inf')
    for reduction in ('mean', 'batch_mean', 'sum'):
        kw = dict(weight=torch.rand(4)+.1, smoothing=.1, gamma=1., reduction=reduction)
        there,gone = z.clone().requires_grad_(), z[y>=0].clone().requires_grad_()
        losses = classification_loss(there, y, ignore_index=-1, **kw), classification_loss(gone, y[y>=0], **kw)
        torch.testing.assert_close(*losses)
        for l in losses: l.backward()
        torch.testing.assert_close(there.grad[y>=0], gone.grad)
        assert not there.grad[y<0].any()

def test_on_a_gpu_the_loss_costs_no_wait(on_cuda):
    "Forward and backward without the host asking for a value"
    torch.manual_seed(0)
    z,y,w = torch.randn(4, 3), torch.tensor([0, 1, -100, 2]), torch.rand(3)
    def run(device, there=None):
        x,labels,weight = (v.to(device) for v in (z, y, w))
        if there: there.waits.clear()
        loss = classification_loss(x.requires_grad_(), labels, weight, .1, 2.)
        loss.backward()
        return loss.detach(), x.grad
    with on_cuda() as there:
        found = run('cuda', there)
        assert not there.total, there.listed()
        found = [x.cpu() for x in found]
    torch.testing.assert_close(found, list(run('cpu')))

def _share(rank, port, folder):
    "Gradients of uneven shares, averaged"
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    z,y,w = _batch()
    mine = slice(0, 5) if rank==0 else slice(5, 7)
    x = z[mine].clone().requires_grad_()
    res = {}
    for name,kept in (('both', slice(None)), ('one', slice(0, 0) if rank else slice(None))):
        cost,weight = loss_terms(x[kept], y[mine][kept], w, .1, 1.)
        loss = mean_over_processes(cost.sum(), weight.sum())
        res[name] = loss.detach(), torch.autograd.grad(loss, x)[0]
    torch.save(res, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def _batch():
    torch.manual_seed(3)
    return torch.randn(7, 4), torch.tensor([0, 1, 1, 2, 3, 0, 2]), torch.tensor([.2, 1., 3., 9.])

def test_two_processes_have_the_mean_of_one(two_processes):
    "Unequal shares and weights: the average of both is the loss and the gradient of all samples together"
    one,two = two_processes(_share)
    z,y,w = _batch()
    for name,of in (('both', slice(0, 7)), ('one', slice(0, 5))):
        x = z[of].clone().requires_grad_()
        loss = classification_loss(x, y[of], w, .1, 1.)
        loss.backward()
        torch.testing.assert_close((one[name][0]+two[name][0])/2, loss.detach())
        grads = torch.cat([one[name][1], two[name][1]])/2
        torch.testing.assert_close(grads[of], x.grad)
        assert not grads[5:].any() or name=='both'

def test_faulty_weights_and_labels():
    z = torch.zeros(2, 3)
    for y,says in ((torch.tensor([3, 0]), 'label 3 of sample 0'), (torch.tensor([True, False]), 'whole numbers'),
                   (torch.tensor([[0], [1]]), r'labels \(2, 1\)')):
        with pytest.raises(DataError, match=says): classification_loss(z, y)
    with pytest.raises(DataError, match='class 2 has 0'): class_balanced_weights(torch.tensor([4, 1, 0]), .999)
    with pytest.raises(ConfigError, match='weight'): classification_loss(z, torch.tensor([0, 1]), torch.ones(2))

# ---------------------------------------------------------------- metrics
def assert_metrics(found, wanted):
    "The figures of `classification_metrics` under their names in the golden file"
    for ours,theirs in (('top1', 'top1'), ('top5', 'top5'), ('mean_class_accuracy',)*2, ('mean_class_accuracy_all_classes',)*2,
                        ('mean_class_accuracy_mmaction2',)*2, ('cross_entropy',)*2):
        if ours in found: assert found[ours]==pytest.approx(wanted[theirs], abs=1e-7), ours

@pytest.mark.parametrize('kind', ['tensor', 'array'])
def test_golden_single_view(golden, kind):
    meta,g = golden('topk_metrics')
    z,y = (x if kind=='tensor' else x.numpy() for x in (g['logits'], g['labels']))
    single = meta['single_view']
    assert_metrics(classification_metrics(softmax(np.asarray(z, np.float64)), y), single)
    assert topk_accuracy(z, y, 5)==pytest.approx(single['top5'], abs=1e-7)
    assert predicted(z).tolist()==g['predictions'].tolist()
    m = confusion_matrix(predicted(z), y, 12)
    assert type(m) is type(z) and m.tolist()==g['confusion_matrix'].tolist()
    accuracy = class_accuracy(m)
    assert [None if a!=a else a for a in accuracy.tolist()]==[pytest.approx(v, abs=1e-7) if v is not None else None for v in single['per_class_accuracy']]
    for easiest,name in ((False, 'hardest_classes'), (True, 'easiest_classes')):
        assert [list(r) for r in hardest_classes(m, 5, easiest)]==[[c, pytest.approx(a)] for c,a in meta[name]]
    assert [list(r) for r in most_confused(m)]==meta['most_confused_pairs']

def test_golden_few_classes_ties_and_splits(golden):
    meta,g = golden('topk_metrics')
    few = meta['few_classes']
    assert_metrics(classification_metrics(softmax(g['few/logits'].double().numpy()), g['few/labels']), few)
    assert topk_accuracy(g['few/logits'], g['few/labels'], 5)==few['top5']==1
    ties = g['ties/logits']
    assert predicted(ties).tolist()==meta['ties']['predictions']
    for row,first in zip(ties, meta['ties']['top5']):
        found = [topk_accuracy(row[None].expand(7, 7), torch.arange(7), k)*7 for k in range(1, 6)]
        ranks = label_ranks(row[None].expand(7, 7), torch.arange(7)).tolist()
        assert found==pytest.approx([1, 2, 3, 4, 5]) and [ranks.index(k) for k in range(5)]==first
    ends = np.cumsum([0, *meta['split_mean']['split_sizes']])
    parts = [topk_accuracy(g['logits'][a:b], g['labels'][a:b]) for a,b in zip(ends, ends[1:])]
    assert parts==pytest.approx(meta['split_mean']['top1_per_split'])

def test_golden_views(golden):
    meta,g = golden('topk_metrics')
    z,y = g['mv/logits'], g['mv/labels']
    video,view = torch.arange(90).repeat_interleave(15), torch.arange(15).repeat(90)
    flat,winners = z.reshape(-1, 12), {}
    for how,atol in (('probabilities', 1e-6), ('logits', 1e-5)):
        ids,mean = average_views(flat, video, view, how)
        torch.testing.assert_close(mean.float(), g[f'mv/mean_{how}'], atol=atol, rtol=0)
        assert ids.tolist()==[*range(90)]
        winners[how] = predicted(mean)
        assert confusion_matrix(winners[how], y, 12).tolist()==g[f'mv/confusion_matrix_{how}'].tolist()
        p = mean if how=='probabilities' else softmax(mean.numpy())
        assert_metrics(classification_metrics(p, y), meta['multi_view'][f'average_{how}'])
    assert_metrics(classification_metrics(softmax(flat.double().numpy()), y.repeat_interleave(15)), meta['multi_view']['per_view'])

def test_golden_duplicates_and_missing_views(golden):
    meta,g = golden('topk_metrics')
    rows,video = g['mv/logits'].reshape(-1, 12)[g['dup/rows']], g['dup/video']
    view = g['dup/clip']*3+g['dup/crop']
    ids,p = average_views(rows, video, view)
    torch.testing.assert_close(p.float(), g['mv/mean_probabilities'], atol=1e-6, rtol=0)
    assert topk_accuracy(p, g['mv/labels'])==pytest.approx(meta['duplicates']['top1_after_dedup'])
    keep = g['dup/keep']
    ids,p = average_views(rows[keep], video[keep], view[keep])
    torch.testing.assert_close(p.float(), g['dup/mean_probabilities_uneven'], atol=1e-6, rtol=0)
    found,wanted = classification_metrics(p, g['mv/labels'][ids]), meta['uneven_views']
    # of this one row the file holds the cross-entropy of probabilities taken for logits, against its own convention
    assert_metrics(found, wanted | dict(cross_entropy=found['cross_entropy']))
    again = classification_metrics(softmax(p.numpy()), g['mv/labels'][ids])
    assert again['cross_entropy']==pytest.approx(wanted['cross_entropy'], abs=1e-7)

def test_views_against_a_dictionary():
    "Names, any order, some views twice: one row per name, whatever the kind of names"
    rng = np.random.default_rng(0)
    names,views = rng.choice(['b', 'a', 'c é'], 60), rng.choice(['left', 'middle', 'right', '4'], 60)
    score = {(n, v): rng.normal(size=5) for n in names for v in views}
    z = np.stack([score[k] for k in zip(names, views)])
    ids,p = average_views(z, names, views)
    assert list(ids)==sorted(set(names))
    for name,row in zip(ids, p):
        own = {(n, v) for n,v in zip(names, views) if n==name}
        np.testing.assert_allclose(row, np.mean([softmax(score[k]) for k in own], 0), atol=1e-12)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(60)
        np.testing.assert_array_equal(average_views(z[order], names[order], views[order])[1], p)

def test_a_view_that_says_two_things_is_told():
    z = torch.tensor([[4., 0.], [0., 4.], [4., 0.]])
    with pytest.warns(MetricWarning, match="view 0 of video '5' came twice"): ids,p = average_views(z, [5, 5, 6], [0, 0, 0])
    assert predicted(p).tolist()==[0, 0]

def test_three_means_of_class_accuracies():
    "By hand: class 1 is absent and predicted, class 2 is absent and not"
    m = confusion_matrix(np.array([0, 0, 1, 3]), np.array([0, 0, 0, 3]), 4)
    assert [mean_class_accuracy(m, o) for o in ('labels', 'mmaction2', 'all')]==pytest.approx([(2/3+1)/2, (2/3+1)/3, (2/3+1)/4])
    assert mean_class_accuracy(torch.as_tensor(m))==pytest.approx(5/6)

def slow_calibration_error(p, y, bins):
    total = 0.
    for b in range(bins):
        inside = [(max(r), int(np.argmax(r)==l)) for r,l in zip(p, y) if b/bins<max(r)<=(b+1)/bins]
        if inside: total += len(inside)/len(p)*abs(np.mean([c for c,_ in inside])-np.mean([r for _,r in inside]))
    return total

@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error_against_a_walk(bins):
    rng = np.random.default_rng(bins)
    p,y = softmax(3*rng.normal(size=(300, 4))), rng.integers(0, 4, 300)
    assert calibration_error(p, y, bins)==pytest.approx(slow_calibration_error(p, y, bins), abs=1e-12)
    assert calibration_error(np.eye(4)[y], y, bins)==0
    assert calibration_error(np.eye(4)[y], (y+1)%4, bins)==1

@pytest.mark.parametrize('scale', [.01, 1., 40.])
def test_temperature_is_the_best_of_a_grid(scale):
    "Whatever the scale of the logits; and of averaged probabilities, through their logarithms"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 400)
    z = scale*(rng.normal(size=(400, 5))+1.5*np.eye(5)[y])
    def cost(T, z): return -np.log(softmax(z/T)[np.arange(400), y]).mean()
    T = fit_temperature(torch.as_tensor(z), torch.as_tensor(y))
    assert cost(T, z)<=min(cost(T*f, z) for f in np.geomspace(.2, 5, 101))+1e-9
    p = softmax(z)
    if scale==1: assert fit_temperature(np.log(p), y)==pytest.approx(T, rel=1e-6)
    assert predicted(with_temperature(p, 3.)).tolist()==predicted(p).tolist()
    assert calibration_error(with_temperature(p, T), y)<=calibration_error(p, y)+.02

def test_no_temperature_for_perfect_or_useless_answers():
    z = np.random.default_rng(0).normal(size=(30, 4))
    for y in (z.argmax(1), z.argmin(1)):
        with pytest.warns(MetricWarning, match='stays at 1'): assert fit_temperature(z, y)==1

def test_faults_of_scores_and_labels():
    z = torch.zeros(3, 4)
    for call,says in ((lambda: topk_accuracy(z, [0, 1, 4]), 'label 4 of sample 2'), (lambda: topk_accuracy(z, [0, 1]), '3 rows of scores for 2'),
                      (lambda: topk_accuracy(z/0, [0, 1, 2]), 'sample 0 holds NaN'), (lambda: confusion_matrix([0, 5], [0, 1], 4), 'prediction 5 of sample 1'),
                      (lambda: confusion_matrix([0], [0, 1], 4), '1 predictions for 2'), (lambda: mean_class_accuracy(np.zeros((2, 3))), 'must be'),
                      (lambda: average_views(z, [0, 1, float('nan')][:2], [0, 1]), r'video \(2,\)'), (lambda: calibration_error(z+1, [0, 1, 2]), 'sum to 1')):
        with pytest.raises(DataError, match=says): call()

def test_majority_of_training_is_no_oracle():
    "The most frequent class of training counts, not that of the test labels"
    found = trivial_answers(np.array([1, 1, 1, 0]), 2, [9, 1])
    assert found['baseline/top1/majority']==.25 and found['baseline/mean_class_accuracy/majority']==.5
    assert trivial_answers(np.array([1, 1]), 2, [9, 1])['baseline/mean_class_accuracy/majority']==0
