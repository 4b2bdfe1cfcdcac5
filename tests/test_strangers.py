"What others wrote is never run, printed as they please, or shown whole"
import csv, io, pickle
import numpy as np
import pytest
from command import vadnb
from vadnb.core import DataError
from vadnb.data.frame_sources import PyavFrames, decord_fault
from vadnb.data.video import probe, write_video
from vadnb.results.actions import ActionPrediction
from vadnb.results.class_rows import as_csv, class_rows, read_class_rows
from vadnb.results.layers import Classes
from vadnb.results.video import VideoPrediction

@pytest.fixture
def trap(tmp_path, monkeypatch):
    "A data folder, which is also the present one, in which every import is obeyed"
    for name in ('json', 'decord', 'numpy', 'vadnb', 'fractions', 'av'): (tmp_path/f'{name}.py').write_text(f'open({str(tmp_path/"ran")!r}, "w"); raise SystemExit("obeyed")')
    write_video(tmp_path/'a.mp4', np.zeros((6, 32, 48, 3), np.uint8), 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    return tmp_path

@pytest.mark.parametrize('path', ['a.mp4', './a.mp4'])
def test_a_probe_runs_nothing_that_lies_there(trap, path):
    assert probe(path, seconds=60, decode=True).frames==6 and not (trap/'ran').exists()
    with pytest.raises(DataError, match='nothing.mp4: no such'): probe('nothing.mp4', seconds=60)

def test_a_trial_of_decord_runs_nothing_that_lies_there(trap):
    pytest.importorskip('decord')
    said = decord_fault(PyavFrames(trap/'a.mp4'))
    assert 'obeyed' not in said and not (trap/'ran').exists()

def test_shared_lists_do_not_hang_a_conversion(tmp_path):
    shared = ['x', 1, 2, 3, 4]
    for _ in range(60): shared = [shared, shared]
    (tmp_path/'a.pkl').write_bytes(pickle.dumps({'Abuse001_x264': shared}))
    (tmp_path/'c.json').write_text('{}')
    code,out,err = vadnb('convert', 'ucf-boxes', tmp_path/'a.pkl', tmp_path/'out.json', '--captions', tmp_path/'c.json')
    assert code==2 and err.count('\n')==1 and 'a.pkl: not a whole pickle (lists that hold each other' in err

HARMFUL = ['=cmd|calc', '+1+cmd', '-2+3', '@SUM(A1)', "'=x", '\tx', 'plain', "it's", '-5']

def harmless(text):
    "Every cell of a table that a spreadsheet would run"
    def number(c):
        try: float(c); return True
        except ValueError: return False
    return not [c for row in csv.reader(io.StringIO(text)) for c in row if c[:1] in '=+-@\t\r' and c and not number(c)]

def test_no_cell_is_a_formula_and_rows_come_back(tmp_path):
    p = np.full((1, len(HARMFUL)), .1, np.float32); p[0,2] = .2
    rows = [r for name in HARMFUL for r in class_rows(name, Classes(HARMFUL, p, [(0, 5)]), np.arange(6)/10, true_class='=x')]
    assert harmless(as_csv(rows))
    (tmp_path/'a.csv').write_text(as_csv(rows))
    back = read_class_rows(tmp_path/'a.csv')
    assert [*back]==HARMFUL and [*back["-5"].classes]==HARMFUL

def test_no_table_of_a_video_has_a_formula(tmp_path):
    n = len(HARMFUL)
    events = ActionPrediction('a.mp4', 'a.mp4', 9, 10., HARMFUL, np.tile([.1, .5], (n, 1)), np.arange(n), np.full(n, .9), .5)
    scores = VideoPrediction('a.mp4', tmp_path/'gone.mp4', 9, ['normal', *HARMFUL], np.full((9, n+1), .1), .5)
    tables = [events.table(), next(f for f in scores.save(tmp_path) if f.suffix=='.csv').read_text(encoding='utf-8')]
    for text in tables: assert harmless(text) and all(f"'{name}" in text for name in HARMFUL[:4])

def test_names_are_printed_without_what_a_terminal_obeys(tmp_path):
    name = 'a\x1b[2J\u202e\x07.mp4'
    code,out,err = vadnb('eval', '--run', tmp_path/name)
    assert code==2 and 'a?[2J??.mp4' in err and not set(err) & {'\x1b', '\u202e', '\x07'}
