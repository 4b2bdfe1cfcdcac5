"Files of a run folder that no run has written, through every command that reads one: an answer in one line, never a traceback, never a wait"
import json, os, random, shutil, signal
from pathlib import Path
import pytest
import line_system
from command import vadnb
from test_commands import QUICK

STEP = 'checkpoints/step-000009'
# file of a run → the commands that read it
READERS = {f'{STEP}/card.json': ('eval', 'predict', 'train'), f'{STEP}/state.json': ('train',), 'health.json': ('report',), 'log.jsonl': ('report',)}
# what takes the place of a value: wrong types, numbers out of all bounds, what JSON allows and no run writes
VALUES = [None, True, -1, 10**30, 1e308, 0.5, '', 'x', '../../x', '\0', [], [[]], {}, dict(a={}), [3, 'x'], 'y'*2000]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    (folder/'line.yaml').write_text('system: line\n')
    (folder/'a.txt').write_text('1 2')
    words = ['--config', folder/'line.yaml', '--runs', folder/'runs', *QUICK, '--data.test', '9', '--data.valid', '5', '--name', 'first']
    code,out,err = vadnb('train', *words)
    assert code==0, err
    return folder/'runs'/'first'

@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    "A figure is drawn as it is, in a hundredth of the time: nothing but its lines is looked at"
    def figure_bytes(fig, *_, **__):
        for ax in fig.axes: ax.relim(); ax.autoscale_view()
        return b'<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr('vadnb.plots.figure_bytes', figure_bytes)

def texts(whole):
    "Contents that are no JSON, or JSON of another kind"
    yield from (b'', b' ', b'\n\n', b'{', b'[]', b'{}', b'3', b'null', b'"x"', b'[{}]', b'NaN', b'{"step": NaN}', b'{"step": Infinity}', b'{"step": 1e999}', b'\xff\xfe{}', b'\0\0\0',
                b'\xef\xbb\xbf{}', b'{"a": "\xff"}', b'{"a": "\\ud83d"}', b'['*100_000, b'{"a":'*50_000, b'[1'*30_000, b'{"step": '+b'1'*5000+b'}', b'{"a": 1, "a": 2}', b'{"kind": "end"}\n'*3, b'x'*1_000_000)
    for share in (.1, .5, .9): yield whole[:int(share*len(whole))]
    yield whole[:-2]
    yield whole+whole
    yield whole.replace(b':', b'=', 1)

def places(tree, at=()):
    "Every place of a tree of JSON"
    if at: yield at
    for k,v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else (): yield from places(v, (*at, k))

def changed(tree, at, value):
    "The tree with another value at a place, or without it"
    res = json.loads(json.dumps(tree))
    here = res
    for k in at[:-1]: here = here[k]
    if value is ...: del here[at[-1]]
    else: here[at[-1]] = value
    return res

def kinds(rows):
    "The first row of each kind, with its number"
    found = {}
    for i,r in enumerate(rows): found.setdefault(r['kind'], i)
    return sorted(found.values())

def mutants(name, whole, seed, many):
    "Contents of a file of a run, in an order that is always the same: all that are no JSON, and some of those that are"
    rng,res = random.Random(seed), []
    if name.endswith('.jsonl'):
        lines = whole.splitlines()
        rows = [json.loads(l) for l in lines]
        for i in kinds(rows):
            for at in places(rows[i]):
                for v in (..., *VALUES): res.append((i, at, v))
        make = lambda i, at, v: b'\n'.join([*lines[:i], json.dumps(changed(rows[i], at, v)).encode(), *lines[i+1:]])+b'\n'
    else:
        tree = json.loads(whole)
        res = [(tree, at, v) for at in places(tree) for v in (..., *VALUES)]
        make = lambda tree, at, v: json.dumps(changed(tree, at, v)).encode()
    chosen = [*range(len(res))]; rng.shuffle(chosen)
    # every place once, then what chance gives
    first = {}
    for k in chosen: first.setdefault((res[k][0] if name.endswith('.jsonl') else 0, res[k][1]), k)
    picked = [*first.values(), *[k for k in chosen if k not in {*first.values()}]][:many]
    yield from ((f'text {i}', t) for i,t in enumerate(texts(whole)))
    yield from ((f'{res[k][1]} = {str(res[k][2])[:40]}', make(*res[k])) for k in picked)

def answers(command, own):
    "What a command says of a run folder: its exit code, or what is wrong with the answer"
    config = own.parent.parent/'line.yaml'
    words = dict(eval=['eval', '--run', own, '--train.device', 'cpu'], report=['report', '--run', own, '--out', own.parent/'page.html'],
                 predict=['predict', config.parent/'a.txt', '--run', own, '--out', own.parent/'out'],
                 train=['train', '--config', config, '--runs', own.parent, '--name', own.name, *QUICK, '--data.test', '9', '--data.valid', '5', '--train.epochs', '4'])[command]
    def late(*_): raise TimeoutError(f'{command} did not answer')
    old = signal.signal(signal.SIGALRM, late); signal.alarm(30)
    try: code,out,err = vadnb(*words)
    except BaseException as e: return f'{command}: {type(e).__name__}: {str(e)[:300]}'
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old); shutil.rmtree(own.parent/'out', ignore_errors=True)
    said = [l for l in err.splitlines() if l.startswith('vadnb: error: ')]
    if code not in (0, 2) or 'Traceback' in err or len(err)>4000 or (code==2)!=(len(said)==1): return f'{command}: code {code}: {err[-500:]}'
    return code

def tried(run, tmp_path, name, mutate):
    "Answers of the commands that read a file to one content of it; `mutate` makes it"
    res = {}
    for command in READERS[name]:
        own = tmp_path/'runs'/'first'
        if own.exists(): shutil.rmtree(own)
        shutil.copytree(run, own, symlinks=True)
        for k in ('line.yaml', 'a.txt'): shutil.copy(run.parent.parent/k, tmp_path)
        (own/name).unlink()
        mutate(own/name)
        res[command] = answers(command, own)
    return res

@pytest.mark.parametrize('name', READERS)
def test_contents_that_no_run_has_written(run, tmp_path, name):
    whole,n,refused,wrong = (run/name).read_bytes(), 0, 0, []
    for what,content in mutants(name, whole, 13, int(os.environ.get('VADNB_FUZZ', 12))):
        found = tried(run, tmp_path, name, lambda p: p.write_bytes(content))
        n,refused = n+len(found), refused+sum(v==2 for v in found.values())
        wrong += [f'{what}: {v}' for v in found.values() if isinstance(v, str)]
    print(name, n, refused)
    assert not wrong, f'{len(wrong)} of {n}:\n'+'\n'.join(wrong)
    assert refused>n/8

@pytest.mark.parametrize('name', READERS)
def test_places_that_hold_no_file(run, tmp_path, name):
    (tmp_path/'elsewhere').mkdir()
    forms = dict(folder=lambda p: p.mkdir(), nowhere=lambda p: p.symlink_to(tmp_path/'nowhere'), itself=lambda p: p.symlink_to(p.name), endless=lambda p: p.symlink_to('/dev/zero'),
                 pipe=lambda p: os.mkfifo(p), above=lambda p: p.symlink_to(tmp_path/'elsewhere'))
    wrong = [f'{what}: {v}' for what,form in forms.items() for v in tried(run, tmp_path, name, form).values() if isinstance(v, str)]
    assert not wrong, '\n'.join(wrong)
