"The notebooks' tools need fastcore 1, the package itself runs with fastcore 1 and 2 alike"
import ast, importlib, json, os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
second = Path(sys.prefix)/'fastcore2' # `make install` puts fastcore 2 here, beside the fastcore 1 of the environment
sources = [p for p in sorted((root/'vadnb').rglob('*.py')) if p.name!='_modidx.py']
modules = ['.'.join(p.relative_to(root).with_suffix('').parts).removesuffix('.__init__') for p in sources]

def names():
    "(module, name) of everything that the package takes from fastcore"
    found = set()
    for p in sources:
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0]=='fastcore': found |= {(node.module, a.name) for a in node.names}
            if isinstance(node, ast.Import): found |= {(a.name, '') for a in node.names if a.name.split('.')[0]=='fastcore'}
    return sorted(found)

@pytest.fixture
def fastcore2():
    if not (second/'fastcore').is_dir(): pytest.skip(f'no fastcore 2 in {second}; `make install` puts it there')
    return os.environ | dict(PYTHONPATH=os.pathsep.join([str(second), str(root)]), OMP_NUM_THREADS='1', TRANSFORMERS_VERBOSITY='error')

def run(code, env):
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

def test_little_is_taken_and_by_name():
    taken = names()
    assert all(name not in ('', '*') for _,name in taken), 'import names from fastcore one by one, so that this file can look them up'
    assert {module for module,_ in taken}<={'fastcore.basics', 'fastcore.foundation', 'fastcore.xtras'}
    for module,name in taken: assert hasattr(importlib.import_module(module), name), f'{module}.{name} is not in fastcore 1'

def test_names_exist_in_fastcore_2(fastcore2):
    code = f'import fastcore, importlib, json; print(json.dumps([fastcore.__version__, [hasattr(importlib.import_module(m), n) for m,n in {names()!r}]]))'
    version,found = run(code, fastcore2)
    assert version.startswith('2.') and all(found), dict(zip(names(), found))

def test_the_package_imports_with_fastcore_2(fastcore2):
    code = f'''import importlib, json, sys
for m in {modules!r}: importlib.import_module(m)
import fastcore
from vadnb.train.learner import Learner
# what `patch` adds is there, with its name and its docstring
print(json.dumps([fastcore.__version__, fastcore.__file__, Learner.fit.__name__, Learner.fit.__doc__, type(Learner.epoch).__name__]))'''
    version,file,name,doc,prop = run(code, fastcore2)
    assert version.startswith('2.') and Path(file).resolve().is_relative_to(second.resolve())
    assert (name, prop)==('fit', 'property') and doc
