"Commands beside each other: told in order, stopped together"
import os, signal, subprocess, sys, threading, time
import pytest
from vadnb.commands import side_by_side as room
from vadnb.commands.side_by_side import side_by_side

ANSWERS = """
import signal, sys, time
asked = []
def answer(number, frame): asked.append(number); print('asked', signal.Signals(number).name, flush=True)
for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, answer)
print('begun', flush=True)
deadline = time.time()+60
while not asked and time.time()<deadline: time.sleep(.01)
time.sleep(.3)
sys.exit(128+asked[0] if len(asked)==1 else 99)
"""

@pytest.fixture
def scripts(monkeypatch):
    "Words are a program of Python here"
    begun = []
    def start(words, threads):
        begun.append((words[0], threads))
        return subprocess.Popen([sys.executable, '-u', '-c', words[1]], text=True, process_group=0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    monkeypatch.setattr(room, 'start_command', start)
    return begun

def test_what_ends_first_is_told_in_its_turn(scripts, capsys):
    jobs = dict(a=['a', 'import time; print("slow", flush=True); time.sleep(1); print("late")'], b=['b', 'print("quick")'], c=['c', 'print("last")'])
    assert side_by_side(jobs, 5)==(0, '')
    assert capsys.readouterr().out=='slow\nlate\n\nquick\n\nlast\n'
    assert {t for _,t in scripts}=={1}

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_comes_once_and_what_waits_is_not_begun(scripts, capsys, number):
    def ask():
        while len(scripts)<2: time.sleep(.01)
        time.sleep(.5)
        os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    threading.Thread(target=ask).start()
    assert side_by_side({k: [k, ANSWERS] for k in 'abc'}, 2)==(128+number, '')
    assert signal.getsignal(number) is before
    assert capsys.readouterr().out==f'begun\nasked {number.name}\n\nbegun\nasked {number.name}\n\n'
    assert [k for k,_ in scripts]==['a', 'b']

@pytest.mark.parametrize('end,code', [('sys.exit(2)', 2), ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 137)])
def test_one_that_fails_stops_the_others_and_names_itself(scripts, capsys, end, code):
    jobs = dict(a=['a', ANSWERS], b=['b', f'import sys, time; time.sleep(.5); print("why", flush=True); {end}'], c=['c', 'print("c")'])
    assert side_by_side(jobs, 2)==(code, 'b')
    assert capsys.readouterr().out=='begun\nasked SIGTERM\n\nwhy\n\n'

def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    def none(words, threads): raise OSError('no processes left')
    monkeypatch.setattr(room, 'start_command', none)
    with pytest.raises(OSError, match='no processes left'): side_by_side(dict(a=['a'], b=['b']), 2)

def test_a_command_finds_the_package_and_nothing_of_the_folder_it_starts_in(tmp_path, monkeypatch, capsys):
    (tmp_path/'json.py').write_text('raise SystemExit("a stranger was executed")')
    monkeypatch.chdir(tmp_path)
    assert side_by_side(dict(a=['--version']), 1)==(0, '')
    assert 'stranger' not in capsys.readouterr().out
