"The whole of fgclip in a tiny world: banks, chunks, every loss, evaluation by name, prediction and verification, against references and planted faults"
import contextlib, functools, io, math, pickle, shutil, warnings, weakref
import numpy as np, pytest, torch
from command import vadnb
from toy_system import SPENT
from vadnb.core import DataError, read_json, read_jsonl, write_json
from vadnb.data.convert import from_ucf_annotation
from vadnb.data.sampling import uniform_indices
from vadnb.data.ucf_crime import read_frames
from vadnb.worlds.street import street_world
from vadnb.data.video import VideoReader, write_video
from vadnb.metrics.events import temporal_map
from vadnb.metrics.intervals import frame_intervals, per_class_metrics
from vadnb.metrics.video_anomaly import frame_metrics, trivial_baselines
from vadnb.models.aggregate import unit
from vadnb.models.clip import FrameFeatures
from vadnb.models.clip_tokens import clip_tokenizer
from vadnb.systems.fgclip import predict as prediction
from vadnb.systems.fgclip.data import class_of
from vadnb.systems.fgclip.features import ClipLook, Look
from vadnb.systems.fgclip.scores import FrameScores
from vadnb.systems.fgclip.system import FGCLIP
from vadnb.systems.registry import load_config
from vadnb.train.callbacks import Callback
from vadnb.train.checkpoint import find_checkpoint, load_weights, read_part, write_part
from vadnb.train.learner import fit
from vadnb.train.feed import evaluation_batches, look_through
from vadnb.train.optim import group_faults

SMALL = '''--data.frames 2 --data.valid_frames 4 --data.size [32,32] --data.valid_json null --loss.background_weight 0 --loss.quiet_weight 0 --score.resamples 0 --train.batch_size 4 --train.workers 0
    --train.device cpu --train.progress false --train.trackers [] --train.log_every 1 --train.unit step --train.evaluate_every 100 --train.save_every 100'''.split()
BANKS = '--bank.regions 16 --bank.clips 16 --bank.warmup 2'.split()
# plain descent: differences of rounding stay as small as they are
PLAIN = '--optim.name sgd --optim.lr 0.01'.split()

def changed_json(world, source, name, change):
    "A copy of an annotation with every item changed"
    write_json(world.root/name, [change(dict(item, bbox_info=[dict(r) for r in item['bbox_info']])) for item in read_json(world.root/source)])

def with_negatives(item):
    "The k-th region of a video has k+1 perturbed captions"
    for k,r in enumerate(item['bbox_info']): r['negative_captions'] = [f'{w} instead of {r["caption"]}' for w in ('a dog', 'two cats', 'a tree')[:k+1]]
    return item

def make_world(folder):
    world = street_world(folder, videos=8, valid_videos=4, test_videos=4, size=(48,64), frames=(32,36))
    changed_json(world, 'train.json', 'free.json', lambda item: dict(item, bbox_info=[]))
    changed_json(world, 'train.json', 'negatives.json', with_negatives)
    write_json(world.root/'crimes.json', [item for item in read_json(world.train) if item['bbox_info']])
    # one abnormal video with two regions among seven normal ones
    most = max(read_json(world.train), key=lambda item: len(item['bbox_info']))
    two = [dict(most['bbox_info'][0], caption=f'{k} {most["bbox_info"][0]["caption"]}') for k in ('first', 'second')]
    changed_json(world, 'train.json', 'one_crime.json', lambda item: dict(item, bbox_info=two if item['f_path']==most['f_path'] else []))
    for n in (100, 101): changed_json(world, 'train.json', f'long{n}.json', lambda item: dict(item, global_caption=f"{item['global_caption']}{' very'*n}"))
    return world

def words(world, runs, name, *more): return ['--data_root', str(world.root), '--runs', str(runs), '--name', name, *SMALL, *map(str, more)]
def config(world, runs, name, *more): return load_config('fgclip_demo', words(world, runs, name, *more))

@pytest.fixture(scope='module')
def world(tmp_path_factory): return make_world(tmp_path_factory.mktemp('fgclip')/'world')

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('runs')

@pytest.fixture(scope='module')
def build(world, runs):
    "A system of the same weights for every configuration"
    def f(*more):
        torch.manual_seed(0)
        return config(world, runs, 'built', *more).build()
    return f

@pytest.fixture(scope='module')
def train(world, runs):
    "A run's learner; the same words are trained once"
    @functools.cache
    def f(name, *more): return fit(config(world, runs, name, *more), [StopAt(int(name[-1]))] if name.startswith('stopped') else [])
    return f

class StopAt(Callback):
    def __init__(self, step): self.at = step
    def after_step(self):
        if self.learner.step==self.at: self.learner.stop = 'asked to'

def curve(learner): return [{k: v for k,v in r.items() if k not in SPENT} for r in learner.log.rows if r['kind']=='train']
def batch_of(system, n=4):
    data = system.cfg.make_data()
    return data.collate([data.split('train')[i] for i in range(n)])

@torch.no_grad()
def scanned(system, split='valid', world=1, rank=0):
    "The scan of a split, or of the share that a process looks at"
    return look_through(system, system.cfg.make_data(), split, system.cfg.train, 'cpu', world, rank)
