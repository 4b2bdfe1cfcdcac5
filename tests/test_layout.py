"What keeps the repository in shape: layers, one notebook per module, clean stored outputs, nothing dangerous"
import ast, functools, json, re
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
layers = ['data', 'worlds', 'models', 'losses', 'metrics', 'results', 'train', 'report', 'systems', 'commands', 'cli']
modules = {'.'.join(p.relative_to(root).with_suffix('').parts): p for p in sorted((root/'vadnb').rglob('*.py')) if not p.name.startswith('_')}
notebooks = {p.relative_to(root/'nbs').as_posix(): p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}
each_module = pytest.mark.parametrize('name', modules)
each_notebook = pytest.mark.parametrize('name', notebooks)

# read and parsed once; who asks only looks
@functools.cache
def source(name): return modules[name].read_text()
@functools.cache
def tree(name): return ast.parse(source(name))

def rank(module):
    "Place of `vadnb.<part>...` in the flow of data; core, requirements, config, plots and pictures come before everything"
    part = module.split('.')[1] if '.' in module else ''
    if part in ('', 'core', 'requirements', 'config', 'faults', 'strangers', 'switches', 'kinds', 'meant', 'plots', 'pictures', '_modidx'): return 0
    return 1+layers.index(part)

def imported(tree, module):
    "Modules that `module` imports, at the top, inside functions or by name"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            above = module.split('.')[:-node.level] if node.level else []
            source = '.'.join(above+[node.module] if node.module else above)
            yield source
            # `from vadnb import plots` names a module too
            if source=='vadnb': yield from (f'{source}.{a.name}' for a in node.names if f'{source}.{a.name}' in modules)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
            arg = node.args[0]
            first = arg.values[0] if isinstance(arg, ast.JoinedStr) else arg
            yield str(getattr(first, 'value', '?')).rstrip('.')

def wrong_ways(tree, module): return [m for m in imported(tree, module) if m.split('.')[0]=='vadnb' and rank(m)>rank(module)]

@each_module
def test_imports_point_left(name): assert wrong_ways(tree(name), name)==[]

def test_an_import_to_the_right_is_seen():
    for code in ('from vadnb.train.learner import fit', 'from ..train.learner import fit', 'import vadnb.systems.fgclip', 'def f():\n    from ..cli import main',
                 'from vadnb import cli', 'import_module(f"vadnb.systems.{name}")', 'importlib.import_module("vadnb.report.report")'):
        assert wrong_ways(ast.parse(code), 'vadnb.models.clip'), code
    for code in ('from ..data.video import VideoReader', 'from ..core import DataError', 'from .aggregate import unit', 'from .. import __version__', 'import torch'):
        assert not wrong_ways(ast.parse(code), 'vadnb.models.clip'), code

# tensors in, tensors out; weights and vocabulary have to come from somewhere, and only there
outside = {'pathlib', 'os', 'io', 'json', 'csv', 'yaml', 'shutil', 'tempfile', 'gzip', 'vadnb.config'}
# published weights come from files of others, through one module; CLIP's vocabulary is one, and its folders name a size;
# a Qwen is a folder of many files, tokenizer among them, and is given back as one; a tiny one is written to be read so;
# a decoder is saved with its configuration, in the place and under the names that its users' guide gives
may_read = {'vadnb.models.weights': {'pathlib'}, 'vadnb.models.clip': {'pathlib'}, 'vadnb.models.clip_tokens': {'pathlib', 'gzip'}, 'vadnb.models.qwen_folder': {'pathlib'},
            'vadnb.models.tiny_qwen': {'pathlib'}, 'vadnb.models.action_decoder': {'pathlib'}}

@pytest.mark.parametrize('name', [m for m in modules if m.split('.')[1] in ('models', 'losses', 'metrics')])
def test_models_losses_and_metrics_know_no_files(name):
    parsed = tree(name)
    assert set(imported(parsed, name)) & outside <= may_read.get(name, set())
    assert not [m for m in imported(parsed, name) if m.startswith('vadnb.data')]
    if name not in may_read: assert not [n for n in ast.walk(parsed) if isinstance(n, ast.Call) and ast.unparse(n.func)=='open']

