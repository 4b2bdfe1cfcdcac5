"Run folders of strangers, and runs whose folder is taken away: one line, nothing written through, each row once"
import json, os, shutil, signal, threading, time
from pathlib import Path
import pytest
import line_system
from command import vadnb
from test_commands import QUICK, folder, refuse, run, texts, trained, words
from toy_system import FailAt, StopAt, config, rows
from vadnb.core import CheckpointError, read_json, read_jsonl
from vadnb.results.unfinished import LIST
from vadnb.train.callbacks import Callback
from vadnb.train.checkpoint import checkpoint_folders
from vadnb.train.health import Check
from vadnb.train.learner import fit

STEP = 'checkpoints/step-000012'

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A finished run of the toy"
    place = tmp_path_factory.mktemp('doors')
    fit(config(place, 'run'))
    return place/'run'

@pytest.fixture
def own(whole, tmp_path): return Path(shutil.copytree(whole, tmp_path/'run', symlinks=True))

def refused(own, **some):
    with pytest.raises(CheckpointError) as e: fit(config(own.parent, 'run', epochs=5, **some))
    assert '\n' not in str(e.value) and len(str(e.value))<600
    return str(e.value)

@pytest.mark.parametrize('name', ['pictures', 'log.jsonl', 'config.yaml', 'checkpoints', STEP, 'checkpoints/.step-000003.tmp', '.lock', 'tensorboard', 'health.json'])
@pytest.mark.parametrize('to', ['folder', 'file', 'nowhere'])
def test_nothing_is_written_through_a_link(own, tmp_path, name, to):
    (tmp_path/'folder').mkdir(); (tmp_path/'folder'/'kept').touch(); (tmp_path/'file').write_text('kept')
    place = own/name
    if place.is_dir(): shutil.rmtree(place)
    else: place.unlink(missing_ok=True)
    place.symlink_to(tmp_path/to)
    said = refused(own)
    assert f'{place}: is a link' in said or name=='config.yaml'
    assert [p.name for p in (tmp_path/'folder').iterdir()]==['kept'] and (tmp_path/'file').read_text()=='kept' and not (tmp_path/'nowhere').exists()

def test_a_pipe_in_a_run_folder_is_not_waited_at(own):
    (own/'log.jsonl').unlink(); os.mkfifo(own/'log.jsonl')
    assert 'is no plain file' in refused(own)

@pytest.mark.parametrize('row', [[], 3, {'kind': 'x'}, {'kind': 'x', 'step': 10**30}, {'kind': 'x', 'step': -1}, {'kind': 'end', 'step': 1, 'status': []},
                                 {'kind': 'pictures', 'step': 20, 'names': 'abc'}, {'kind': 'resume', 'step': 1, 'from': 7}, {'kind': ['x'], 'step': 1}])
def test_rows_that_no_run_has_written(own, row):
    text = (own/'log.jsonl').read_text()
    (own/'log.jsonl').write_text(json.dumps(row)+'\n'+text)
    assert 'log.jsonl, record 1' in refused(own)
    assert f'{own}/log.jsonl, record 1' in refuse('report', '--run', own)

@pytest.mark.parametrize('text', ['\udcff', '{', '['*100_000, '1'*5000+'\n', 'NaN\n', '"x"\n', ''])
def test_files_that_are_no_log(own, text):
    (own/'log.jsonl').write_bytes(text.encode('utf-8', 'surrogateescape')+b'\n')
    if text!='': assert 'log.jsonl' in refused(own)
    assert 'log.jsonl' in refuse('report', '--run', own)

def test_pictures_that_go_are_plain_names_of_their_folder(own, tmp_path):
    (tmp_path/'x.png').touch(); (own/'pictures').mkdir(exist_ok=True)
    with open(own/'log.jsonl', 'a') as f: f.write(json.dumps(dict(kind='resume', step=12, total_steps=100))+'\n'+json.dumps(dict(kind='pictures', step=99, names=['../../x', '/etc/x', 'a\0b', 'y'*300, 3, '\udcff']))+'\n')
    (own/'.x.tmp').mkdir()
    fit(config(own.parent, 'run', epochs=5))
    assert (tmp_path/'x.png').exists() and not (own/'.x.tmp').exists()

@pytest.mark.parametrize('value', [10**30, -1, None, 'x', True, [], 1.5])
@pytest.mark.parametrize('key', ['step', 'micro', 'batch', 'samples', 'shift', 'processes', 'callbacks', 'warmup'])
def test_states_that_no_run_has_written(own, key, value):
    path = own/STEP/'state.json'
    state = read_json(path)
    if state[key]==value or key=='processes' and value==[]: return
    path.write_text(json.dumps(state | {key: value}))
    if key=='shift' and value==-1: return
    assert 'step-000012' in refused(own)

# ---------------------------------------------------------------- a folder that goes, rows that come once

class TakeAway(Callback):
    order = 1
    def after_step(self):
        if self.learner.step==4: self.learner.run.rename(self.learner.run.with_name('elsewhere'))

@pytest.mark.parametrize('log_every', [1, 100])
def test_a_run_folder_that_is_taken_away_ends_the_run(tmp_path, log_every):
    with pytest.raises(CheckpointError, match='was taken away while the run was going on'): fit(config(tmp_path, 'run', log_every=log_every, trackers=['tensorboard']), [TakeAway()])
    assert [p.name for p in tmp_path.iterdir()]==['elsewhere']

