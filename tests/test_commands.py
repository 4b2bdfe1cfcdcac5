"Commands find what they need in the system at hand, whichever it is, and share their work out over processes"
import json, os, re, shlex
import pytest, torch, yaml
import line_system
from command import vadnb
from test_processes import ended, start
from toy_system import StopAt
from vadnb.commands.words import COMMANDS
from vadnb.core import read_json, read_jsonl
from vadnb.systems import registry
from vadnb.systems.registry import Demo, offering, system_names
from vadnb.train.learner import fit

QUICK = shlex.split("--train.epochs 3 --train.batch_size 4 --train.workers 0 --train.device cpu --train.progress false "
                    "--train.trackers [] --optim.lr 0.1 --optim.schedule constant --optim.warmup 0")

def refuse(*words):
    "The one line that a command says before it leaves with code 2"
    code,out,err = vadnb(*words)
    assert code==2 and err.count('\n')==1 and err.startswith('vadnb: error: ') and 'Traceback' not in err, out+err
    return err.strip()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('line')
    (folder/'line.yaml').write_text('system: line\n')
    return folder

@pytest.fixture(scope='module')
def words(folder): return ['--config', folder/'line.yaml', '--runs', folder/'runs', *QUICK]

@pytest.fixture(scope='module')
def trained(folder, words):
    "A finished run without validation data, and what training it printed"
    said = vadnb('train', *words, '--name', 'first', '--data.test', '9')
    return folder/'runs'/'first', said

@pytest.fixture
def run(trained): return trained[0]

@pytest.fixture
def texts(tmp_path):
    (tmp_path/'texts').mkdir()
    for name,text in dict(a='1 2', b='3', c='four').items(): (tmp_path/'texts'/f'{name}.txt').write_text(text)
    return tmp_path/'texts'

# ---------------------------------------------------------------- systems

def test_a_registered_system_is_one_of_them():
    assert {'fgclip', 'uniad', 'line'}<=set(system_names())
    assert offering('MEMORY')['line']=="'data.train'" and 'line' not in offering('DEMO')

def test_a_folder_cannot_be_registered_over():
    from vadnb.systems.registry import register
    with pytest.raises(Exception, match='is a folder of vadnb.systems'): register('uniad', line_system)

# ---------------------------------------------------------------- train and verify

def test_training_without_validation_says_which_checkpoint_is_chosen(trained):
    run,(code,out,err) = trained
    assert code==0, err
    assert 'no validation data: the last checkpoint is the chosen one' in out.splitlines()
    assert read_jsonl(run/'log.jsonl')[-1]['status']=='done' and not (run/'best').exists()

def test_training_with_validation_does_not(words):
    code,out,err = vadnb('train', *words, '--name', 'valid', '--data.valid', '5')
    assert code==0 and 'no validation data' not in out and any(l.startswith('error') for l in out.splitlines()), err
    assert 'first error ' in out                                       # the table of the system

def test_verify(words):
    code,out,_ = vadnb('verify', *words, '--data.valid', '5')
    assert code==0 and out.splitlines()[-1]=='ready to train' and 'warn' not in out
    rows = {l.split()[1]: l for l in out.splitlines()[:-1]}
    assert '12 to learn from' in rows['numbers'] and '9, 3 per epoch, of them 0 of warm-up' in rows['steps'] and 'loss ' in rows['one']
    code,out,_ = vadnb('verify', *words)
    assert code==0 and [l for l in out.splitlines() if l.startswith('warn') and 'the last checkpoint is the chosen one' in l]
    code,out,_ = vadnb('verify', *words, '--train.batch_size', '13')
    assert code==1 and out.splitlines()[-1]=='not ready' and '12 training samples do not fill one batch of 13' in out

def test_all_that_is_wrong_with_a_configuration_is_told_at_once(folder, words, tmp_path):
    (tmp_path/'a.yaml').write_text('system: line\ntrain: {batch_siz: 3, workers: x, epochs: [1]}\nfactr: 2\n')
    err = refuse('train', '--config', tmp_path/'a.yaml', '--optim.lrr', '1')
    for part in ("unknown key 'train.batch_siz'", "unknown key 'factr'", "unknown option '--optim.lrr'"): assert part in err
    (tmp_path/'a.yaml').write_text('system: line\ntrain: {workers: x, epochs: [1]}\n')
    err = refuse('train', '--config', tmp_path/'a.yaml', '--optim.lr', 'fast', '--factor=y', '--train.keep', '2')
    for part in (f"{tmp_path}/a.yaml: 'train.workers' must be", "a.yaml: 'train.epochs' must be", "command line: 'optim.lr' must be", "command line: 'factor' must be"): assert part in err
    (tmp_path/'a.yaml').write_text('system: line\nseed: -1\ntrain: {keep: 0, accumulate: 0}\n')
    err = refuse('train', '--config', tmp_path/'a.yaml', '--train.batch_size', '0')
    for part in ("a.yaml: 'train.keep' must be 1 or more", "a.yaml: 'train.accumulate'", "command line: 'train.batch_size'"): assert part in err
    assert not (tmp_path/'runs').exists()

