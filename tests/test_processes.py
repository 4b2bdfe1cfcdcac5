"Two processes do what one does: the same parameters, one writer, exact resumption, and no waiting for the dead"
import json, os, signal, socket, sys, time
from pathlib import Path
import pytest
import torch
from toy_system import StopAt, as_a_program, config, curve, differences, processes, rows, run_file
from vadnb.core import VadnbError, read_json
from vadnb.train.callbacks import Callback
from vadnb.train.checkpoint import checkpoint_folders, find_checkpoint, read_part
from vadnb.train.feed import EpochBatches
from vadnb.train.learner import fit

here = Path(__file__).resolve().parent

def rank_main(rank, world, port, out, f, words, named):
    "For another process: one of several, as `torchrun` would start it"
    as_a_program()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    writers = set()
    sys.addaudithook(lambda event, args: writers.add(rank) if event in ('os.mkdir', 'os.rename', 'os.symlink') and any(str(out) in str(a) for a in args) else None)
    try: f(*words, **named)
    except VadnbError as e: (out.parent/f'{out.name}.error{rank}').write_text(str(e)); os._exit(2)
    except Exception as e: (out.parent/f'{out.name}.error{rank}').write_text(repr(e)); os._exit(1)
    (out.parent/f'{out.name}.writers{rank}').write_text(str(sorted(writers)))
    os._exit(0)

def start(out, f, *words, world=2, **named):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    group = [processes.Process(target=rank_main, args=(rank, world, port, out, f, words, named)) for rank in range(world)]
    for p in group: p.start()
    return group

def ended(group, seconds=300):
    "Exit codes; a process that hangs is killed and fails the test"
    deadline = time.time()+seconds
    for p in group: p.join(max(0, deadline-time.time()))
    hung = [p.pid for p in group if p.is_alive()]
    for p in group: p.kill()
    assert not hung, 'a process waits for ever'
    return [p.exitcode for p in group]

def together(out, f, *words, **named):
    "Run `f` in two processes; everything that is written must be written by the first"
    assert ended(start(out, f, *words, **named))==[0, 0], [p.read_text() for p in sorted(out.parent.glob(f'{out.name}.error*'))]
    assert [(out.parent/f'{out.name}.writers{r}').read_text() for r in (0, 1)]==['[0]', '[]']

def train(folder, name, stop=None, extra=(), **named): fit(config(folder, name, **named), [*([StopAt(stop)] if stop else []), *(c() for c in extra)])

def parameters(run): return read_part(find_checkpoint(run), 'model')

def close(a, b, eps=1e-5):
    assert a.keys()==b.keys()
    for k in a: assert (a[k]-b[k]).abs().max()<=eps, k

QUIET = dict(noisy=False, optim=dict(name='sgd', lr=.05))

@pytest.mark.parametrize('accumulate', [1, 3])
def test_two_processes_give_the_parameters_of_one(tmp_path, accumulate):
    "At the same global batch; with accumulation gradients are exchanged once per step"
    train(tmp_path, 'one', batch_size=4, accumulate=accumulate, **QUIET)
    together(tmp_path/'two', train, tmp_path, 'two', batch_size=2, accumulate=accumulate, **QUIET)
    close(parameters(tmp_path/'one'), parameters(tmp_path/'two'))
    for a,b in zip(rows(tmp_path/'one', 'train'), rows(tmp_path/'two', 'train'), strict=True):
        assert a['loss']==pytest.approx(b['loss'], abs=1e-5) and a['grad_norm']==pytest.approx(b['grad_norm'], abs=1e-4)
    assert rows(tmp_path/'two', 'start')[0]['batch_size']==rows(tmp_path/'one', 'start')[0]['batch_size']
    assert [r['kind'] for r in rows(tmp_path/'two', 'end')]==['end'] and read_json(tmp_path/'two'/'health.json')['findings']==[]

def test_gradients_are_exchanged_once_per_step(tmp_path):
    together(tmp_path/'run', count_exchanges, tmp_path)
    assert (tmp_path/'run.exchanges').read_text()=='6 steps, 6 exchanges, 15 batches'

