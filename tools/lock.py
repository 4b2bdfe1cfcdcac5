"""The versions that development and CI use, written down: `locks/dev.txt` from the requirements of settings.ini.

    python tools/lock.py            writes the lock anew, with the newest versions that fit (needs uv and a package registry)
    python tools/lock.py --check    the lock is in step with settings.ini; needs no network

One lock serves every Python and platform: a line may end with the marker of those it is for. Users are not bound by it."""
import hashlib, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
DEV,SECOND = root/'locks/dev.txt', root/'locks/fastcore2.txt'
PYTHONS,PLATFORMS = ('3.11', '3.12', '3.13'), ('linux', 'darwin', 'win32')

def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def wanted():
    "Requirement lines of the development environment"
    cfg = settings()
    return [l for key in ('requirements', 'dev_requirements', 'docs_requirements') for l in shlex.split(cfg[key])]

def digest(lines):
    "Of what was asked for, however it is spaced"
    asked = [*sorted(lines), settings()['min_python']]
    return hashlib.sha256('\n'.join(asked).encode()).hexdigest()[:16]

def resolve(lines, path, *words):
    "Let uv choose the newest versions and write them to `path`"
    cmd = ['uv', 'pip', 'compile', '-', '--universal', '--python-version', settings()['min_python'], '--no-header', '--no-annotate',
           '--quiet', '--upgrade', *words]
    if not shutil.which('uv'): sys.exit('tools/lock.py needs uv: pip install uv')
    done = subprocess.run(cmd, input='\n'.join(lines), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'tools/lock.py: uv could not resolve the requirements:\n{done.stderr}')
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'# Made by tools/lock.py from settings.ini; `make lock` renews it. asked: {digest(lines)}\n{done.stdout}')
    print(f'{path.relative_to(root)}: {len(pins(path))} packages')

def pins(path):
    "The `name==version ; marker` lines of a lock"
    lines = [l.strip() for l in path.read_text().splitlines() if l.strip() and not l.startswith('#')]
    res = [Requirement(l) for l in lines]
    for r in res:
        if [s.operator for s in r.specifier]!=['==']: raise InvalidRequirement(f'{r} states no single version')
    return res

def environments():
    "What markers may ask about: every Python and platform that is supported"
    here = default_environment()
    for python in PYTHONS:
        for platform in PLATFORMS:
            yield here|dict(python_version=python, python_full_version=f'{python}.99', sys_platform=platform, platform_machine='x86_64')

def holds(r, env): return r.marker is None or r.marker.evaluate(env)

def faults(lines, locked, said):
    "Every way in which a lock is not what was asked for, in words"
    if said!=digest(lines):
        yield 'was made from other requirements than those of settings.ini'
    for env in environments():
        place = f"Python {env['python_version']} on {env['sys_platform']}"
        chosen = {canonicalize_name(p.name): next(iter(p.specifier)).version for p in locked if holds(p, env)}
        for r in map(Requirement, lines):
            if not holds(r, env): continue
            version = chosen.get(canonicalize_name(r.name))
            if version is None:
                yield f'has no {r.name} for {place}'
            elif not r.specifier.contains(Version(version), prereleases=True):
                yield f'holds {r.name} {version} for {place}, settings.ini allows {r.specifier}'

def check():
    for path,lines in ((DEV, wanted()), (SECOND, ['fastcore>=2'])):
        place = path.relative_to(root)
        if not path.is_file(): sys.exit(f'{place} is missing; `make lock` makes it')
        said = re.match(r'#.* asked: (\w+)', path.read_text())
        try: found = list(faults(lines, pins(path), said and said[1]))
        except InvalidRequirement as e: sys.exit(f'{place} holds a line that is no pin ({e}); `make lock` renews it')
        more = f' (and {len(found)-4} more)' if len(found)>4 else ''
        if found: sys.exit(f"{place} {'; it '.join(found[:4])}{more}; `make lock` renews it")
    print('locks in step with settings.ini')

if __name__=='__main__':
    if sys.argv[1:]==['--check']: check()
    elif sys.argv[1:]: sys.exit(__doc__)
    else:
        resolve(wanted(), DEV)
        resolve(['fastcore>=2'], SECOND)