class Odd(Check):
    code,what = 'odd', 'steps are even'
    def before_fit(self):
        if self.learner.step<6: self.find('note', 'begun early', key='early')
    def after_step(self):
        if self.learner.step==2: self.find('warning', 'second', key='second')
        if self.learner.step==5: self.take_back('second')
    def after_fit(self): self.find('warning', 'nothing learned', key='end')

def with_check(folder, *extra, **some):
    import toy_system
    toy_system.Toy.checks = lambda self: [Odd()]
    try: return fit(config(folder, 'run', **some), extra)
    finally: del toy_system.Toy.checks

def test_findings_are_judged_again_and_stand_once(tmp_path):
    run = tmp_path/'run'
    told = lambda: sorted(r['message'] for r in rows(run, 'health') if r['code']=='odd')
    held = lambda: sorted(f['message'] for f in read_json(run/'health.json')['findings'] if f['code']=='odd')
    state = lambda: {c['code']: c.get('state') for c in read_json(run/'health.json')['checked']}
    with_check(tmp_path, StopAt(4), unit='step', save_every=4, evaluate_every=4)
    assert told()==held()==['begun early', 'second'] and state()['below_baseline']=='does not apply'      # stopped: not judged
    assert state()['zero_gradient']=='not reached' and state()['resumed_differently']=='does not apply' and state()['not_finite']=='holds'
    with pytest.raises(RuntimeError): with_check(tmp_path, FailAt(7), unit='step', save_every=4, evaluate_every=4)
    assert told()==['begun early', 'second'] and held()==['begun early']                                   # taken back at step 5
    lines = (run/'log.jsonl').read_text().splitlines()
    # a kill between a checkpoint and its row, and one after a row that is in no checkpoint
    lost = [l for l in lines if json.loads(l)['kind']!='checkpoint' or json.loads(l)['step']!=4]
    twin = [l for l in lost if json.loads(l).get('message')=='begun early']
    (run/'log.jsonl').write_text('\n'.join(lost+twin)+'\n')
    with_check(tmp_path, unit='step', save_every=4, evaluate_every=4)
    assert told()==['begun early', 'nothing learned', 'second'] and held()==['begun early', 'nothing learned']
    steps = [r['step'] for r in rows(run, 'checkpoint')]
    assert steps==sorted({*steps}) and {4, 8, 12}<={*steps}
    # the end of a run that is trained on is no end
    with_check(tmp_path, StopAt(14), epochs=4, steps=20, unit='step', save_every=4, evaluate_every=4)
    assert 'nothing learned' not in held()+told()

# ---------------------------------------------------------------- stops and predictions

def test_a_stop_says_what_is_saved_and_how_to_go_on(folder, words):
    def kill():
        while not (folder/'runs'/'stopped'/'log.jsonl').exists(): time.sleep(.01)
        time.sleep(.2); os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=kill); thread.start()
    given = [*words, '--name', 'stopped', '--train.epochs', '30000', '--train.log_every', '1000', '--train.save_every', '100000']
    code,out,err = vadnb('train', *given)
    thread.join()
    last, = [l for l in err.splitlines() if 'SIGTERM' in l]
    step = checkpoint_folders(folder/'runs'/'stopped')[-1]
    assert code==143 and f'{step} is saved; go on with: vadnb train --config' in last and '--name stopped' in last

def test_a_prediction_replaces_nothing_and_clears_what_a_killed_one_left(run, texts, tmp_path):
    out = tmp_path/'out'
    assert vadnb('predict', texts/'a.txt', texts/'b.txt', '--run', run, '--out', out)[0]==0
    before = (out/'a.said').stat().st_mtime_ns
    assert 'nothing is written over' in refuse('predict', texts/'a.txt', '--run', run, '--out', out)
    assert (out/'a.said').stat().st_mtime_ns==before and sorted(p.name for p in out.iterdir())==['a.said', 'b.said']
    (out/f'{LIST}1').write_text(json.dumps('a.said')+'\n'+json.dumps('../texts/b.txt')+'\n')
    code,_,err = vadnb('predict', texts/'a.txt', '--run', run, '--out', out)
    assert code==0 and '1 files of a prediction that was cut off are removed' in err and (texts/'b.txt').exists()
    assert sorted(p.name for p in out.iterdir())==['a.said', 'b.said']

def test_a_linked_place_for_predictions_is_refused(run, texts, tmp_path):
    own = Path(shutil.copytree(run, tmp_path/'run', symlinks=True)); (tmp_path/'other').mkdir()
    (own/'predictions').symlink_to(tmp_path/'other')
    assert 'predictions: is a link' in refuse('predict', texts/'b.txt', '--run', own)
    assert not [*(tmp_path/'other').iterdir()]

@pytest.mark.parametrize('name', [b'a\xff.txt', b'a\x1b[2J.txt'])
def test_names_that_are_no_text(run, tmp_path, name):
    (tmp_path/'in').mkdir()
    with open(os.path.join(os.fsencode(tmp_path/'in'), name), 'w') as f: f.write('1 2')
    (tmp_path/'in'/'b.txt').write_text('3')
    code,out,err = vadnb('predict', tmp_path/'in', '--run', run, '--out', tmp_path/'out')
    assert code in (0, 2, 3) and 'Traceback' not in err and '\x1b' not in out+err and (tmp_path/'out'/'b.said').exists()