def count_exchanges(folder):
    seen = dict(exchanges=0)
    class Count(Callback):
        batches = 0
        def before_fit(self):
            def hook(state, bucket):
                seen['exchanges'] += 1
                return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)
            self.learner.model.register_comm_hook(None, hook)
        def after_batch(self): self.batches += 1
        def after_fit(self):
            if self.learner.main: (folder/'run.exchanges').write_text(f"{self.learner.step} steps, {seen['exchanges']} exchanges, {self.batches} batches")
    fit(config(folder, 'run', batch_size=2, accumulate=3, epochs=3, **QUIET), [Count()])

def test_a_resumed_run_of_two_processes_is_exact(tmp_path):
    "With dropout, whose draws differ between the processes and are kept for each"
    together(tmp_path/'whole', train, tmp_path, 'whole', batch_size=2, log_every=2, save_every=4, unit='step')
    together(tmp_path/'run', train, tmp_path, 'run', batch_size=2, log_every=2, save_every=4, unit='step', stop=5)
    together(tmp_path/'run', train, tmp_path, 'run', batch_size=2, log_every=2, save_every=4, unit='step')
    assert curve(tmp_path/'run')==curve(tmp_path/'whole') and differences(tmp_path/'run', tmp_path/'whole')==[]
    own = read_part(find_checkpoint(tmp_path/'run'), 'state')['processes']
    assert len(own)==2 and not torch.equal(own[0]['random']['torch'], own[1]['random']['torch'])
    # another number of processes is another course of dropout, and said to be
    fit(config(tmp_path, 'run', batch_size=4, epochs=5, log_every=2, save_every=4, unit='step'))
    assert rows(tmp_path/'run', 'resume')[-1]['changed']['processes']==[2, 1]

class Slow(Callback):
    def after_step(self): time.sleep(.02)

@pytest.mark.parametrize('rank', [0, 1])
def test_a_signal_to_one_process_stops_both(tmp_path, rank):
    group = start(tmp_path/'run', train, tmp_path, 'run', extra=[Slow], batch_size=2, epochs=None, steps=5000, save_every=1000, unit='step', evaluate_every=1000, log_every=3)
    while not (tmp_path/'run'/'log.jsonl').exists() or len(rows(tmp_path/'run', 'train'))<2: assert group[0].is_alive() and group[1].is_alive(); time.sleep(.02)
    os.kill(group[rank].pid, signal.SIGTERM)
    assert ended(group)==[0, 0]
    end = rows(tmp_path/'run', 'end')[-1]
    assert (end['status'], end['reason'])==('stopped', 'received SIGTERM') and find_checkpoint(tmp_path/'run').name==f"step-{end['step']:06d}"

