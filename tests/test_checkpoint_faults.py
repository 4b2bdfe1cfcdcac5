"Kills at any moment, full and read-only disks, damaged files, and resuming from somewhere else"
import errno, json, os, shutil, signal, subprocess, time
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from toy_system import FailAt, StopAt, as_a_program, config, curve, different, differences, processes, rows, snapshots
from toy_system import train, whole
from vadnb.core import CheckpointError, ConfigError, DataError, read_json, read_yaml
from vadnb.train import checkpoint
from vadnb.train.checkpoint import checkpoint_folders, find_checkpoint, lock_run
from vadnb.train.learner import fit
from vadnb.report.run import read_run

def same(run, other):
    assert curve(run)==curve(other)
    assert differences(run, other)==[]

def refused(cfg, *words, error=CheckpointError):
    "The one line with which a run is refused"
    with pytest.raises(error) as e: fit(cfg)
    text = str(e.value)
    assert '\n' not in text
    for w in words: assert str(w) in text, text
    return text

# ---------------------------------------------------------------- kill -9

SHORT = dict(epochs=None, steps=2, unit='step', keep=1, optim=dict(warmup=0))

def any_operation(event, names): return True

def test_killed_at_every_operation_on_a_file(tmp_path, monkeypatch):
    "Before a folder is made, between a rename and its link, while an old checkpoint is removed: each of them, one after the other"
    monkeypatch.setattr(os, 'fsync', lambda fd: None) # a kill loses nothing that the system already has
    fit(config(tmp_path, 'whole', **SHORT))
    (tmp_path/'live').mkdir()
    child = processes.Process(target=snapshots, args=(tmp_path/'live', tmp_path/'kept', any_operation, config(tmp_path/'live', 'run', **SHORT)))
    child.start(); child.join(300)
    assert child.exitcode==0
    same(tmp_path/'live'/'run', tmp_path/'whole')
    without,tried = 0, 0
    for number,(folder,new) in enumerate(different(tmp_path/'kept'), 1):
        if new: lost = whole(folder/'run')==0
        without += lost
        if not new: continue
        tried += 1
        going = shutil.copytree(folder, tmp_path/f'going{number}', symlinks=True)
        fit(config(going, 'run', **SHORT))
        same(going/'run', tmp_path/'whole')
        # links are right, nothing half made is left, and no more is kept than was asked for
        assert sorted(p.name for p in (going/'run'/'checkpoints').iterdir())==sorted(p.name for p in (tmp_path/'whole'/'checkpoints').iterdir())
        assert [os.readlink(going/'run'/n) for n in ('best', 'last')]==[os.readlink(tmp_path/'whole'/n) for n in ('best', 'last')]
        assert not [p.name for p in (going/'run').iterdir() if p.name[0]=='.' and p.name!='.lock']
        shutil.rmtree(going)
    assert number>40 and 10<without<30 and tried>25

FAT = dict(ballast=1_500_000, epochs=None, steps=40, unit='step', evaluate_every=5, accumulate=1)

def test_killed_at_random_moments(tmp_path):
    "Saving takes most of the time of this run, so most kills fall into it"
    train(tmp_path, 'whole', **FAT)
    rng,kills = np.random.default_rng(0), 0
    for _ in range(12):
        child = processes.Process(target=train, args=(tmp_path, 'run'), kwargs=FAT)
        child.start()
        child.join(float(rng.uniform(.05, .35)))
        child.kill(); child.join()
        kills += child.exitcode==-signal.SIGKILL
        if (tmp_path/'run').exists(): whole(tmp_path/'run')
        if rows_end(tmp_path/'run'): break
    assert kills>=5
    if not rows_end(tmp_path/'run'): fit(config(tmp_path, 'run', **FAT))
    same(tmp_path/'run', tmp_path/'whole')

def rows_end(run): return (run/'log.jsonl').exists() and rows(run, 'end')

def waiting(folder, workers):
    as_a_program()
    class Wait(StopAt):
        def after_step(self): (folder/'ready').touch(); time.sleep(60)
    fit(config(folder, 'run', workers=workers), [Wait(1)])

def test_the_folder_is_free_as_soon_as_its_process_is_dead(tmp_path):
    "Loading processes notice the death of their parent after seconds only; two runs at once are refused"
    child = processes.Process(target=waiting, args=(tmp_path, 2))
    child.start()
    while not (tmp_path/'ready').exists(): assert child.is_alive(); time.sleep(.01)
    refused(config(tmp_path, 'run'), tmp_path/'run', 'another process is training in this folder')
    child.kill(); child.join()
    assert fit(config(tmp_path, 'run')).step==12

