"What is published: built as the registry wants it, installed without a checkout beside it, complete"
import email, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def run(*words, cwd):
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode==0, f'{done.stdout}\n{done.stderr}'
    return done.stdout

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A copy without tests, notebooks and leftovers of other builds, its source archive, and the wheel of each"
    top = tmp_path_factory.mktemp('packages')
    shutil.copytree(root/'vadnb', top/'copy/vadnb', ignore=shutil.ignore_patterns('__pycache__'))
    for p in root.iterdir():
        if p.is_file() and p.name!='.git': shutil.copy(p, top/'copy')
    build = 'from setuptools import build_meta as b, __version__; import sys; print(getattr(b, "build_"+sys.argv[1])(sys.argv[2]))'
    run(sys.executable, '-c', build, 'sdist', top, cwd=top/'copy')
    source, = top.glob('*.tar.gz')
    with tarfile.open(source) as t: t.extractall(top/'source', filter='data')
    unpacked, = (top/'source').iterdir()
    for name,folder in dict(direct=top/'copy', again=unpacked).items(): run(sys.executable, '-c', build, 'wheel', top/name, cwd=folder)
    return source, *(next((top/name).glob('*.whl')) for name in ('direct', 'again'))

def test_the_source_archive_gives_the_same_wheel(built):
    contents = [{n: zipfile.ZipFile(w).read(n) for n in zipfile.ZipFile(w).namelist() if not n.endswith('RECORD')} for w in built[1:]]
    assert contents[0]==contents[1]
    shipped = {p.relative_to(root).as_posix() for p in (root/'vadnb').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert {n for n in contents[0] if '.dist-info/' not in n}==shipped

def test_the_wheel_says_what_settings_say(built):
    with zipfile.ZipFile(built[1]) as z: said = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))))
    assert (said['Name'], said['Version'], said['Requires-Python'])==('vadnb', cfg['version'], f">={cfg['min_python']}")
    assert set(said.get_all('Provides-Extra'))=={k.removesuffix('_requirements') for k in cfg if k.endswith('_requirements')}
    assert {f'Programming Language :: Python :: {v}' for v in ('3.11', '3.12', '3.13')}<={*said.get_all('Classifier')}
    assert re.findall(r'\]\((?!https?:|#)[^)]*\)', said.get_payload())==[]

def test_both_install_and_run_without_a_checkout(built, tmp_path):
    for archive in built[:2]:
        place = tmp_path/archive.suffix
        run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--no-build-isolation', '--target', place, archive, cwd=tmp_path)
        code = f'import sys; sys.path.insert(0, {str(place)!r}); import vadnb.config as c; print(c.__file__, *c.shipped_configs())'
        where,*names = run(sys.executable, '-P', '-I', '-c', code, cwd=tmp_path).split()
        assert Path(where).is_relative_to(place) and {f'{s}_demo' for s in ('fgclip', 'uniad', 'adatad', 'action_cls')}<={*names}
        assert (place/'bin/vadnb').is_file()

def test_version_and_licence_stand_once():
    "Where files of others need them again, they are the same"
    cited = dict(re.findall(r'^(version|license): (\S+)$', (root/'CITATION.cff').read_text(encoding='utf-8'), re.M))
    assert cited==dict(version=cfg['version'], license='Apache-2.0')
    assert re.search(r'^## (\S+)$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[1]==cfg['version']
    assert f"version = '{cfg['version']}'" in (root/'vadnb/__init__.py').read_text().replace('"', "'").replace('__version__', 'version')