def contents(system): return {f'{k}.{n}': b.clone() for k,bank in system.banks().items() for n,b in bank.named_buffers()}
def counters(system): return {k: (b.reads, b.empty_reads, b.pushes) for k,b in system.banks().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def refuse(*words):
    "The one line that a command says before it leaves with code 2"
    code,out,err = vadnb(*words)
    assert code==2 and out=='' and err.count('\n')==1 and err.startswith('vadnb: error: '), out+err
    return err

# ---------------------------------------------------------------- the bank in training

def spied(monkeypatch):
    "What each forward pass saw, in order: keys of clips and regions, and the state of the bank before it"
    seen,real = [], FGCLIP.loss
    def loss(self, batch):
        seen.append(dict(clips=batch['clip_key'].tolist(), regions=batch['region_key'].tolist(), steps=int(self.memory['region'].steps), reads=self.memory['region'].reads))
        res = real(self, batch)
        seen[-1] |= dict(read=self.memory['region'].reads-seen[-1]['reads'], candidates=float(res['candidates/global']))
        return res
    monkeypatch.setattr(FGCLIP, 'loss', loss)
    return seen

def test_every_micro_batch_is_pushed_and_optimizer_steps_open_the_bank(world, runs, monkeypatch):
    seen = spied(monkeypatch)
    system = fit(config(world, runs, 'pushed', *BANKS, '--train.batch_size', '2', '--train.accumulate', '2', '--train.steps', '5')).system
    assert len(seen)==10 and [s['steps'] for s in seen]==[k//2 for k in range(10)]
    assert [s['read'] for s in seen]==[0]*4+[1]*6                        # two optimizer steps of warm-up are four forward passes
    for name,kind in (('global', 'clips'), ('region', 'regions')):
        bank,keys = system.memory[name], [k for s in seen for k in s[kind]]
        assert int(bank.count)==min(len(keys), bank.size) and int(bank.pointer)==len(keys)%bank.size and bank.pushes==10
        ring = [0]*bank.size
        for i,k in enumerate(keys): ring[i%bank.size] = k
        assert bank.keys[:,0].tolist()==ring
    # the first one to read it sees the clips of all passes before, beside those that are the same clips again
    before = [k for s in seen[:4] for k in s['clips']]
    assert seen[3]['candidates']<=2<seen[4]['candidates']<=2+len(before)

def test_the_loss_is_that_of_no_bank_until_it_opens(train):
    with_bank,without = (curve(train(name, *some, '--train.steps', '5')) for name,some in (('bank', BANKS), ('no_bank', ())))
    assert with_bank[:2]==without[:2]
    for a,b in zip(with_bank[2:], without[2:]): assert a['candidates/global']>b['candidates/global'] and a['loss/global']!=b['loss/global']

@pytest.mark.parametrize('some', ['--train.gradient_checkpointing true', '--model.chunk 3', '--loss.chunk 3', '--train.gradient_checkpointing true --model.chunk 1 --loss.chunk 1'])
def test_recomputation_changes_neither_bank_nor_loss(train, some):
    whole,again = train('whole', *BANKS, *PLAIN, '--train.steps', '4'), train('again'+''.join(c for c in some if c.isalnum()), *BANKS, *PLAIN, '--train.steps', '4', *some.split())
    for a,b in zip(curve(whole), curve(again), strict=True):
        assert a.keys()==b.keys()
        for k in a: assert a[k]==b[k] if isinstance(a[k], str) else a[k]==pytest.approx(b[k], abs=2e-5, rel=1e-4), k
    assert counters(whole.system)==counters(again.system)
    a,b = contents(whole.system), contents(again.system)
    for k in a: torch.testing.assert_close(a[k], b[k], atol=2e-5, rtol=0)

@pytest.fixture
def warm(build):
    "A system whose open banks hold two batches"
    system = build(*BANKS, '--bank.warmup', '1', '--data.valid_json', 'valid.json').train()
    for _ in range(2): system.loss(batch_of(system)); system.after_step()
    return system

def test_nothing_but_training_touches_the_bank(warm, world, tmp_path):
    assert int(warm.memory['region'].count)>0 and warm.memory['region'].active
    data,train = warm.cfg.make_data(), batch_of(warm)
    def in_eval(): warm.eval(); warm.loss(train)
    def without_gradient():
        warm.train()
        with torch.no_grad(): warm.loss(train)
    before,counted = contents(warm), counters(warm)
    for use in (in_eval, without_gradient, lambda: scanned(warm.train()).metrics(), lambda: scanned(warm, 'test').metrics(), lambda: [data.rows(), warm.rows(data)],
                lambda: list(warm.predict(world.path(world.names('test')[0]))), lambda: list(warm.train().look(train).clips)):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            use()
        assert same(contents(warm), before) and counters(warm)==counted
    warm.train().loss(train)
    assert not same(contents(warm), before)

def test_a_loss_without_training_has_the_batch_as_its_only_candidates(warm, build):
    batch = batch_of(warm)
    found,plain = warm.eval().loss(batch), build().eval().loss(batch)
    assert all(torch.equal(found[k], plain[k]) for k in plain)

def test_evaluation_during_training_leaves_no_trace(train):
    quiet = train('unseen', *BANKS, '--train.steps', '4')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        watched = train('watched', *BANKS, '--train.steps', '4', '--train.evaluate_every', '1', '--data.valid_json', 'valid.json', '--train.ema', '0.9')
    assert curve(quiet)==curve(watched) and same(contents(quiet.system), contents(watched.system))
    assert counters(quiet.system)==counters(watched.system)

RESUMED = (*BANKS, '--bank.warmup', '4', '--train.batch_size', '2', '--train.accumulate', '3', '--train.drop_last', 'false', '--train.steps', '7')

def test_a_run_resumed_before_its_bank_opens_equals_one_left_alone(train, world, runs):
    whole,stopped = train('left_alone', *RESUMED), train('stopped3', *RESUMED)
    assert stopped.step==3 and 0<int(stopped.system.memory['region'].count)
    held = read_part(find_checkpoint(stopped.run), 'model')
    assert all(torch.equal(held[f'memory.{k}'], v) for k,v in contents(stopped.system).items())
    resumed = fit(config(world, runs, 'stopped3', *RESUMED))
    rows = lambda run: [{k: v for k,v in r.items() if k not in SPENT} for r in read_jsonl(run/'log.jsonl') if r['kind']=='train']
    assert rows(resumed.run)==rows(whole.run) and len(rows(whole.run))==7
    a,b = (read_part(find_checkpoint(r.run), 'model') for r in (whole, resumed))
    assert same(a, b) and int(a['memory.region.steps'])==7
    found = [f['code'] for f in read_json(resumed.run/'health.json')['findings']]
    assert 'memory_bank' not in found and 'resumed_differently' not in found

def test_another_batch_size_on_resume_keeps_the_bank(train, world, runs, monkeypatch):
    stopped = train('stopped2', *RESUMED)
    held,seen = contents(stopped.system), spied(monkeypatch)
    start = {}
    class Look(Callback):
        def before_fit(self): start.update(contents(self.learner.system))
    resumed = fit(config(world, runs, 'stopped2', *RESUMED, '--train.batch_size', '3', '--train.steps', '5'), [Look()])
    assert same(start, held) and resumed.step==5 and all(math.isfinite(r.get('loss', 0.)) for r in curve(resumed))
    assert {len(s['clips']) for s in seen}=={3, 2} and read_jsonl(resumed.run/'log.jsonl')[-1]['status']=='done'
    assert int(resumed.system.memory['global'].steps)==5

def test_another_bank_on_resume_is_refused(train, world, runs):
    train('stopped1', *RESUMED)
    assert 'memory.region.visual' in refuse('train', '--config', 'fgclip_demo', *words(world, runs, 'stopped1', *RESUMED, '--bank.regions', '8'))

def test_a_last_batch_of_one_clip(train, world, runs, monkeypatch):
    seen = spied(monkeypatch)
    learner = train('rest', *BANKS, '--train.batch_size', '7', '--train.drop_last', 'false', '--train.steps', '4')
    assert [len(s['clips']) for s in seen]==[7, 1, 7, 1] and all(math.isfinite(r.get('loss', 0.)) for r in curve(learner))
    alone = curve(learner)[1]
    assert alone['candidates/global']==1 and alone['loss/global']==pytest.approx(0, abs=1e-6) and curve(learner)[3]['candidates/global']>1

def test_clips_and_captions_of_the_bank_are_no_negatives(build):
    "The same batch twice: everything in the bank is a pair of this very clip, and the loss is that of no bank"
    system = build(*BANKS, '--bank.warmup', '0').train()
    batch = batch_of(system)
    first,second = system.loss(batch), system.loss(batch)
    assert int(system.memory['global'].count)==8 and system.memory['global'].reads==2
    captions = [tuple(t) for t in batch['text'].tolist()]
    assert second['candidates/global']<=4+sum(len(set(captions))-1 for _ in captions)
    one = build(*BANKS, '--bank.warmup', '0', '--train.batch_size', '1').train()
    single = batch_of(one, 1)
    for _ in range(3): assert float(one.loss(single)['candidates/global'])==1

# ---------------------------------------------------------------- chunks and losses

ALL = '--loss.background_weight 0.5 --loss.quiet_weight 0.5 --loss.region_weight 1.0'.split()

@pytest.mark.parametrize('chunk', [1, 3, 64])
def test_frames_in_chunks_give_the_same_losses_and_gradients(build, chunk):
    def found(*more):
        system = build(*ALL, *more).train()
        losses = system.loss(batch_of(system))
        losses['loss'].backward()
        return losses, {k: p.grad for k,p in system.named_parameters()}
    (whole,grads),(parts,others) = found(), found('--model.chunk', chunk)
    for k in whole: torch.testing.assert_close(whole[k], parts[k], atol=1e-5, rtol=0)
    assert all(g is not None for g in grads.values())
    for k in grads: torch.testing.assert_close(grads[k], others[k], atol=1e-5, rtol=0)

def slow_siglip(a, b, scale, bias, same):
    total = 0.
    for i in range(len(a)):
        for j in range(len(b)):
            if i!=j and same(i, j): continue
            z = scale*float(a[i]@b[j])+bias
            total += math.log1p(math.exp(-z if i==j else z))
    return total/len(a)

def test_siglip_trains_and_its_biases_are_kept(train, build, runs):
    system = build('--loss.kind', 'siglip').train()
    batch = batch_of(system)
    with torch.no_grad(): found,f = system.loss(batch), system.features(batch)
    for name,a,b,ids in (('global', f.image, f.text, batch['text']), ('region', f.region, f.region_text, batch['region_text'])):
        assert float(found[f'loss/{name}'])==pytest.approx(slow_siglip(a.double(), b.double(), 10, -10, lambda i, j: ids[i].equal(ids[j])), rel=1e-4)
    learner = train('siglip', '--loss.kind', 'siglip', *BANKS, '--train.steps', '3')
    held = read_part(find_checkpoint(learner.run), 'model')
    for k,p in learner.system.bias.items():
        assert torch.equal(held[f"bias.{k}"], p.detach()) and p.item()!=-10
        assert [g['name'] for g in learner.optimizer.param_groups if any(p is q for q in g['params'])]==['scales_no_decay']
    assert not any(k.startswith('above_chance') for k in curve(learner)[0])

def test_hard_negatives_of_the_annotation_reach_the_loss(build):
    system = build('--data.train_json', 'negatives.json', '--loss.hard_negative_weight', '0.5', '--loss.region_weight', '1.0').train()
    clips = system.cfg.make_data().split('train').clips
    batch = batch_of(system, 8)
    with torch.no_grad():
        found,f,tokenize = system.loss(batch), system.features(batch), clip_tokenizer()
        text = lambda s: unit(system.clip.encode_text(tokenize([s])))[0].double()
        rows = []
        for track,region in zip([t for c in clips for t in c.tracks], f.region.double()):
            logits = [float(system.clip.hard_negative_logit_scale.exp())*float(region@text(s)) for s in (track.caption, *track.negatives)]
            rows.append(math.log(sum(math.exp(v-logits[0]) for v in logits)))
    assert {len(t.negatives) for c in clips for t in c.tracks}>={1}
    assert float(found['loss/hard_negative'])==pytest.approx(np.mean(rows), rel=1e-4)
    assert float(found['loss'])==pytest.approx(float(found['loss/global']+found['loss/region']+.5*found['loss/hard_negative']), rel=1e-5)
    system.loss(batch)['loss'].backward()
    assert float(system.clip.hard_negative_logit_scale.grad)!=0

def test_hard_negatives_of_some_regions_only(build, world):
    items = read_json(world.root/'negatives.json')
    regions = [r for item in items for r in item['bbox_info']]
    for r in regions[1:]: del r['negative_captions']
    write_json(world.root/'one_negative.json', items)
    system = build('--data.train_json', 'one_negative.json', '--loss.hard_negative_weight', '0.5').train()
    for n in (8, 1, 2):
        found = system.loss(batch_of(system, n))
        assert found['loss'].isfinite()
        found['loss'].backward()

def test_hard_negatives_train(train):
    learner = train('hard', '--data.train_json', 'negatives.json', '--loss.hard_negative_weight', '0.5', *BANKS, '--train.steps', '3')
    assert all(r['loss/hard_negative']>0 for r in curve(learner))

def test_long_captions_are_read_to_their_end(build):
    def found(kind, n):
        system = build('--model.long_captions', kind, '--data.train_json', f'long{n}.json').train()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            losses = system.loss(batch_of(system))
        losses['loss'].backward()
        return system, float(losses['loss/global'].detach())
    (long,a),(_,b) = (found('long', n) for n in (100, 101))
    assert a!=b and long.clip.text_filip_projection.weight.grad.abs().max()>0 and long.clip.long_position_embedding.weight.grad[77:].abs().max()>0
    assert long.clip.clip.text_projection.weight.grad.abs().max()>0                # the regions are read by the short way
    (cut,a),(_,b) = (found('cut', n) for n in (100, 101))
    assert a==b and not hasattr(cut.clip, 'text_filip_projection')
    with pytest.raises(DataError, match='long100.json, item 0.*global_caption.* tokens'): found('raise', 100)

@pytest.mark.parametrize('kind', ['raise', 'long'])
def test_a_set_without_regions(build, kind):
    "Only global terms have something to compare; the others add nothing, keep their gradients, and are not measured"
    system = build(*ALL, '--data.train_json', 'free.json', '--model.long_captions', kind).train()
    found = system.loss(batch_of(system))
    assert found['candidates/region'].item()==0 and found['loss/global'].item()>0 and found['loss'].isfinite()
    assert {k for k,v in found.items() if v.isnan()}=={'loss/region', 'recall_at_1/region', 'above_chance/region', 'spread/region', 'loss/background'}
    found['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())

def test_what_a_batch_does_not_measure_is_no_zero(world, tmp_path):
    "A log of every step, some of which have no region: there is no such loss, and no dip in the total"
    learner = fit(config(world, tmp_path, 'gaps', '--train.steps', '12', '--train.batch_size', '1', '--train.log_every', '1', '--loss.region_weight', '1', '--train.drop_last', 'false'))
    rows = curve(learner)
    bare = [r for r in rows if 'loss/region' not in r]
    assert 0<len(bare)<len(rows) and all('recall_at_1/region' not in r and 'above_chance/region' not in r and r['candidates/region']==0 for r in bare)
    assert all(r['loss/global'] is not None for r in rows)
    # before the first region nothing is known to be missing
    first = rows.index(next(r for r in rows if 'loss/region' in r))
    assert all(('loss' in r)==('loss/region' in r) for r in rows[first:]) and all('loss' in r for r in rows[:first])
    assert all(r['loss']==pytest.approx(r['loss/global']+r['loss/region'], rel=1e-5) for r in rows if 'loss/region' in r)
    # over several batches: means of those that had one
    joined = curve(fit(config(world, tmp_path, 'joined', '--train.steps', '12', '--train.batch_size', '1', '--train.log_every', '12', '--loss.region_weight', '1', '--train.drop_last', 'false')))
    assert joined[-1]['loss/region']==pytest.approx(np.mean([r['loss/region'] for r in rows if 'loss/region' in r]), rel=1e-3)
    assert joined[-1]['loss']==pytest.approx(np.mean([r['loss'] for r in rows if 'loss/region' in r]), rel=1e-3)

# ---------------------------------------------------------------- parameters, groups, checkpoints

@pytest.mark.parametrize('some', ['', '--loss.kind siglip --bank.regions 4', '--loss.hard_negative_weight 0.5', '--model.long_captions long', '--loss.kind siglip --loss.hard_negative_weight 1 --model.long_captions long --bank.regions 5 --bank.clips 3'])
def test_every_parameter_has_one_group_and_a_place_in_the_checkpoint(build, some, tmp_path):
    system = build(*some.split())
    groups = system.groups()
    assert group_faults(system, groups)=={} and sum(len(g['params']) for g in groups)==len(list(system.parameters()))
    with torch.no_grad():
        for v in [*system.parameters(), *(b for bank in system.banks().values() for b in bank.buffers())]: v.copy_((torch.rand(v.shape)*9).to(v.dtype))
    write_part(tmp_path, 'model', system.state_dict())
    held = read_part(tmp_path, 'model')
    assert {f'memory.{k}' for k in contents(system)}|{k for k,_ in system.named_parameters()}==held.keys()
    other = build(*some.split())
    load_weights(other, held)
    assert same(dict(other.named_parameters()), dict(system.named_parameters())) and same(contents(other), contents(system))
    o,r = system.cfg.optim.lr, system.cfg.rates
    for g in groups: assert g['lr']==o*getattr(r, g['name'].split('_')[0]) and (g['weight_decay']==0)==g['name'].endswith('no_decay')
    decayed = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    assert not decayed & {id(p) for p in [*system.clip.scales().values(), *system.bias.values()]}

# ---------------------------------------------------------------- evaluation by name

def test_the_official_list_alone_and_beside_captions(build, world):
    listed = {line.split()[0][:-4]: line.split()[1:] for line in world.annotation.read_text().splitlines()}
    for more in ((), ('--data.valid_json', 'test.json')):
        system = build('--data.valid_annotation', 'test_annotation.txt', *more)
        data = system.cfg.make_data().split('valid')
        assert sorted(data.segments)==sorted(listed)
        for name,(cls,*cells) in listed.items():
            truth = data.truth(name, world.frames[name])
            inside = np.zeros(world.frames[name], bool)
            for a,b in zip(*[iter(map(int, cells))]*2):
                if a>=0: inside[a:b] = True
            assert np.array_equal(truth, inside) and class_of(data, name)==cls and truth.any()==(cls!='Normal')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = scanned(system.eval()).metrics()
        assert 0<=found['frame_auc']<=1 and ('tiou' in found)==('clip_to_text_r1' in found)==bool(more)

def test_the_list_decides_where_both_are_given(build, world):
    "Its segments are the truth and its words are the classes, whatever regions and names say"
    lines = [line.split() for line in world.annotation.read_text().splitlines()]
    (world.root/'other.txt').write_text(''.join('  '.join([c[0], 'Shooting', '1', '5', '-1', '-1'] if c[1]!='Normal' else c)+'\n' for c in lines))
    data = build('--data.valid_annotation', 'other.txt', '--data.valid_json', 'test.json').cfg.make_data().split('valid')
    for c in lines:
        assert np.flatnonzero(data.truth(c[0][:-4], 32)).tolist()==([] if c[1]=='Normal' else [1, 2, 3, 4])
        if c[1]!='Normal': assert class_of(data, c[0][:-4])=='Shooting'

def test_a_video_that_one_of_the_two_does_not_have(build, world):
    lines = world.annotation.read_text().splitlines(keepends=True)
    (world.root/'short.txt').write_text(''.join(lines[1:]))
    with pytest.raises(DataError, match=f"short.txt: has no entry for '{lines[0].split()[0][:-4]}'"): build('--data.valid_annotation', 'short.txt', '--data.valid_json', 'test.json').cfg.make_data().split('valid')
    (world.root/'more.txt').write_text(''.join([*lines, 'Arson404_x264.mp4  Arson  3  9  -1  -1\n']))
    with pytest.raises(DataError, match='more.txt.*Arson404_x264'): build('--data.valid_annotation', 'more.txt').cfg.make_data().split('valid')
    (world.root/'calm.txt').write_text(''.join(line for line in lines if '  Normal  ' in line))
    with pytest.raises(DataError, match='calm.txt: no video has an event'): build('--data.valid_annotation', 'calm.txt').cfg.make_data().split('valid')
    write_json(world.root/'calm.json', [item for item in read_json(world.test) if not item['bbox_info']])
    with pytest.raises(DataError, match='calm.json: no video has an event'): build('--data.valid_json', 'calm.json', '--data.valid_annotation', 'test_annotation.txt').cfg.make_data().split('valid')

def test_videos_whose_names_are_numbers(build, world):
    "They have no class in their name, and are found where the annotation says"
    (world.root/'own').mkdir()
    items,lines = read_json(world.test), []
    for k,item in enumerate(items):
        name = item['f_path'].split('/')[-1][:-4]
        (world.root/'own'/f'{k:03}.mp4').write_bytes(world.path(name).read_bytes())
        item['f_path'] = f'own/{k:03}.mp4'
        lines.append(world.annotation.read_text().split(name)[1].splitlines()[0].replace('.mp4', f'{k:03}.mp4', 1))
    write_json(world.root/'numbers.json', items)
    (world.root/'numbers.txt').write_text(''.join(line+'\n' for line in lines))
    data = build('--data.train_json', 'numbers.json', '--data.valid_json', 'numbers.json', '--data.valid_annotation', 'numbers.txt').cfg.make_data()
    assert [p.name for p in data.split('train').paths]==[f'{k:03}.mp4' for k in range(4)]
    assert {class_of(data.split('valid'), f'{k:03}') for k in range(4)}=={'Arson', 'Explosion', 'Normal'}
    alone = build('--data.valid_annotation', 'numbers.txt', '--data.paths', '["{path}","own/{file}","{folder}/{file}"]')
    assert [p.name for p in alone.cfg.make_data().split('valid').paths]==[f'{k:03}.mp4' for k in range(4)]

LISTED = '--data.test_annotation test_annotation.txt --data.test_json null'.split()

def hand_made(system, frames, split, seed=0):
    "Scores that lean towards the truth, and what a scan would hold"
    rng,C = np.random.default_rng(seed), len(system.cfg.score.prompts)
    held = system.scan(system.cfg.make_data(), split)
    for name in held.videos.names:
        truth = held.videos.truth(name, frames[name])
        p = rng.random((frames[name], C))+.8*truth[:,None]*np.eye(C)[1]
        held.probabilities[name] = p/p.sum(1, keepdims=True)
        held.scores[name],held.truth[name] = 1-held.probabilities[name][:,0], truth
    return held

def test_full_evaluation_is_what_the_metrics_say(build, world):
    some = *LISTED, '--data.valid_annotation', 'test_annotation.txt', '--score.resamples', '20', '--score.threshold', '0.8'
    system = build(*some)
    held = hand_made(system, world.frames, 'test')
    data,truth = held.videos, {n: held.videos.truth(n, world.frames[n]) for n in world.names('test')}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found,seed = held.metrics(), system.cfg.seed
        classes = {n: n[:-8] for n in truth if truth[n].any()}
        own = {n: [(classes[n], *s) for s in data.segments[n]] for n in truth}
        names = ['Normal', *list(system.cfg.score.prompts)[1:]]
        asked = dict(alarm_threshold=.8, alarm_threshold_videos=0.) | frame_metrics(held.scores, truth, .8) | trivial_baselines(truth, seed) | frame_intervals(held.scores, truth, 20, seed) | per_class_metrics(held.scores, truth, classes, 20, seed)
        for key,way in (('map', 'corrected'), ('map_vadclip', 'vadclip')): asked |= {k.replace('map', key, 1): v for k,v in temporal_map(held.probabilities, own, names, way=way).items()}
        # what chooses the checkpoint is less
        chosen = hand_made(system, world.frames, 'valid').metrics()
        assert chosen==frame_metrics(held.scores, truth, .8) | trivial_baselines(truth, seed) | dict(alarm_threshold=.8, alarm_threshold_videos=0.)
    assert found==asked
    good,bad = (np.concatenate([held.scores[n][truth[n]==y] for n in truth]) for y in (True, False))
    assert found['frame_auc']==pytest.approx((good[:,None]>bad).mean()+.5*(good[:,None]==bad).mean())
    assert {k for k in found if k.endswith('/videos')}=={f'class/{c}/videos' for c in classes.values()}
    assert {'map/mean', 'map_vadclip/0.5', 'baseline/map/mean/perfect_video_label', 'interval/frame_auc/low', 'false_alarm_rate'}<=found.keys()

def test_scores_belong_to_videos_whatever_their_order(build, world):
    system = build(*LISTED)
    held,turned = (hand_made(system, world.frames, 'test') for _ in range(2))
    for k in ('probabilities', 'scores', 'truth'): setattr(turned, k, dict(reversed(getattr(held, k).items())))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        results = [some.metrics() for some in (held, turned)]
    assert results[0]==pytest.approx(results[1], abs=1e-12)

def test_a_scan_gives_every_frame_the_nearest_look(build, world):
    system = build('--data.valid_annotation', 'test_annotation.txt', '--data.valid_frames', '5', '--score.smooth', '1')
    C = len(system.cfg.score.prompts)
    def brightness(frames):
        p = torch.ones(len(frames), C)
        p[:,0] += frames.float().mean((1, 2, 3))/9
        return p/p.sum(1, keepdim=True)
    data = system.cfg.make_data()
    held = system.scan(data, 'valid')
    held.compare = lambda seen: FrameScores(brightness(seen.image), torch.ones(len(seen.image), 2, 2))
    for batch in evaluation_batches(data, 'valid', system.cfg.train, 'cpu'):
        held.add(batch, Look((ClipLook(FrameFeatures(image=x), 0, None, None, None, None) for x in batch['frames']), None, None))
    names = data.split('valid').names
    assert list(held.scores)==names
    for name in names:
        n = world.frames[name]
        index = uniform_indices(n, 5)
        seen = brightness(read_frames(VideoReader(world.path(name)), index, (32, 32))).numpy()
        for i in range(n):
            nearest = min(range(5), key=lambda k: (abs(index[k]-i), k))
            assert np.allclose(held.probabilities[name][i], seen[nearest], atol=1e-6) and held.scores[name][i]==pytest.approx(1-seen[nearest][0], abs=1e-6)

def test_a_class_without_prompts_is_told_and_costs_the_map_only(build, world):
    (world.root/'shooting.txt').write_text(world.annotation.read_text().replace('  Arson  ', '  Arsn  '))
    held = hand_made(build(*LISTED, '--data.test_annotation', 'shooting.txt'), world.frames, 'test')
    with pytest.warns(UserWarning, match="no class 'Arsn'.*did you mean 'Arson'"): found = held.metrics()
    assert 'class/Arsn/auc' in found and 'map/mean' not in found

@pytest.mark.parametrize('shares', [2, 3, 4])
def test_joined_scans_are_one_scan(build, world, shares):
    "Retrieval, boxes, classes and intervals too; what travels lies on the CPU and holds neither data nor model"
    system = build('--data.test_json', 'test.json', '--score.resamples', '20', '--train.valid_batch_size', '1').eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = scanned(system, 'test').metrics()
        first,*others = [pickle.loads(pickle.dumps(scanned(system, 'test', shares, r))) for r in range(shares)]
        assert not {'videos', 'compare'} & vars(first).keys()
        joined = scanned(system, 'test', shares, 0).join(others).metrics()
    assert {'clip_to_text_r1', 'tiou', 'map/mean', 'interval/frame_auc/low'}<=whole.keys()
    np.testing.assert_equal(joined, whole)

def test_the_test_set_needs_no_training_annotation(build):
    data = build('--data.train_json', 'gone.json').cfg.make_data()
    assert len(data.split('test'))==4 and data.split('valid') is None
    with pytest.raises(DataError, match='gone.json'): data.split('train')

# ---------------------------------------------------------------- prediction

@pytest.fixture(scope='module')
def run(train): return train('predicts', '--train.steps', '2', '--score.stride', '4').run

@pytest.fixture(scope='module')
def video(world): return world.path(world.names('test')[0])

def test_a_long_video_needs_the_memory_of_one_chunk(build, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    video = write_video(tmp_path/'long.mp4', (np.roll(still, i, 1) for i in range(3000)))
    held,most,real = [], [], prediction.next_frames
    def next_frames(*args):
        res = real(*args)
        held.append((weakref.ref(res), len(res)))
        most.append(sum(n for ref,n in held if ref() is not None))
        return res
    monkeypatch.setattr(prediction, 'next_frames', next_frames)
    taken,stream = [], VideoReader.stream
    monkeypatch.setattr(VideoReader, 'stream', lambda self, index, *args, **more: taken.append(len(index)) or stream(self, index, *args, **more))
    monkeypatch.delattr(VideoReader, 'get_batch') # no chunk is ever held at the size of the source
    system = build('--score.stride', '8', '--score.chunk', '16').eval()
    found, = system.predict(video)
    assert len(found)==3000 and sum(n for _,n in held)==375 and max(most)<=16
    assert taken==[375] # opened once, and read in one pass
    assert found.heat.shape[0]==375 and np.isfinite(found.scores).all()

def test_scores_do_not_depend_on_the_chunk(build, video):
    one,other = (next(build('--score.chunk', n, '--score.stride', '1').eval().predict(video)) for n in (4, 64))
    assert np.allclose(one.scores, other.scores, atol=1e-6) and np.allclose(one.probabilities, other.probabilities, atol=1e-6) and np.allclose(one.heat, other.heat, atol=1e-3)

def test_prompts_of_a_file_replace_those_of_the_run(run, video, tmp_path):
    (tmp_path/'own.yaml').write_text('Flood: water in the street\nnormal:\n- a dry street\n- a quiet day\n"night: 1.5": [dark]\n')
    code,out,err = vadnb('predict', video, '--run', run, '--prompts', tmp_path/'own.yaml', '--out', tmp_path)
    assert code==0, err
    found = read_json(tmp_path/f'{video.stem}.json')
    assert found['classes']==['Flood', 'normal', 'night: 1.5']
    rows = (tmp_path/f'{video.stem}.csv').read_text().splitlines()
    assert rows[0]=='frame,seconds,score,Flood,normal,night: 1.5'
    for row in rows[1:]:
        _,_,score,*p = map(float, row.split(','))
        assert sum(p)==pytest.approx(1, abs=1e-5)
    assert {s['label'] for s in found['segments']+found['most_anomalous']}<={'Flood', 'night: 1.5'}

@pytest.mark.parametrize('text,says', [('- a\n', 'found list'), ('', 'found nothing'), ('normal: x\n', 'at least one other class'), ('a: x\nb: y\n', "'normal'"), ('normal: x\nfire: ""\n', "'fire' must be a text"),
    ('normal: x\nfire: []\n', "'fire' must be a text"), ('normal: x\nfire: 3\n', "'fire' must be a text"), ('normal: x\nfire: [a, 3]\n', "'fire' must be a text"), ('normal: x\nfire: [" "]\n', "'fire' must be a text"), ('normal: x\nfire: " "\n', "'fire' must be a text"),
    ('normal: x\nnormal: y\nfire: z\n', 'written twice'), ('normal: [x\n', 'not valid YAML'), (f'normal: x\nfire: {"very "*99}\n', '101 tokens')])
def test_bad_prompts(run, video, tmp_path, text, says):
    (tmp_path/'bad.yaml').write_text(text)
    line = refuse('predict', video, '--run', run, '--prompts', tmp_path/'bad.yaml', '--out', tmp_path/'out')
    assert says in line and not (tmp_path/'out').exists()

def test_a_missing_prompts_file(run, video, tmp_path): assert 'nowhere.yaml: no such' in refuse('predict', video, '--run', run, '--prompts', tmp_path/'nowhere.yaml')

def test_overlay_and_heat_can_be_read_by_others(run, video, tmp_path):
    code,out,err = vadnb('predict', video, '--run', run, '--overlay', 'true', '--out', tmp_path)
    assert code==0, err
    film,source = VideoReader(tmp_path/f'{video.stem}_overlay.mp4'), VideoReader(video)
    assert len(film)==len(source) and film.get_batch([0, len(film)-1]).shape[1]>source.get_batch([0]).shape[1]
    with np.load(tmp_path/f'{video.stem}_heat.npz', allow_pickle=False) as held: heat,frames = held['heat'], held['frames']
    assert heat.shape==(len(frames), 4, 4) and len(frames)==-(-len(source)//4) and (np.diff(frames)>0).all() and frames[-1]<len(source) and -1<=heat.min()<heat.max()<=1 # cosines

def test_where_boxes_begin_is_set_by_validation_boxes_and_used_everywhere(train, video, tmp_path):
    "Kept in the card, told by eval and predict; a card without it is one that no boxes calibrated"
    learner = train('boxes', '--data.valid_json', 'valid.json', '--train.steps', '1', '--train.evaluate_every', '1', '--score.stride', '4')
    card = find_checkpoint(learner.run, 'last')/'card.json'
    whole = read_json(card)['calibration']['value']
    kept = whole['cut']
    logged = learner.log.last('valid')
    assert kept['share']==logged['box_cut'] and kept['boxes']==logged['box_cut_boxes']>0 and kept['overlap']==pytest.approx(logged['box_iou'])
    changed = kept|dict(share=.2 if kept['share']>.5 else .8)
    areas = {}
    for known,says in ((kept, f"calibrated on {kept['boxes']} boxes of validation"), (changed, f"{changed['share']:.0%} of a map's range"), (None, 'half of a map\'s range on, the default: no boxes calibrated it')):
        write_json(card, read_json(card) | dict(calibration=known and dict(step=1, value=whole|dict(cut=known))))
        for command in (('eval',), ('predict', video, '--out', tmp_path/'out')):
            code,out,err = vadnb(*command, '--run', learner.run)
            assert code==0 and says in out, out+err
        found = read_json(learner.run/'eval.json')['metrics']
        assert (found['box_cut'], found['box_cut_boxes'])==((known or {}).get('share', .5), (known or {}).get('boxes', 0))
        assert {'box_ap', 'box_ap/0.1', 'box_ap/0.9', 'baseline/box_ap/prior'}<=found.keys() and found['box_ap']==found['box_ap/0.5']<=found['box_ap/0.1']
        told = read_json(tmp_path/'out'/f'{video.stem}.json')
        assert told['box_cut'].get('share')==(known or {}).get('share')
        x1,y1,x2,y2 = told['most_anomalous'][0]['box']
        areas[found['box_cut']] = (x2-x1)*(y2-y1)
        shutil.rmtree(tmp_path/'out')
    assert areas[min(areas)]>=areas[max(areas)]
    write_json(card, read_json(card) | dict(calibration=dict(step=1, value=whole|dict(cut=kept|dict(share=2)))))
    assert 'card.json: box cut, share: 2 is no finite number' in refuse('predict', video, '--run', learner.run)

def test_boxes_and_maps_are_free_of_the_temperature(build, video):
    system,found = build('--score.stride', '4').eval(), []
    for scale in (10, 50, 100):
        for p in system.clip.scales().values(): p.data.fill_(math.log(scale))
        found += system.predict(video)
    for other in found[1:]:
        assert np.array_equal(found[0].heat, other.heat) and not np.array_equal(found[0].scores, other.scores)
        assert [found[0].box_at(i) for i in range(len(other))]==[other.box_at(i) for i in range(len(other))]

def test_a_clip_of_ucf101(run, shared, tmp_path):
    video = shared/'data/video/torchvision/v_SoccerJuggling_g23_c01.avi'
    code,out,err = vadnb('predict', video, '--run', run, '--out', tmp_path, '--score.stride', '16')
    assert code==0, err
    found = read_json(tmp_path/f'{video.stem}.json')
    assert found['frames']==len(found['scores'])==len(VideoReader(video)) and all(0<=s<=1 for s in found['scores'])

# ---------------------------------------------------------------- verification

def verified(world, runs, *more): return vadnb('verify', '--config', 'fgclip_demo', *words(world, runs, 'verified', *more))
def row(out, what): return next((line.split(None, 1)[0], line) for line in out.splitlines() if f' {what}  ' in line)

def test_what_a_sound_set_is_told(world, runs):
    code,out,_ = verified(world, runs, '--data.valid_annotation', 'test_annotation.txt', *BANKS)
    assert code==0 and out.splitlines()[-1]=='ready to train' and 'FAIL' not in out and 'warn' not in out
    items = read_json(world.train)
    regions,captions = [r for i in items for r in i['bbox_info']], [i['global_caption'] for i in items]
    n = len(regions)/2
    assert f'{n:.1f} per batch and process, a guess costs {math.log(n):.2f}; {n+16:.1f} and {math.log(n+16):.2f} with the full bank' in row(out, 'region candidates')[1]
    assert '4.0 per batch and process, a guess costs 1.39; 20.0 and 3.00 with the full bank' in row(out, 'global candidates')[1]
    tokenize = clip_tokenizer()
    for what,texts in (('clip', captions), ('region', [r['caption'] for r in regions])):
        assert str(max(len(tokenize.ids(t)) for t in texts)) in row(out, f'train {what} tokens')[1] and '77' in row(out, f'train {what} tokens')[1]
    assert '4 normal and 4 abnormal' in row(out, 'train videos')[1] and '2 normal and 2 abnormal' in row(out, 'valid videos')[1]

def missing(items): items[0]['f_path'] = 'Arson404_x264.mp4'
def beyond(items): next(r for i in items for r in i['bbox_info'])['end_frame'] = 500
@pytest.mark.parametrize('change,says', [(missing, 'Arson404_x264.mp4'), (beyond, 'bbox_info[0].end_frame: 500')])
def test_verify_finds_what_would_end_training(world, runs, change, says):
    items = read_json(world.train)
    change(items)
    write_json(world.root/'broken.json', items)
    code,out,err = verified(world, runs, '--data.train_json', 'broken.json')
    assert code==1 and err=='' and out.splitlines()[-1]=='not ready' and any(line.startswith('FAIL') and says in line for line in out.splitlines())

def test_verify_of_one_candidate(world, runs):
    code,out,_ = verified(world, runs, '--train.batch_size', '1')
    assert code==1 and row(out, 'global candidates')[0]=='FAIL' and 'raise --train.batch_size, or give it a bank' in row(out, 'global candidates')[1]
    assert verified(world, runs, '--train.batch_size', '1', *BANKS)[0]==0

def test_verify_without_a_normal_video(world, runs):
    code,out,err = verified(world, runs, '--data.train_json', 'crimes.json')
    assert code==0 and row(out, 'normal videos')[0]=='warn' and out.splitlines()[-1]=='ready to train'

def test_verify_names_the_seven_parameters_of_the_guide(world, runs):
    names = 'visual_projection.weight roi_projection.weight text_projection.weight text_filip_projection.weight logit_scale logit_scale_finegraind logit_scale_hardneg'.split()
    _,out,_ = verified(world, runs)
    said = {n: row(out, n)[1] for n in names}
    off = {n for n,line in said.items() if 'switches it on' in line}
    assert off=={'text_filip_projection.weight', 'logit_scale_hardneg'} and all('shape (' in said[n] and 'trained at' in said[n] for n in names if n not in off)
    assert 'off; --loss.hard_negative_weight 0.5 switches it on' in said['logit_scale_hardneg'] and 'off; --model.long_captions long' in said['text_filip_projection.weight']
    _,out,_ = verified(world, runs, '--loss.hard_negative_weight', '0.5', '--model.long_captions', 'long', '--data.train_json', 'negatives.json', '--rates.scales', '0')
    assert all('shape (' in row(out, n)[1] for n in names) and all(row(out, n)[0]=='warn' and 'rates.scales is 0' in row(out, n)[1] for n in names[4:])

@pytest.mark.parametrize('by,lost', [(2, 0), (3, 4)])
def test_counts_beyond_the_slack_are_told_together(world, run, tmp_path, by, lost):
    "`vadnb eval` of four videos whose annotation counts other frames than there are"
    from vadnb.data.video import VideoReader
    from vadnb.data.ucf_crime import read_annotation
    known = read_annotation(world.root/'test_annotation.txt')
    write_json(world.root/'counted.json', {n: v.to_json() | dict(frames=len(VideoReader(world.path(n)))+by) for n,v in known.items()})
    code,out,err = vadnb('eval', '--run', run, '--data.test_annotation', 'counted.json', '--out', tmp_path/'found.json')
    assert (code==2)==bool(lost) and err.count('marked in another encoding')==lost
    if lost: assert len(err.strip().splitlines())==1 and f'{lost} of {len(known)} test videos cannot be read: ' in err and '--train.on_bad_sample skip' in err

def test_verify_counts_tokens(world, runs):
    code,out,_ = verified(world, runs, '--data.train_json', 'long100.json')
    assert code==1 and any(line.startswith('FAIL') and 'tokens' in line for line in out.splitlines())
    code,out,_ = verified(world, runs, '--data.train_json', 'long100.json', '--model.long_captions', 'cut')
    assert code==0 and row(out, 'train clip tokens')[0]=='warn'
    code,out,_ = verified(world, runs, '--data.train_json', 'long100.json', '--model.long_captions', 'long')
    assert code==0 and row(out, 'train clip tokens')[0]=='ok' and '248' in row(out, 'train clip tokens')[1] and '77' in row(out, 'train region tokens')[1]

def test_verify_runs_every_loss(world, runs):
    code,out,_ = verified(world, runs, '--data.train_json', 'negatives.json', '--loss.hard_negative_weight', '0.5', *ALL)
    assert code==0
    for name in ('global', 'region', 'background', 'quiet', 'hard_negative'): assert f'{name} ' in row(out, 'one batch')[1]

@pytest.mark.parametrize('some', [(), ('--data.valid_json', 'test.json')])
def test_verify_compares_the_list_with_the_videos(world, runs, some):
    "What the first evaluation would refuse is told before training"
    far = [[*line.split()[:2], '900', '950', '-1', '-1'] if '  Normal  ' not in line else line.split() for line in world.annotation.read_text().splitlines()]
    (world.root/'far.txt').write_text(''.join('  '.join(c)+'\n' for c in far))
    code,out,_ = verified(world, runs, '--data.valid_annotation', 'far.txt', *some)
    assert code==1 and row(out, 'valid decoding')[0]=='FAIL' and '900' in row(out, 'valid decoding')[1]
    counted = from_ucf_annotation(world.annotation)
    for v in counted.values(): v['frames'] = 99
    write_json(world.root/'counted.json', counted)
    code,out,_ = verified(world, runs, '--data.valid_annotation', 'counted.json', *some)
    assert code==1 and row(out, 'valid decoding')[0]=='FAIL' and '99 frames' in row(out, 'valid decoding')[1]

def test_verify_asks_for_a_full_batch(world, runs):
    code,out,_ = verified(world, runs, '--train.batch_size', '9')
    assert code==1 and '8 training samples do not fill one batch of 9' in out
    assert verified(world, runs, '--train.batch_size', '9', '--train.drop_last', 'false')[0]==0

def test_verify_knows_the_length_of_the_run(world, runs):
    code,out,_ = verified(world, runs, '--train.steps', '4', '--optim.warmup', '200')
    assert code==1 and "'optim.warmup' of 200 is 200 steps, but the run has only 4" in out
    code,out,_ = verified(world, runs, '--train.steps', '4', *BANKS, '--bank.warmup', '4')
    assert code==0 and 'warn' in out and 'will never be read' in out

def test_verify_asks_nothing_of_a_loss_that_is_off(world, runs):
    code,out,_ = verified(world, runs, '--data.train_json', 'free.json', '--loss.region_weight', '0')
    assert code==0 and 'FAIL' not in out

# ---------------------------------------------------------------- configuration

@pytest.mark.parametrize('some,key', [('--bank.regions -1', 'bank.regions'), ('--bank.regions 4.5', 'bank.regions'), ('--bank.clips -1', 'bank.clips'), ('--bank.warmup -1', 'bank.warmup'), ('--bank.size 3', 'bank.size'),
    ('--bank.regions 4 --loss.region_weight 0', 'bank.regions'), ('--bank.clips 4 --loss.global_weight 0', 'bank.clips'), ('--loss.kind clip', 'loss.kind'), ('--loss.chunk 0', 'loss.chunk'),
    ('--loss.region_weight -1', 'loss.region_weight'), ('--loss.hard_negative_weight -0.5', 'loss.hard_negative_weight'), ('--loss.background_weight -1', 'loss.background_weight'), ('--loss.quiet_weight -1', 'loss.quiet_weight'),
    ('--loss.global_weight 0 --loss.region_weight 0', 'loss.global_weight'), ('--loss.global_frames some', 'loss.global_frames'), ('--loss.mask_same_caption 2', 'loss.mask_same_caption'),
    ('--model.chunk 0', 'model.chunk'), ('--model.chunk all', 'model.chunk'), ('--model.long_captions shorten', 'model.long_captions'), ('--model.size huge', 'huge'), ('--model.log_scale 4.7', 'model.log_scale'), ('--model.activation gelu', 'model.activation'), ('--model.tokenizer nowhere', 'nowhere'),
    ('--score.smooth 4', 'score.smooth'), ('--score.smooth 0', 'score.smooth'), ('--score.smooth -3', 'score.smooth'), ('--score.resamples -1', 'score.resamples'), ('--score.view places', 'score.view'), ('--score.stride 0', 'score.stride'), ('--score.chunk 0', 'score.chunk'),
    ('--score.threshold 1.5', 'score.threshold'), ('--score.folder_fps 0', 'score.folder_fps'), ('--score.prompts {"fire":["a"],"b":["c"]}', 'score.prompts'), ('--score.prompts {"normal":["a"]}', 'score.prompts'), ('--score.prompts {"normal":["a"],"Normal":["b"],"c":["d"]}', 'score.prompts'), ('--score.prompts {"normal":["a"],"b":[]}', 'score.prompts'),
    ('--rates.text -1', 'rates.text'), ('--data.event_share 0', 'data.event_share'), ('--data.valid_frames 0', 'data.valid_frames'), ('--data.paths []', 'data.paths'), ('--data.sampling often', 'data.sampling'), ('--data.size [33,32]', 'data.size')])
def test_values_that_cannot_be(world, runs, some, key):
    assert key in refuse('verify', '--config', 'fgclip_demo', *words(world, runs, 'refused', *some.split()))
    assert not (runs/'refused').exists()