# ---------------------------------------------------------------- a disk that refuses

def disk_full(*_, **__): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def read_only(*_, **__): raise OSError(errno.EROFS, os.strerror(errno.EROFS))

@pytest.mark.parametrize('where,how', [('save_file', disk_full), ('save_file', read_only), ('Path.write_text', full), ('sync_folder', full), ('Path.mkdir', read_only), ('Path.rename', full), ('point', full)])
def test_a_disk_that_refuses_while_saving(tmp_path, monkeypatch, where, how):
    fit(config(tmp_path, 'whole'))
    class Refuse(StopAt):
        order = 39
        def after_step(self):
            if self.learner.step!=self.at: return
            target,_,name = where.rpartition('.')
            monkeypatch.setattr(getattr(checkpoint, target) if target else checkpoint, name, how)
    with pytest.raises(CheckpointError) as e: fit(config(tmp_path, 'run'), [Refuse(6)])
    monkeypatch.undo()
    text = str(e.value)
    assert '\n' not in text and 'step-000006' in text and ('No space left' in text or 'Read-only' in text) and 'resumes from it' in text, text
    # the links come after the rename: then the new checkpoint is whole too
    assert [p.name for p in checkpoint_folders(tmp_path/'run')]==['step-000003']+['step-000006']*(where=='point')
    assert not list((tmp_path/'run'/'checkpoints').glob('.*'))
    assert whole(tmp_path/'run') and rows(tmp_path/'run', 'end')[-1]['status']=='failed'
    fit(config(tmp_path, 'run'))
    same(tmp_path/'run', tmp_path/'whole')