# ---------------------------------------------------------------- eval

def test_eval_measures_the_test_data(run):
    code,out,err = vadnb('eval', '--run', run)
    assert code==0 and out.startswith(f'{run} (step-000009), 9 numbers\n') and 'first error ' in out, err
    assert read_json(run/'eval.json')['metrics']['error']>0

def test_eval_on_other_data(run, tmp_path):
    code,out,err = vadnb('eval', '--run', run, '--out', tmp_path/'eval.json', '--data.test', '5')
    assert code==0 and ', 5 numbers' in out, err
    assert read_json(tmp_path/'eval.json')['overrides']==['--data.test', '5']

def test_eval_without_test_data_names_the_keys(run):
    assert 'names no test data; set one of --data.test, --data.more' in refuse('eval', '--run', run, '--data.test', '0')

# ---------------------------------------------------------------- predict

def test_predict_goes_on_after_what_is_damaged(run, texts, tmp_path):
    code,out,err = vadnb('predict', texts, '--run', run, '--out', tmp_path/'out')
    assert code==3 and err.splitlines()==[f"vadnb: error: {texts}/c.txt: could not convert string to float: 'four'",
                                          'vadnb: error: 1 of 3 could not be scored']
    assert [l for l in out.splitlines() if not l.startswith('  ')]==['a.txt: 2 numbers, of first step-000009', 'b.txt: 1 numbers, of first step-000009']
    assert re.search(r'^  2 scored in [0-9.]+ s, [0-9.e+]+ a second$', out, re.M), out
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==['a.said', 'b.said']