dangerous = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'requests', 'urllib', 'urllib3', 'http', 'httpx', 'aiohttp', 'socket', 'ftplib', 'huggingface_hub'}
plain_yaml = {'safe_load', 'safe_dump', 'SafeLoader', 'YAMLError'}

def dangers(tree, module=''):
    "What could run a stranger's code or reach a network, in words"
    found = [f'imports {m}' for m in imported(tree, module) if m.split('.')[0] in dangerous]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value)=='yaml' and node.attr not in plain_yaml: found.append(f'yaml.{node.attr}')
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and 'trust_remote_code' in node.value: found.append('trust_remote_code')
        if isinstance(node, ast.ImportFrom) and node.module=='yaml': found.append('from yaml import')
        if not isinstance(node, ast.Call): continue
        called,words = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        last = called.rsplit('.')[-1]
        if called in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'breakpoint') or called.startswith(('torch.hub.', 'torch.utils.model_zoo')): found.append(called)
        if called=='torch.load' and ast.unparse(words.get('weights_only', ast.Constant(None)))!='True': found.append('torch.load without weights_only=True')
        if 'allow_pickle' in words and ast.unparse(words['allow_pickle'])!='False': found.append('allow_pickle')
        if 'trust_remote_code' in words: found.append('trust_remote_code')
        if last in ('hf_hub_download', 'snapshot_download', 'load_state_dict_from_url', 'urlopen', 'urlretrieve'): found.append(called)
        if 'shell' in words and ast.unparse(words['shell'])!='False': found.append('shell=True')
    return found

@each_module
def test_nothing_dangerous(name): assert dangers(tree(name), name)==[]

def test_dangers_are_seen():
    for code in ('import pickle', 'from urllib.request import urlopen', 'eval(x)', 'exec(x)', 'torch.load(p)', 'torch.load(p, weights_only=False)', 'yaml.load(t)', 'yaml.unsafe_load(t)', 'yaml.Loader',
                 'from yaml import load', 'f(trust_remote_code=True)', 'f(**{"trust_remote_code": True})', 'np.load(p, allow_pickle=True)', 'torch.hub.load(x)', 'run(x, shell=True)', 'os.system(x)', 'def f():\n    import requests'):
        assert dangers(ast.parse(code)), code
    for code in ('system.eval()', 'model.compile()', 're.compile(p)', 'torch.load(p, weights_only=True)', 'yaml.safe_load(t)', 'np.load(p, allow_pickle=False)', 'from .http import x'):
        assert not dangers(ast.parse(code), 'vadnb.core'), code

@functools.cache
def cells(name): return json.loads(notebooks[name].read_text(encoding='utf-8'))['cells']
def text(value): return ''.join(value) if isinstance(value, list) else str(value)
@functools.cache
def default_exp(name):
    found = [m[1] for c in cells(name) if c['cell_type']=='code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', text(c['source']), re.M))]
    assert len(found)<=1
    return found[0] if found else None

def test_every_module_has_its_notebook_and_every_notebook_its_module():
    made = {}
    for name in notebooks:
        if not (exp := default_exp(name)): continue
        folder,stem = Path(name).parent.as_posix(), re.sub(r'^\d+_', '', Path(name).stem)
        assert exp==(stem if folder=='.' else f'{folder}.{stem}'.replace('/', '.')), f'{name} exports {exp}'
        assert exp not in made, f'{name} and {made[exp]} export {exp}'
        made[exp] = name
    assert {f'vadnb.{m}' for m in made}==set(modules)

@each_module
def test_a_module_says_which_notebook_to_edit(name):
    notebook = next(n for n in notebooks if f'vadnb.{default_exp(n)}'==name)
    assert f'nbs/{notebook}' in source(name)[:400]