@pytest.fixture
def small_disk(tmp_path):
    "A disk of two megabytes; needs the right to mount"
    place = tmp_path/'disk'
    place.mkdir()
    def mount(*words): return subprocess.run(['mount', *words], capture_output=True).returncode==0
    if os.name!='posix' or os.getuid() or not mount('-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(place)): pytest.skip('no right to mount a file system')
    yield place, lambda options: mount('-o', f'remount,{options}', str(place))
    subprocess.run(['umount', '-l', str(place)], capture_output=True)

def test_a_disk_that_is_really_full(small_disk, tmp_path):
    "A checkpoint is 0.6 MB; the fourth does not fit"
    place,remount = small_disk
    some = dict(ballast=36_000, keep=10, unit='step', trackers=['tensorboard'])
    fit(config(tmp_path, 'whole', **some))
    text = refused(config(place, 'run', **some), place/'run', 'No space left on device', 'free some space', 'resumes from it')
    left = whole(place/'run')
    assert left>=1 and f'step-{left:06d} is whole' in text
    assert not list((place/'run'/'checkpoints').glob('.*'))
    # as full as before: refused again, and nothing is lost
    refused(config(place, 'run', **some), place/'run', 'No space left')
    assert whole(place/'run')>=left
    assert remount('size=64m')
    fit(config(place, 'run', **some))
    same(place/'run', tmp_path/'whole')

def test_a_disk_that_is_full_from_the_start(small_disk, tmp_path):
    place,remount = small_disk
    with pytest.raises(OSError), open(place/'junk', 'wb') as f: f.write(bytes(3<<20))
    refused(config(place, 'run', trackers=['tensorboard']), place/'run', 'No space left')
    (place/'junk').unlink()
    assert fit(config(place, 'run', trackers=['tensorboard'])).step==12

def test_a_disk_that_is_read_only(small_disk, tmp_path):
    place,remount = small_disk
    fit(config(place, 'run'), [StopAt(4)])
    assert remount('ro')
    refused(config(place, 'run'), place/'run', 'Read-only file system', '--runs')
    refused(config(place, 'another'), place/'another', 'Read-only file system', '--runs')
    assert remount('rw')
    assert fit(config(place, 'run')).step==12

# ---------------------------------------------------------------- damaged checkpoints

@pytest.mark.parametrize('name,harm', [('model.safetensors', 'cut'), ('ema.safetensors', 'cut'), ('state.safetensors', 'gone'), ('state.json', 'cut'), ('model.safetensors', 'noise'), ('state.safetensors', 'other')])
def test_a_damaged_newest_checkpoint(tmp_path, name, harm):
    "It is named, with the older one to go back to; going back gives the same run, and the damaged one is out of the way"
    fit(config(tmp_path, 'whole'))
    fit(config(tmp_path, 'run'), [StopAt(9)])
    older,newest = checkpoint_folders(tmp_path/'run')
    file = newest/name
    if harm=='cut': file.write_bytes(file.read_bytes()[:-200])
    if harm=='gone': file.unlink()
    if harm=='noise': file.write_bytes(bytes(range(256))*40)
    if harm=='other': shutil.copy(newest/'model.safetensors', file)
    before = curve(tmp_path/'run')
    text = refused(config(tmp_path, 'run'), file.resolve(), f'--train.resume {older.resolve()}')
    assert curve(tmp_path/'run')==before
    fit(config(tmp_path, 'run', resume=str(older)))
    same(tmp_path/'run', tmp_path/'whole')
    assert (newest.parent/f'{newest.name}.abandoned').is_dir()

@pytest.mark.parametrize('change', [lambda s: s.replace('"step": 9', '"step": 1'+'0'*30), lambda s: s.replace('"samples": ', '"samples": 1')])
def test_a_changed_state_is_not_believed(tmp_path, change):
    "Nor one that could be a state: the tensors beside it know its digest; without them, its numbers have to fit"
    fit(config(tmp_path, 'run'), [StopAt(9)])
    folder = checkpoint_folders(tmp_path/'run')[-1]
    state = folder/'state.json'
    was = state.read_text()
    state.write_text(change(was))
    assert state.read_text()!=was
    refused(config(tmp_path, 'run'), 'state.json: is not what was written with state.safetensors')
    state.write_text(was)
    assert fit(config(tmp_path, 'run')).step==12

@pytest.mark.parametrize('row', [{'kind': 'train', 'step': 10**30, 'loss': 0.}, {'kind': 'end', 'step': 13, 'status': 'done'}, {'kind': 'train', 'step': -1}, {'kind': 'pictures'}, [1]])
def test_a_changed_log_is_not_believed(tmp_path, row):
    fit(config(tmp_path, 'run'), [StopAt(9)])
    log = tmp_path/'run'/'log.jsonl'
    was = log.read_text()
    log.write_text(was+json.dumps(row)+'\n')
    refused(config(tmp_path, 'run'), f'log.jsonl, record {len(was.splitlines())+1}: ')
    with pytest.raises(CheckpointError, match='log.jsonl, record'): read_run(tmp_path/'run')
    log.write_text(was)
    assert fit(config(tmp_path, 'run')).step==12

def test_a_checkpoint_that_is_a_pickle_is_not_opened(tmp_path):
    "Loading a pickle runs what its author wrote"
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'pwned',))
    fit(config(tmp_path, 'run'), [StopAt(4)])
    for name in ('model', 'state'): torch.save(Evil(), find_checkpoint(tmp_path/'run')/f'{name}.safetensors')
    refused(config(tmp_path, 'run'), 'damaged')
    assert not (tmp_path/'pwned').exists()

# ---------------------------------------------------------------- resuming from somewhere else

def test_going_back_to_an_older_checkpoint(tmp_path):
    "The future that was given up does not come back with the next restart"
    fit(config(tmp_path, 'whole'))
    fit(config(tmp_path, 'run', keep=9), [StopAt(10)])
    back = str(tmp_path/'run'/'checkpoints'/'step-000003')
    with pytest.raises(RuntimeError): fit(config(tmp_path, 'run', keep=9, resume=back), [FailAt(7)])
    assert [p.name for p in checkpoint_folders(tmp_path/'run')]==['step-000003', 'step-000006']
    assert (tmp_path/'run'/'checkpoints'/'step-000009.abandoned').is_dir()
    fit(config(tmp_path, 'run', keep=9))
    assert curve(tmp_path/'run')==curve(tmp_path/'whole')
    assert find_checkpoint(tmp_path/'run', 'best').name==find_checkpoint(tmp_path/'whole', 'best').name

@pytest.mark.parametrize('form', ['run folder', 'checkpoint', 'link'])
def test_starting_from_another_run(tmp_path, form):
    fit(config(tmp_path, 'first'), [StopAt(6)])
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path/'first').rglob('*'))
    source = {'run folder': 'first', 'checkpoint': 'first/checkpoints/step-000006', 'link': 'first/last'}[form]
    learner = fit(config(tmp_path, 'second', resume=str(tmp_path/source), optim=dict(lr=.003)))
    resumed = rows(tmp_path/'second', 'resume')
    assert [(r['step'], r['from']) for r in resumed]==[(6, '../first/checkpoints/step-000006')]
    assert resumed[0]['changed']=={'optim.lr': [.01, .003]}
    assert [r['step'] for r in rows(tmp_path/'second', 'train')]==list(range(7, 13)) and learner.step==12
    assert rows(tmp_path/'second', 'best')[0]['step']==9 and whole(tmp_path/'second')
    assert before==sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path/'first').rglob('*'))

