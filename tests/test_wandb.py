"Weights & Biases, which is an extra: its run holds what TensorBoard's holds, also of a run that is stopped and goes on"
import json, os, re, struct, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.skipif(find_spec('wandb') is None, reason="wandb is not installed (pip install 'vadnb[wandb]')")
here = Path(__file__).resolve().parent

SCRIPT = '''
import sys
sys.path[:0] = sys.argv[1:3]
from toy_system import StopAt, config, fit
from vadnb.core import ConfigError
try: fit(config('.', 'run', trackers=['tensorboard', 'wandb']), [StopAt(int(sys.argv[3]))])
except ConfigError as e: print('ConfigError:', e)
'''

def trained(tmp_path, stop=99, **settings):
    "The toy, tracked by both, in a process that has nothing of this machine's user; what it printed"
    env = {k: v for k,v in os.environ.items() if not k.startswith('WANDB') and k!='NETRC'}
    env |= dict(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path/'cache'), XDG_CONFIG_HOME=str(tmp_path/'config'), WANDB_SILENT='true', **settings)
    r = subprocess.run([sys.executable, '-c', SCRIPT, here.parent, here, str(stop)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert r.returncode==0, r.stderr[-3000:]
    return r.stdout

def records(path):
    "The records of a W&B file: seven bytes of head, then LevelDB's log format, blocks of 32 KiB that hold pieces of protobuf messages"
    from wandb.proto.wandb_internal_pb2 import Record
    raw,at,whole = path.read_bytes(), 7, b''
    assert raw[:4]==b':W&B'
    while at+7<=len(raw):
        if (left := 32768-at%32768)<7: at += left; continue
        _,size,kind = struct.unpack('<IHB', raw[at:at+7])
        whole += raw[at+7:at+7+size]
        at += 7+size
        if kind in (1, 4): yield Record.FromString(whole); whole = b''

def numbers_of(path):
    "(key, step, value) of one W&B file, and the run it is of"
    found,run = set(), None
    for r in records(path):
        if r.WhichOneof('record_type')=='run': run = r.run
        if r.WhichOneof('record_type')!='history': continue
        for i in r.history.item:
            key = i.key or '/'.join(i.nested_key)
            if key[0]!='_': found.add((key, r.history.step.num, json.loads(i.value_json)))
    return found, run

def single(found):
    "Values as TensorBoard holds them"
    return {(k, step, struct.unpack('f', struct.pack('f', v))[0]) for k,step,v in found}

def test_wandb_and_tensorboard_hold_the_same_rows(tmp_path):
    trained(tmp_path, 7, WANDB_MODE='offline')
    trained(tmp_path, WANDB_MODE='offline')
    files = sorted((tmp_path/'run'/'wandb').glob('offline-run-*/*.wandb'))
    (first,run),(second,again) = map(numbers_of, files)
    board = EventAccumulator(str(tmp_path/'run'/'tensorboard'), size_guidance=dict(scalars=0)); board.Reload()
    held = {(k, e.step, e.value) for k in board.Tags()['scalars'] for e in board.Scalars(k)}
    assert single(first | second)==held and {s for k,s,_ in held if k=='train/loss'}=={*range(1, 13)} and any(k=='valid/error' for k,*_ in held)
    # a run that goes on is the same run there, under the name it has here
    assert run.run_id==again.run_id and run.display_name=='run' and run.project=='vadnb' and run.run_group=='toy'
    assert {u.key for u in run.config.update}>={'points', 'optim', 'train'}
    # nothing beside the run folder but caches
    assert {p.name for p in tmp_path.iterdir()}<={'run', 'cache', 'config', '.cache', '.config'}

def test_wandb_without_a_login_is_one_line(tmp_path):
    said = trained(tmp_path).strip()
    assert said.startswith("ConfigError: 'train.trackers' holds wandb, which does not start (") and re.search('api.key', said, re.I) and '\n' not in said and 'WANDB_MODE=offline' in said
