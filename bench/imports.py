"How long a person waits for an import or for `vadnb --help`, each in a process of its own"
import subprocess, sys, time
from statistics import median

def seconds(*words, repeats=5):
    "Median over fresh processes; the first, which warms the disk cache, is not counted"
    taken = []
    for _ in range(repeats+1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter()-start)
    return median(taken[1:])

def rows():
    "One row per command, with what an empty interpreter takes beside it"
    empty = seconds('-c', 'pass')
    for work,words in [('import vadnb.data.tracks', ['-c', 'import vadnb.data.tracks']), ('vadnb --help', ['-c', 'from vadnb.cli import main; main(["--help"])'])]:
        yield dict(work=work, seconds=seconds(*words), limit=1.0, detail=dict(empty_interpreter_s=round(empty, 4)))

if __name__=='__main__':
    for row in rows(): print(row)
