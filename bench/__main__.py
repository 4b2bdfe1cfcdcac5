"Run the benchmarks, print a table, write bench.json: python -m bench [names]. The exit code says nothing of the numbers"
import importlib, json, os, platform, sys
from pathlib import Path

here = Path(__file__).resolve().parent
known = sorted(p.stem for p in here.glob('*.py') if p.stem[0]!='_')

def table(rows):
    "Lines of text: work, figure, limit, whether it holds"
    units = dict(ratio='x', seconds='s', count='times')
    cells = [['work', 'measured', 'limit', '']]
    for r in rows:
        measured = [f'{r[k]:.2f} {u}' if k!='count' else f'{r[k]} {u}' for k,u in units.items() if k in r]
        cells.append([r['work'], *measured, f"{r['limit']:g}", 'ok' if r['ok'] else 'ABOVE'])
    widths = [max(len(c[i]) for c in cells) for i in range(4)]
    return ['  '.join(c.ljust(w) if i in (0, 3) else c.rjust(w) for i,(c,w) in enumerate(zip(cs, widths))).rstrip() for cs in cells]

def main(names):
    unknown = [n for n in names if n not in known]
    if unknown: print(f"bench: error: '{unknown[0]}' is unknown (there are: {', '.join(known)})", file=sys.stderr); return 2
    rows = []
    for name in names or known:
        print(f'{name} ...', file=sys.stderr)
        for r in importlib.import_module(f'bench.{name}').rows():
            figure = next(r[k] for k in ('ratio', 'seconds', 'count') if k in r)
            rows.append(dict(r, bench=name, ok=bool(figure<=r['limit'])))
    print('\n'.join(table(rows)))
    path = here.parent/'bench.json'
    path.write_text(json.dumps(dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(), rows=rows), indent=1)+'\n')
    print(f'written to {path.name}')
    return 0

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
