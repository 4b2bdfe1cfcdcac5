"How long a person waits for an import, for `vadnb --help` and for the line about a mistake, each in a process of its own"
import resource, subprocess, sys, time
from statistics import median

MISTAKES = { # what is wrong → words of the command
    'configuration file': ['train', '--config', 'nowhere.yaml'], 'key': ['train', '--config', 'uniad_demo', '--optim.rl', '1'],
    'run folder': ['predict', 'a.mp4', '--run', 'nowhere'],
    **{f'data folder of {s}': ['train', '--config', f'{s}_demo', '--data_root', 'nowhere'] for s in ('fgclip', 'uniad', 'adatad', 'action_cls')}}

def used():
    "CPU-seconds of all children so far"
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime+spent.ru_stime

def measured(*words, repeats=5, clock=time.perf_counter, code=0):
    "Median over fresh processes that end with `code`; the first, which warms the disk cache, is not counted"
    taken = []
    for _ in range(repeats+1):
        start = clock()
        done = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        taken.append(clock()-start)
        if done.returncode!=code: raise RuntimeError(f'{words}: ended with {done.returncode}, not with {code}')
    return median(taken[1:])

def rows():
    "A row per command, with what an empty interpreter takes beside it; a row per mistake, with the import of torch beside it"
    empty = measured('-c', 'pass')
    for work,words in [('import vadnb.data.tracks', ['-c', 'import vadnb.data.tracks']), ('vadnb --help', ['-c', 'from vadnb.cli import main; main(["--help"])'])]:
        yield dict(work=work, seconds=measured(*words), limit=1.0, detail=dict(empty_interpreter_s=round(empty, 4)))
    torch = measured('-c', 'import torch', clock=used)
    for what,words in MISTAKES.items():
        spent = measured('-m', 'vadnb.cli', *words, clock=used, code=2, repeats=3)
        yield dict(work=f'an error in a {what}, from the shell, vs import torch, CPU-seconds', ratio=spent/torch, limit=1.2, detail=dict(vadnb_cpu_s=round(spent, 2), torch_cpu_s=round(torch, 2)))

if __name__=='__main__':
    for row in rows(): print(row)