def test_an_explicit_source_for_a_run_that_has_its_own_checkpoints(tmp_path):
    for name in ('first', 'second'): fit(config(tmp_path, name), [StopAt(6)])
    before = curve(tmp_path/'second')
    refused(config(tmp_path, 'second', resume=str(tmp_path/'first')), tmp_path/'second', tmp_path/'first', 'train.resume', '--name')
    assert curve(tmp_path/'second')==before

def test_paths_that_lead_nowhere(tmp_path):
    fit(config(tmp_path, 'first'), [StopAt(6)])
    refused(config(tmp_path, 'new', resume=str(tmp_path/'fist')), tmp_path/'fist', "did you mean 'first'")
    refused(config(tmp_path, 'new', resume=str(tmp_path/'first'/'checkpoints'/'step-000007')), 'step-000007', 'no such')
    assert not (tmp_path/'new').exists()
    fit(config(tmp_path, 'done', epochs=1))
    refused(config(tmp_path, 'new', epochs=1, resume=str(tmp_path/'done')), 'step-000003', 'is finished (3 of 3 steps)')
    assert fit(config(tmp_path, 'new', epochs=2, resume=str(tmp_path/'done'))).step==6
    (tmp_path/'file').write_text('')
    refused(config(tmp_path, 'file'), tmp_path/'file', 'is a file')

def test_what_changed_is_said(tmp_path, capsys):
    for name,change,said in [('batch', dict(batch_size=8, accumulate=1), {'batch (checkpoint)': [4, 8], 'accumulate (checkpoint)': [2, 1], 'train.batch_size': [4, 8], 'train.accumulate': [2, 1]}),
                             ('data', dict(points=31), {'data (checkpoint)': ['Points-23', 'Points-31'], 'points': [23, 31]})]:
        fit(config(tmp_path, name), [StopAt(4)])
        fit(config(tmp_path, name, progress=True, **change))
        assert rows(tmp_path/name, 'resume')[0]['changed']==said
        found = read_json(tmp_path/name/'health.json')['findings']
        assert [f['code'] for f in found]==['resumed_differently'] and all(k in found[0]['message'] for k in said)
        err = capsys.readouterr().err
        assert all(k in err for k in said)
        # another batch: 8 samples of the second epoch are seen, the next step takes the other 8; other data: it begins again
        after = {'batch': 2., 'data': round(1+2/7, 6)}
        assert rows(tmp_path/name, 'resume')[0]['step']==4 and rows(tmp_path/name, 'train')[4]['epoch']==after[name]
        assert read_yaml(tmp_path/name/'config.yaml')['points']==(31 if name=='data' else 23)

def test_what_changes_nothing_is_not_said(tmp_path):
    fit(config(tmp_path, 'run'), [StopAt(4)])
    os.rename(tmp_path/'run', tmp_path/'moved')
    fit(config(tmp_path, 'moved', workers=1, keep=7, progress=True))
    assert rows(tmp_path/'moved', 'resume')[0]['changed']=={} and read_json(tmp_path/'moved'/'health.json')['findings']==[]

def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    refused(config(tmp_path, 'run', optim=dict(warmup=500)), 'optim.warmup', error=ConfigError)
    refused(config(tmp_path, 'run', points=3), '3 training samples', 'train.batch_size', error=DataError)
    assert list(tmp_path.iterdir())==[]

@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_sample_is_one_line(tmp_path, workers):
    "However many processes it came through"
    assert refused(config(tmp_path, 'run', bad=[5], workers=workers), error=DataError)=='point5.mp4: damaged'
    assert rows(tmp_path/'run', 'end')[-1]=={'kind': 'end', 'step': rows(tmp_path/'run', 'end')[-1]['step'], 'status': 'failed', 'reason': 'DataError: point5.mp4: damaged'}

def test_a_failed_start_gives_the_folder_back(tmp_path):
    "The error is still held, with all that hangs on it, when the next attempt is made"
    fit(config(tmp_path, 'run'))
    with pytest.raises(CheckpointError) as held: fit(config(tmp_path, 'run'))
    lock_run(tmp_path/'run').close()