def train_watched(*words, **named):
    from vadnb.train.processes import Processes
    Processes.patience = 9.
    os.dup2(os.open(words[0]/f"said{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    train(*words, **named)

@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_that_is_stopped_ends_the_other_in_one_line(tmp_path, rank):
    "A stopped process keeps its connections, so that nothing but silence tells of it; takes as long as the patience of 9 s"
    group = start(tmp_path/'run', train_watched, tmp_path, 'run', extra=[Slow], batch_size=2, epochs=None, steps=50_000, save_every=1000, unit='step', evaluate_every=50_000, log_every=3)
    while not (tmp_path/'run'/'log.jsonl').exists() or len(rows(tmp_path/'run', 'train'))<2: assert group[0].is_alive() and group[1].is_alive(); time.sleep(.02)
    os.kill(group[rank].pid, signal.SIGSTOP)
    group[1-rank].join(60)
    code = group[1-rank].exitcode
    for p in group: p.kill(); p.join()
    said = [l for l in (tmp_path/f'said{1-rank}').read_text().splitlines() if 'vadnb' in l]
    assert code==1 and len(said)==1 and f'process {rank} of 2 has given no sign of life for 9 s' in said[0], said

class Poison(Callback):
    "A loss that is NaN in the second process"
    def after_batch(self):
        if self.learner.step==3 and not self.learner.main: self.learner.losses['loss'] = self.learner.losses['loss']*float('nan')

class Broken(Callback):
    "A mistake in the code, in one process only"
    def __init__(self): self.order = 99
    def after_step(self):
        if self.learner.step==3 and self.learner.main==(type(self) is Broken): raise ZeroDivisionError('a mistake')
class BrokenSecond(Broken): pass

@pytest.mark.parametrize('extra,says', [(Poison, ['not finite at step 4', 'not finite at step 4']), (Broken, ['a mistake', '']), (BrokenSecond, ['', 'a mistake'])])
def test_what_kills_one_ends_both(tmp_path, extra, says):
    codes = ended(start(tmp_path/'run', train, tmp_path, 'run', extra=[extra], batch_size=2, unit='step', **QUIET))
    assert all(codes)
    told = [p.read_text() if (p := tmp_path/f'run.error{r}').exists() else '' for r in (0, 1)]
    assert all(s in t for s,t in zip(says, told)), told
    assert [p.name for p in checkpoint_folders(tmp_path/'run')][-1]=='step-000003' and rows(tmp_path/'run', 'end')[-1]['status']=='failed'
    if extra is Poison:
        # the first process writes what the second one saw
        found = read_json(tmp_path/'run'/'health.json')['findings'][0]
        seen = told[1].split('with samples ')[1].split(';')[0].split(', ')
        assert found['code']=='not_finite' and found['evidence']['samples']==seen and len(seen)==4 and told[0]==told[1]

@pytest.mark.parametrize('what', ['finished', 'no run', 'full'])
def test_what_the_first_process_refuses_all_refuse(tmp_path, what):
    "The same line from each, and nobody waits"
    if what=='finished': fit(config(tmp_path, 'run', batch_size=4))
    if what=='no run': (tmp_path/'run').mkdir(); (tmp_path/'run'/'photo.jpg').touch()
    group = start(tmp_path/'run', train_on_a_full_disk if what=='full' else train, tmp_path, 'run', batch_size=2)
    assert ended(group)==[2, 2]
    told = [(tmp_path/f'run.error{r}').read_text() for r in (0, 1)]
    assert told[0]==told[1] and {'finished': 'is finished', 'no run': 'is not a run folder', 'full': 'No space left'}[what] in told[0]

def train_on_a_full_disk(folder, name, **named):
    import errno
    from vadnb.train import checkpoint
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoint.save_file = full
    train(folder, name, **named)

def test_skipped_samples_of_both_are_reported(tmp_path):
    bad = [2, 3, 5, 7, 11, 13]
    together(tmp_path/'run', train, tmp_path, 'run', points=16, bad=bad, batch_size=8, accumulate=1, epochs=1, on_bad_sample='skip', optim=dict(warmup=0))
    found = [f for f in read_json(tmp_path/'run'/'health.json')['findings'] if f['code']=='skipped_samples']
    assert len(found)==1 and sorted(found[0]['evidence']['samples'])==sorted(f'sample {i}: point{i}.mp4: damaged' for i in bad)

def test_a_batch_without_any_sample_ends_both(tmp_path):
    "The others could not exchange gradients with a process that has none"
    bad = [i for _,i in EpochBatches(16, 2, 42, 2, 1).batch(1)]
    assert all(ended(start(tmp_path/'run', train, tmp_path, 'run', points=16, bad=bad, batch_size=2, on_bad_sample='skip')))
    assert 'every sample of a batch was unreadable' in (tmp_path/'run.error1').read_text()

# ---------------------------------------------------------------- fgclip

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from vadnb.worlds.street import street_world
    return street_world(tmp_path_factory.mktemp('world')/'street', videos=8, size=(48, 64), frames=(32, 36), valid_videos=0, test_videos=2, anomalous=.5)

def fgclip_words(world, folder, name, batch, accumulate):
    return ['--data_root', str(world.root), '--runs', str(folder), '--name', name, '--data.valid_json', 'test.json', '--data.frames', '4', '--data.size', '[32,32]', '--train.batch_size', str(batch), '--train.accumulate', str(accumulate),
            '--train.steps', '3', '--train.workers', '0', '--train.log_every', '1', '--train.unit', 'step', '--train.evaluate_every', '3', '--train.save_every', '3', '--train.trackers', '[]', '--train.device', 'cpu',
            '--optim.name', 'sgd', '--optim.lr', '0.01', '--optim.warmup', '0', '--bank.regions', '5', '--bank.clips', '11', '--bank.warmup', '1']

def train_fgclip(*words):
    from vadnb.systems.registry import load_config
    fit(load_config('fgclip_demo', fgclip_words(*words)))

@pytest.mark.parametrize('accumulate', [1, 2])
def test_fgclip_in_two_processes(tmp_path, world, accumulate):
    "Contrastive losses see the clips and the regions of both, however unevenly the regions fall; the banks hold the same rows in the same order"
    train_fgclip(world, tmp_path, 'one', 4, accumulate)
    together(tmp_path/'two', train_fgclip, world, tmp_path, 'two', 2, accumulate)
    close(parameters(tmp_path/'one'), parameters(tmp_path/'two'))
    a,b = (rows(tmp_path/n, 'train') for n in ('one', 'two'))
    assert [r['loss'] for r in a]==pytest.approx([r['loss'] for r in b], abs=1e-4)
    told = [k for k in a[0] if k.split('/')[0] in ('candidates', 'above_chance', 'recall_at_1')]
    assert len(told)==6
    for x,y in zip(a, b): assert {k: x[k] for k in told}==pytest.approx({k: y[k] for k in told}, abs=1e-4)
    assert a[-1]['candidates/global']>4, 'the bank was not read'
    banks = [{k: v for k,v in parameters(tmp_path/n).items() if k.startswith('memory.')} for n in ('one', 'two')]
    assert {k for k,v in banks[0].items() if not v.is_floating_point() and not torch.equal(v, banks[1][k])}==set()
    assert banks[0]['memory.region.count']>0 and banks[0]['memory.global.count']==11
    spread = regions_per_rank(world)
    assert any(x!=y for x,y in spread) and any(0 in pair for pair in spread), 'this test wants batches with regions in one process only'

def regions_per_rank(world):
    "Regions of the first batches, (first process, second process)"
    from vadnb.data.regions import read_regions
    clips = read_regions(world.train)
    ranks = [EpochBatches(len(clips), 2, 0, 2, r) for r in (0, 1)]
    return [tuple(sum(len(clips[i].tracks) for _,i in b.batch(k)) for b in ranks) for k in range(3)]

def test_torchrun(tmp_path):
    "As a user starts several processes; SIGTERM to the launcher is a polite stop of all of them"
    named = dict(batch_size=2, epochs=None, steps=100_000, unit='step', save_every=100_000, evaluate_every=100_000)
    words = ['--standalone', '--nproc_per_node', '2', here/'toy_system.py', json.dumps([str(tmp_path), 'run', named])]
    # the launcher is a fork of a process that has torch; those that it starts are started anew
    process = processes.Process(target=run_file, args=('torch.distributed.run', words, tmp_path/'said'))
    process.start()
    log,deadline = tmp_path/'run'/'log.jsonl', time.time()+600
    while (not log.exists() or len(rows(tmp_path/'run', 'train'))<2) and process.is_alive() and time.time()<deadline: time.sleep(.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    err = (tmp_path/'said').read_text()
    assert log.exists(), err[-2000:]
    end = rows(tmp_path/'run', 'end')
    assert end and (end[-1]['status'], end[-1]['reason'])==('stopped', 'received SIGTERM'), err[-2000:]
    assert rows(tmp_path/'run', 'start')[0]['world']==2 and find_checkpoint(tmp_path/'run').name==f"step-{end[-1]['step']:06d}"