def outputs(name):
    "(cell id, text) of what is stored below the cells; pictures are not text"
    for c in cells(name):
        for o in c.get('outputs', []):
            yield c['id'], text(o.get('text', ''))
            yield from ((c['id'], text(v)) for kind,v in o.get('data', {}).items() if kind.startswith('text/') or kind in ('image/svg+xml', 'application/json'))

@each_notebook
def test_notebook_is_clean(name):
    assert notebooks[name].stat().st_size<=400_000
    ids = [c['id'] for c in cells(name)]
    assert len(ids)==len(set(ids))
    for c in cells(name):
        assert not [o for o in c.get('outputs', []) if o['output_type']=='error'], c['id']
        lines = text(c['source']).splitlines()
        if c['cell_type']=='code' and re.search(r'^#\|\s*exporti?\b', text(c['source']), re.M): assert len(lines)<=60, f"cell {c['id']} exports {len(lines)} lines"
    for i,said in outputs(name):
        assert not re.search(r'\d%\||\bit/s\]|\bs/it\]|\r|Traceback \(most recent', said), f'cell {i} stores a progress bar or a traceback'
        assert not re.search(r'\b0x[0-9a-f]{8,}\b', said), f'cell {i} stores a memory address, another one each time'

# folders of one machine, and where packages came from on it
machine = re.compile(r'(?<![\w.:/-])/(?:work|root|home|tmp|Users)(?:/|\b)')
hosts = {'github.com', 'arxiv.org', 'vadnb.github.io', 'matplotlib.org', 'www.w3.org', 'purl.org', 'creativecommons.org', 'evil.example', 'localhost'}

def leaks(said):
    return machine.findall(said) + [h for h in re.findall(r'https?://([\w.-]+)', said) if h not in hosts] + re.findall(r'index[-_]url|(?:pypi|artifactory|nexus|conda)\.[\w.-]*\w/|/simple/', said)

def test_leaks_are_seen():
    for said in ('/work/x', 'in /tmp/a.mp4', "'/root'", '/home/me', 'https://pypi.example.org/simple', '--index-url x', 'http://10.0.0.1:8080/'): assert leaks(said), said
    for said in ('a/work/b', 'framework/home', 'https://github.com/a/b', 'runs/tmp', '../shared', 'and/or'): assert not leaks(said), said

@each_notebook
def test_notebook_names_no_machine(name):
    for c in cells(name): assert not leaks(text(c['source'])), c['id']
    for i,said in outputs(name): assert not leaks(said), i

def test_sources_name_no_machine():
    files = [p for part in ('vadnb', 'tools', 'bench', 'tests', '.github', '.ci') for p in (root/part).rglob('*') if p.is_file() and p.suffix in ('.py', '.yaml', '.yml', '.json', '')]
    files += [p for p in root.iterdir() if p.is_file() and p.suffix in ('.py', '.ini', '.md', '.toml', '') and p.name not in ('.git', 'LICENSE')]
    assert len(files)>40
    for p in files:
        if p!=Path(__file__).resolve(): assert not leaks(p.read_text(encoding='utf-8')), p.relative_to(root)

# ---------------------------------------------------------------- readable
# What is longer than the rules allow, counted: a figure here may only fall, and falls together with the code.
LONG_LINES = {'vadnb.losses.contrastive': 17, 'vadnb.losses.reconstruction': 12, 'vadnb.models.aggregate': 4,
              'vadnb.models.clip': 37, 'vadnb.models.clip_weights': 20, 'vadnb.models.feature_decoder': 7,
              'vadnb.models.memory_bank': 7, 'vadnb.models.uniad': 34}
LONG_MODULES = {'vadnb.models.clip': 402, 'vadnb.models.uniad': 558}
LARGE_CELLS = {'losses/32_reconstruction.ipynb': 1, 'models/20_clip.ipynb': 1,
               'models/26_uniad.ipynb': 4, 'models/27_feature_decoder.ipynb': 1}
