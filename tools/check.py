"The repository is consistent: notebooks clean, package exported from them, README made from the index, locks in step. Compares copies, changes nothing"
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
parts = ['nbs', 'vadnb', 'tools', 'settings.ini', 'setup.py', 'README.md']

def run(folder, *words):
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")

def copy(folder):
    for p in parts:
        if (root/p).is_dir(): shutil.copytree(root/p, folder/p, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(root/p, folder/p)

def differences(folder, part, pattern):
    "Files below `part` that differ between the checkout and the copy, or exist in only one of them"
    names = lambda top: {p.relative_to(top).as_posix() for p in (top/part).rglob(pattern) if '.ipynb_checkpoints' not in p.parts}
    here,there = names(root), names(folder)
    return sorted(here^there) + sorted(n for n in here&there if not filecmp.cmp(root/n, folder/n, shallow=False))

with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp)
    copy(folder)
    run(folder, 'nbdev_clean')
    if found := differences(folder, 'nbs', '*.ipynb'): sys.exit(f"notebooks are not clean, run nbdev_clean: {', '.join(found)}")
    # a module without a notebook survives an export, so the export starts from none; an __init__ is written by hand
    for p in (folder/'vadnb').rglob('*.py'):
        if p.name!='__init__.py': p.unlink()
    run(folder, 'nbdev_export')
    if found := differences(folder, 'vadnb', '*.py'): sys.exit(f"the package is not what the notebooks export, run nbdev_export (or nbdev_update after editing a .py): {', '.join(found)}")
run(root, sys.executable, 'tools/readme.py', '--check')
run(root, sys.executable, 'tools/lock.py', '--check')
print('notebooks clean, package in step, README in step, locks in step')