def test_predict_of_one_damaged_input_is_one_line(run, texts, tmp_path):
    assert f'{texts}/c.txt: could not convert' in refuse('predict', texts/'c.txt', '--run', run, '--out', tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_options_that_a_system_offers(run, texts, tmp_path):
    for given,out in ((), 'plain'), (('--times', '2'), 'twice'), (('--times=2', '--factor', '1'), 'again'):
        assert vadnb('predict', texts/'b.txt', '--run', run, '--out', tmp_path/out, *given)[0]==0
    plain,twice,again = (float((tmp_path/k/'b.said').read_text()) for k in ('plain', 'twice', 'again'))
    assert twice==pytest.approx(2*plain, abs=2e-3) and again==plain            # the last word counts
    assert yaml.safe_load(vadnb('predict', '--run', run, '--times', '3', '--print_config')[1])['factor']==3
    assert "did you mean 'factor'" in refuse('predict', texts/'b.txt', '--run', run, '--fcator', '2')

def test_options_of_others_are_refused_by_name(run, texts):
    assert "'--prompts' belongs to fgclip, and nothing in line would read it" in refuse('predict', texts/'b.txt', '--run', run, '--prompts', 'a.yaml')

def test_help_says_what_systems_offer(run):
    out = vadnb('predict', '--help')[1]
    assert '--prompts FILE' in out and '--times VALUE' in out and 'options of line' in out
    out = vadnb('predict', '--run', run, '--help')[1]
    assert '--prompts' not in out and '--times VALUE' in out and '--factor' in out

# ---------------------------------------------------------------- convert

def test_convert(tmp_path):
    (tmp_path/'a.txt').write_text('one two')
    code,out,err = vadnb('convert', 'words', tmp_path/'a.txt', tmp_path/'n', '--least', '2')
    assert (code, out)==(0, f'{tmp_path}/n: 2\n'), err
    for given,says in [(['--least', 'x'], "'least' must be a whole number, found 'x'"), (['--leats', '2'], "did you mean 'least'?"),
                       (['--captions', 'x'], "'--captions' belongs to ucf-boxes, and nothing in words would read it"), (['--least', '3'], 'has 2 words')]:
        assert says in refuse('convert', 'words', tmp_path/'a.txt', tmp_path/'m', *given)
    assert "'--normal' belongs to xd-annotation" in refuse('convert', 'skeleton', tmp_path, tmp_path/'m', '--normal', 'x')
    assert "'--captions' is missing" in refuse('convert', 'ucf-boxes', 'a.pkl', tmp_path/'m')

def test_help_lists_the_kinds():
    out = vadnb('convert', '--help')[1]
    for kind in ('skeleton', 'ucf-annotation', 'xd-annotation', 'ucf-boxes', 'image-tree', 'words'): assert f'\n  {kind} ' in out
    assert '--captions' in out and 'frames per second' in out

# ---------------------------------------------------------------- what a system lacks

def test_what_a_system_lacks_is_one_line_with_those_that_have_it(run):
    assert 'line has no demos; action_cls, adatad, fgclip and uniad have them' in refuse('demo', '--only', 'line')
    assert 'line has no pictures beside those of training; uniad has' in refuse('pictures', '--run', run)

@pytest.fixture
def demo_of_a_line(folder, tmp_path, monkeypatch):
    "The one system that plays, with a stranger's configuration"
    (tmp_path/'line.yaml').write_text(yaml.safe_dump(dict(system='line', data=dict(test=3), train=dict(epochs=3, batch_size=4, workers=0, device='cpu'))))
    (tmp_path/'a.txt').write_text('2')
    offered = Demo('a line', 'line-world', 'numbers', lambda cfg, progress: ('world: a line', [tmp_path/'a.txt']), str(tmp_path/'line.yaml'))
    monkeypatch.setattr(line_system, 'DEMO', offered, raising=False)
    monkeypatch.setattr(registry, 'offering', lambda what: dict(line=offered))
    return ['demo', '--folder', tmp_path/'runs']

@pytest.mark.parametrize('only', [['--only', 'line'], []])
def test_a_demo_that_is_stopped_shows_no_result_and_goes_on(demo_of_a_line, tmp_path, monkeypatch, only):
    def stopped(cfg, callbacks=()): return fit(cfg, [*callbacks, StopAt(2, 'received SIGTERM')])
    monkeypatch.setattr('vadnb.train.learner.fit', stopped)
    code,out,err = vadnb(*demo_of_a_line, *only)
    run = tmp_path/'runs'/'demo-line'
    assert code==143 and out.splitlines()[-1]==f'{run}: stopped at step 2 of 9; the same command goes on', out+err
    assert not (run/'eval.json').exists() and not (run/'report.html').exists()
    monkeypatch.setattr('vadnb.train.learner.fit', fit)
    code,out,err = vadnb(*demo_of_a_line, *only)
    assert code==0 and (run/'eval.json').is_file() and (run/'report.html').is_file(), out+err
    assert (tmp_path/'runs'/'demo.html').exists()==(not only)
    assert read_jsonl(run/'log.jsonl')[-1]['status']=='done'

def test_memory_of_the_system_at_hand(run, monkeypatch):
    def broken(run:str=''): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setitem(COMMANDS, 'report', broken)
    assert "lower 'data.train' or 'train.batch_size' (raise 'train.accumulate'" in refuse('report', '--run', run)
    assert "; lower 'train.batch_size' (raise 'train.accumulate'" in refuse('report')

# ---------------------------------------------------------------- processes

def commands(folder, lines):
    "For another process: commands one after the other, and what they said"
    for k,words in enumerate(lines): (folder/f"said{k}.{os.environ['RANK']}").write_text(json.dumps(vadnb(*words)))

def test_two_processes_evaluate_and_predict_as_one(run, texts, tmp_path):
    assert vadnb('eval', '--run', run, '--out', tmp_path/'one.json')[0]==0
    (texts/'c.txt').write_text('4')
    lines = [['eval', '--run', run, '--out', tmp_path/'two.json'],
             ['predict', *(texts/f'{k}.txt' for k in 'cab'), '--run', run, '--out', tmp_path/'out'],
             ['predict', texts, '--run', run, '--out', tmp_path/'folder']]
    assert ended(start(tmp_path/'two', commands, tmp_path, lines))==[0, 0]
    said = lambda k, rank: json.loads((tmp_path/f'said{k}.{rank}').read_text())
    for k in (0, 1, 2): assert (said(k, 0)[0], said(k, 1))==(0, [0, '', '']), said(k, 0)
    assert ', 9 numbers' in said(0, 0)[1] and read_json(tmp_path/'two.json')==read_json(tmp_path/'one.json')
    assert [l.split(':')[0] for l in said(1, 0)[1].splitlines() if not l.startswith('  ')]==['c.txt', 'a.txt', 'b.txt']
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==['a.said', 'b.said', 'c.said']
    # what one folder holds is shared out as well
    assert [l.split(':')[0] for l in said(2, 0)[1].splitlines() if not l.startswith('  ')]==['a.txt', 'b.txt', 'c.txt']
    assert sorted(p.name for p in (tmp_path/'folder').iterdir())==['a.said', 'b.said', 'c.said']