# The next three hold in every notebook but those of models and losses, whose turn comes when they are next changed.
INLINE_RAISES = {'losses/30_contrastive.ipynb': 3, 'losses/32_reconstruction.ipynb': 8,
                 'models/19_clip_weights.ipynb': 7, 'models/20_clip.ipynb': 15, 'models/21_aggregate.ipynb': 1,
                 'models/22_memory_bank.ipynb': 3, 'models/26_uniad.ipynb': 14, 'models/27_feature_decoder.ipynb': 7}
CROWDED_CELLS = {'losses/30_contrastive.ipynb': 1, 'losses/32_reconstruction.ipynb': 2, 'models/20_clip.ipynb': 1,
                 'models/22_memory_bank.ipynb': 1, 'models/26_uniad.ipynb': 3}
UNPROVEN_RUNS = {'models/20_clip.ipynb': 2}

def code_lines(name):
    "Lines of a module, without the list of public names that nbdev writes"
    return re.sub(r'^__all__ = \[.*?\]$', '', source(name), flags=re.M | re.S).splitlines()

def nodes(source): return sum(1 for _ in ast.walk(ast.parse(source)))
def exported(name): return [s for c in cells(name) if (s := text(c['source'])).startswith('#| export')]

@each_module
def test_lines_of_at_most_120_columns(name):
    assert sum(len(l)>120 for l in code_lines(name))==LONG_LINES.get(name, 0)

@each_module
def test_modules_below_350_lines(name):
    n = len(source(name).splitlines())
    assert n==LONG_MODULES[name] if name in LONG_MODULES else n<=350

@each_notebook
def test_exported_cells_are_small(name):
    assert sum(nodes(s)>450 for s in exported(name))==LARGE_CELLS.get(name, 0)

def inline_raises(source):
    "Lines on which a condition and what it raises stand together"
    return [r.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.If)
            for r in n.body if isinstance(r, ast.Raise) and r.lineno==n.test.end_lineno]

@each_notebook
def test_a_condition_and_its_raise_on_two_lines(name):
    assert sum(len(inline_raises(s)) for s in exported(name))==INLINE_RAISES.get(name, 0)

def test_a_raise_behind_its_condition_is_seen():
    for code in ("if x: raise E('a',\n    'b')", 'def f():\n    try: g()\n    except E as e:\n        if x: raise',
                 'if a: pass\nelif b: raise E', 'if (a and\n    b): raise E', 'if a: b(); raise E'):
        assert inline_raises(code), code
    for code in ('if x:\n    raise E', 'try: f()\nexcept E as e: raise F from None', 'if x: y = 1', 'raise a or b'):
        assert not inline_raises(code), code

def definitions(source): return [n.name for n in ast.parse(source).body if hasattr(n, 'name')]

@each_notebook
def test_exported_cells_define_two_things_at_most(name):
    assert sum(len(definitions(s))>2 for s in exported(name))==CROWDED_CELLS.get(name, 0)

def test_definitions_are_counted():
    code = 'A = 1\nclass B:\n    def c(self): pass\n@patch\ndef d(self:B):\n    def e(): pass\nasync def f(): pass'
    assert definitions(code)==['B', 'd', 'f']

def proves(cell):
    "Whether a cell that is not exported asserts, tests or shows something"
    if cell.get('outputs'): return True
    lines = [l for l in text(cell['source']).splitlines() if not l.startswith(('%', '!'))]
    for node in ast.walk(ast.parse('\n'.join(lines))):
        if isinstance(node, ast.Assert): return True
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
        if re.match('(test|assert)_', called.rsplit('.')[-1]): return True
    return False

def only_imports(source): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)

def unproven(cells):
    "Runs of more than three exported cells, imports aside, in which nothing is proven: the ids of each"
    runs = [[]]
    for cell in cells:
        if cell['cell_type']!='code': continue
        if not text(cell['source']).startswith('#| export'): runs += [[]] if proves(cell) else []
        elif not only_imports(text(cell['source'])): runs[-1].append(cell['id'])
    return [run for run in runs if len(run)>3]

