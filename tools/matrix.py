"""The tests under every Python that is found, each with the newest dependencies, and under the oldest Python with the
oldest dependencies that settings.ini allows. Each runs in an environment of its own below .venvs; prints one table.

    python tools/matrix.py                                         all of it
    python tools/matrix.py --python 3.12 --dependencies locked     one Python, one choice: newest | oldest | locked"""
import argparse, json, os, re, shlex, shutil, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
CHOICES = ('newest', 'oldest', 'locked')

def requirements():
    "Requirement lines of the package, of development and of the site"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return [shlex.split(ini['DEFAULT'][k]) for k in ('requirements', 'dev_requirements', 'docs_requirements')]

def names(): return [re.match(r'[\w-]+', r)[0] for r in requirements()[0]]

def interpreters(wanted):
    "Version → path of the Pythons that run here, newest first"
    lines = subprocess.run([root/'tools/python.sh', '--all'], capture_output=True, text=True, check=True).stdout.split()
    ask = 'import sys; print("%d.%d" % sys.version_info[:2])'
    found = {subprocess.run([p, '-c', ask], capture_output=True, text=True, check=True).stdout.strip(): p for p in lines}
    if lost := [v for v in wanted if v not in found]:
        sys.exit(f"no Python {', '.join(lost)} was found; there are {', '.join(found) or 'none'} (uv python install {lost[0]})")
    return {v: p for v,p in found.items() if not wanted or v in wanted}

def install(python, place, dependencies, log):
    "An environment with the package, in `place`; whether that worked"
    own = place/'bin/python'
    pip = ['uv', 'pip', 'install', '-q', '--python', own]
    wanted = ['-r', root/'locks/dev.txt'] if dependencies=='locked' else [l for lines in requirements() for l in lines]
    how = dict(newest=['--upgrade'], oldest=['--resolution', 'lowest-direct'], locked=[])[dependencies]
    second = ['-r', root/'locks/fastcore2.txt'] if dependencies=='locked' else ['fastcore>=2']
    steps = [['uv', 'venv', '-q', '--clear', '--python', python, place], [*pip, *how, *wanted], [*pip, '--no-deps', '-e', root],
             [*pip, '--target', place/'fastcore2', '--no-deps', *second]]
    return all(subprocess.run(s, stdout=log, stderr=subprocess.STDOUT, cwd=root).returncode==0 for s in steps)

def last(text, pattern):
    found = re.findall(pattern, text)
    return found[-1] if found else '?'

def one(version, python, dependencies):
    "Install and test one combination: a row of the table"
    name,start = f'{version}-{dependencies}', time.time()
    place,path = root/'.venvs'/name, root/'.venvs'/f'{name}.log'
    path.parent.mkdir(exist_ok=True)
    print(f'Python {version}, {dependencies} dependencies: running, output in {path.relative_to(root)}', flush=True)
    row = dict(python=version, dependencies=dependencies, notebooks='-', tests='-', versions={})
    with open(path, 'w') as log:
        if not install(python, place, dependencies, log): return row|dict(notebooks='not installed', passed=False)
        listed = subprocess.run(['uv', 'pip', 'list', '--format', 'json', '--python', place/'bin/python'], capture_output=True, text=True)
        row['versions'] = {p['name'].lower(): p['version'] for p in json.loads(listed.stdout)}
        env = os.environ|dict(PATH=f"{place/'bin'}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS='1', VIRTUAL_ENV=str(place))
        def run(*words): return subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, cwd=root, env=env).returncode
        notebooks = run('timeout', '3000', 'nbdev_test', '--timing')
        tests = run('python', '-m', 'pytest', '-q', '-n', '2', '--dist', 'loadfile', 'tests')
    text = path.read_text(errors='replace')
    row['notebooks'] = 'passed' if notebooks==0 else 'failed'
    row['tests'] = last(text, r'((?:\d+ (?:passed|failed|errors?|skipped|warnings?|deselected)(?:, )?)+) in ')
    return row|dict(passed=notebooks==0 and tests==0, minutes=f'{(time.time()-start)/60:.1f}')

def table(rows):
    "One column per combination, as markdown"
    lines = [['', *(f"{r['python']} {r['dependencies']}" for r in rows)]]
    lines += [[k, *(r.get(k, '-') for r in rows)] for k in ('notebooks', 'tests', 'minutes')]
    lines += [[n, *(r['versions'].get(n.lower().replace('_', '-'), '-') for r in rows)] for n in names()]
    widths = [max(len(str(l[i])) for l in lines) for i in range(len(lines[0]))]
    def line(cells): return '| '+' | '.join(str(c).ljust(w) for c,w in zip(cells, widths))+' |'
    return '\n'.join([line(lines[0]), '|'+'|'.join('-'*(w+2) for w in widths)+'|', *map(line, lines[1:])])

def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument('--python', action='append', default=[], help='3.11 | 3.12 | ...; may be given several times')
    asked.add_argument('--dependencies', choices=CHOICES, help='default: newest for all, and oldest for the oldest Python')
    args = asked.parse_args()
    if not shutil.which('uv'): sys.exit('tools/matrix.py needs uv: pip install uv')
    found = interpreters(args.python)
    if not found: sys.exit('no Python from 3.14 down to 3.11 was found; uv python install 3.13')
    plan = [(v, args.dependencies or 'newest') for v in found]
    if args.dependencies is None: plan.append((list(found)[-1], 'oldest'))
    rows = [one(v, found[v], d) for v,d in plan]
    print('\n'+table(rows))
    sys.exit(not all(r['passed'] for r in rows))

if __name__=='__main__': main()
