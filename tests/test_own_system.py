"A script and a system of one's own, with nothing but the installed package"
import os, subprocess, sys
from pathlib import Path
import pytest

here = Path(__file__).resolve().parent
VADNB = [sys.executable, '-c', 'from vadnb.cli import main; main()']

def started(command, cwd):
    "Exit code, stdout and stderr of a process that finds no more than the package"
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'} | dict(PYTHONPATH=str(here.parent), PYTHONSAFEPATH='1')
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def vadnb(*words, cwd): return started([*VADNB, *map(str, words)], cwd)

@pytest.fixture
def place(tmp_path):
    "A folder with a package, a configuration, and a file that must never be imported in the place of an installed one"
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/line.py').write_text((here/'line_system.py').read_text(encoding='utf-8'))
    (tmp_path/'yaml.py').write_text('raise SystemExit("a file of the folder was run")')
    (tmp_path/'mine.yaml').write_text('system: line\nruns: runs\ndata: {train: 6, test: 2}\ntrain: {epochs: 1, batch_size: 3, workers: 0, device: cpu, progress: false}\n')
    return tmp_path

def test_a_system_of_ones_own_by_its_module(place):
    "Train and evaluate; without its name on the command line its configuration is refused, and says how"
    code,_,err = vadnb('train', '--system', 'mine.line', '--config', 'mine.yaml', cwd=place)
    assert code==0, err
    code,out,err = vadnb('eval', '--run', 'runs/line', '--system=mine.line', cwd=place)
    assert code==0 and 'error' in out, err
    # both refusals in one process: neither gets as far as what the other needs
    two = [['eval', '--run', 'runs/line'], ['train', '--system', 'mine.lines', '--config', 'mine.yaml']]
    code = f'''
from vadnb.cli import main
for words in {two!r}:
    try: main(words)
    except SystemExit as e: print(e.code)'''
    code,out,err = started([sys.executable, '-c', code], cwd=place)
    assert (code, out.split())==(0, ['2', '2']), err
    unnamed,unfound = err.splitlines()
    assert "'line' is unknown" in unnamed and 'named with --system MODULE' in unnamed
    assert "there is no module 'mine.lines'" in unfound

def test_what_a_script_begins_with():
    "Each name is the thing itself, none costs an import before it is asked for, and a typo says what there is"
    code = '''
import sys, vadnb
assert 'torch' not in sys.modules and 'numpy' not in sys.modules
assert {*vadnb.__all__}<={*dir(vadnb)}
from vadnb import *
from vadnb.train.learner import fit as same
assert fit is same and VideoReader.__module__=='vadnb.data.video'
for n in vadnb.__all__: assert getattr(vadnb, n).__name__==n
try: vadnb.fti
except AttributeError as e: assert 'there are' in str(e)
else: raise SystemExit('no error')
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=here.parent, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