@each_notebook
def test_a_proof_within_three_exports(name):
    found = unproven(cells(name))
    assert len(found)==UNPROVEN_RUNS.get(name, 0), found

def test_a_run_without_a_proof_is_seen():
    def code(source, *outputs): return dict(cell_type='code', id=source[-4:], source=source, outputs=list(outputs))
    one,bare,prose = code('#| export\nx = 1'), code('y = f(x)'), dict(cell_type='markdown', id='m', source='assert it')
    imports = code('#| export\nfrom a import b\nimport c')
    for between in ([], [bare], [prose], [code('from fastcore.test import test_eq')]):
        assert unproven([imports, one, one, *between, one, one])==[['x = 1'[-4:]]*4], between
    for proof in (code('assert x'), code('test_eq(x, 1)'), code('np.testing.assert_allclose(x, 1)'),
                  code('x', dict(output_type='execute_result'))):
        assert not unproven([one, one, one, proof, imports, one, one]), proof

def test_no_notebook_but_of_models_and_losses_is_excepted():
    for table in (INLINE_RAISES, CROWDED_CELLS, UNPROVEN_RUNS):
        assert {n.split('/')[0] for n in table}<={'models', 'losses'} and table.keys()<=notebooks.keys()

def test_no_two_notebooks_of_a_folder_share_a_number():
    places = [(Path(n).parent, m[1]) for n in notebooks if (m := re.match(r'(\d+)_', Path(n).name))]
    assert len(places)==len(set(places)), sorted(str(p) for p in set(places) if places.count(p)>1)

# ---------------------------------------------------------------- the spine knows no system
SYSTEM_NAMES = re.compile(r'\b(fgclip|uniad|adatad|action_cls|FGCLIP|UniAD)\b')
SPINE = ('core', 'requirements', 'config', 'faults', 'strangers', 'switches', 'plots', 'pictures', 'data', 'worlds', 'models', 'losses', 'metrics',
         'results', 'train', 'report', 'commands', 'cli')
NETWORKS = {'models.uniad', 'uniad', 'UniAD'} # a network of that name, which systems are made of
# Keys of a system that are words of everybody: what the spine means by them.
IN_GENERAL = {
    'box_iou': 'a function of metrics.boxes, and a figure of fgclip',
    'cache_dtype': 'what messages of train.feature_cache and train.kept_part call an argument',
    'cache_folder': 'an argument of train.feature_cache',
    'cache_gb': 'an argument of train.feature_cache',
    'calibration_error': 'a function of metrics.classification, and a figure of metrics.classification_tables',
    'mean_class_accuracy': 'a function of metrics.classification, and a figure of metrics.classification_tables',
    'pixel_rate': 'an argument of results.thresholds, beside the rate of images',
    'video_scores': 'the module results.video_scores',
}

def words_of_code(tree):
    "Names and texts of a module outside of comments and docstrings"
    said = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and n.body and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said: yield node.value
        for field in ('id', 'attr', 'name', 'arg', 'module'):
            if isinstance(value := getattr(node, field, None), str): yield value

def part(module): return module.split('.')[1]

@pytest.mark.parametrize('name', [m for m in modules if part(m) in SPINE])
def test_no_system_is_named(name):
    of_network = NETWORKS if name=='vadnb.models.uniad' else {'models.uniad'}
    assert not [w for w in words_of_code(tree(name)) if SYSTEM_NAMES.search(w) and w not in of_network]

KNOWS_NO_SYSTEM = [m for m in modules if part(m) in ('train', 'report', 'results', 'commands', 'cli')]

def is_config(node):
    return isinstance(node, ast.ClassDef) and any('dataclass' in ast.unparse(d) for d in node.decorator_list)

def keys_of(parsed):
    "Fields of the dataclasses of a module"
    return {n.target.id for c in ast.walk(parsed) if is_config(c) for n in c.body if isinstance(n, ast.AnnAssign)}

def texts_under(parsed, name, seen=()):
    "Texts in what a module assigns to `name`, also through other names of it and of modules it imports from"
    for node in ast.walk(parsed):
        if isinstance(node, ast.Assign) and name in {n.attr if isinstance(n, ast.Attribute) else getattr(n, 'id', '')
                                                     for t in node.targets for n in getattr(t, 'elts', [t])}:
            # how an f-string writes a number is no text
            written = {id(c) for n in ast.walk(node.value) if getattr(n, 'format_spec', None)
                       for c in ast.walk(n.format_spec)}
            for n in (n for n in ast.walk(node.value) if id(n) not in written):
                if isinstance(n, ast.Constant) and isinstance(n.value, str): yield n.value
                if isinstance(n, ast.Name) and n.id not in seen: yield from texts_under(parsed, n.id, (*seen, name))
        if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
            found = [m for m in modules if node.module and m.endswith('.'+node.module.removeprefix('vadnb.'))]
            if found: yield from texts_under(tree(found[0]), name, (*seen, name))

@functools.cache
def words_of_one_system():
    "Configuration keys and figures of the systems that no run in general has, and that mean nothing in general"
    words = set()
    for name in modules:
        if re.fullmatch(r'vadnb\.systems\.\w+\.config', name): words |= keys_of(tree(name))
        if re.fullmatch(r'vadnb\.systems\.\w+\.system', name):
            words |= {w for said in texts_under(tree(name), 'metrics') for w in re.findall(r'\w+', said)}
    # a key of one plain word, such as window or top, is a word of everybody
    words = {w for w in words if '_' in w} | ({'prompts'} & words)
    return words-keys_of(tree('vadnb.train.system'))-keys_of(tree('vadnb.train.optim'))

def of_one_system(words): return re.compile(rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b")

@pytest.mark.parametrize('name', KNOWS_NO_SYSTEM)
def test_nothing_of_a_single_system(name):
    special = of_one_system(words_of_one_system()-IN_GENERAL.keys())
    assert not {m[1]: said for said in words_of_code(tree(name)) if (m := special.search(said))}

def test_keys_and_figures_of_systems_are_known():
    words = words_of_one_system()
    assert {'prompts', 'hard_negative_weight', 'frame_auc', 'neighbor_masks', 'image_auroc_std', 'pixel_auroc'}<=words
    assert not words & {'lr', 'batch_size', 'seed', 'name', 'data_root'}
    special = of_one_system(words-IN_GENERAL.keys())
    for code in ('cfg.score.prompts', "found['frame_auc']", 'f(neighbor_masks=1)', "f'{n} prompts'"):
        assert any(map(special.search, words_of_code(ast.parse(code)))), code
    assert not any(map(special.search, words_of_code(ast.parse("cfg.lr, 'prompter', size"))))
    # a configuration and a list of figures that somebody adds
    assert keys_of(ast.parse('@dataclass\nclass C:\n    tubes:int = 3\n    def f(self): pass'))=={'tubes'}
    code = "BEST = 'tube_ap'\nclass S:\n    def __init__(self): self.metrics = (BEST, *(f'recall/{t:g}' for t in T))"
    assert {*texts_under(ast.parse(code), 'metrics')}=={'tube_ap', 'recall/'}

def test_words_in_general_are_needed():
    said = [w for name in KNOWS_NO_SYSTEM for w in words_of_code(tree(name))]
    assert {m for w in said for m in of_one_system(words_of_one_system()).findall(w)}==IN_GENERAL.keys()

def test_a_name_of_a_system_is_seen():
    for code in ("x = 'fgclip_demo uniad'", 'def uniad(): pass', 'from vadnb.systems.fgclip import Config', 'f(adatad=1)'):
        assert any(map(SYSTEM_NAMES.search, words_of_code(ast.parse(code)))), code
    for code in ("'of uniad'", 'def f():\n    "as UniAD does"', '# fgclip', "x = 'unianimous'"):
        assert not any(map(SYSTEM_NAMES.search, words_of_code(ast.parse(code)))), code
