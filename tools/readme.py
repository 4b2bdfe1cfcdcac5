"Write README.md from nbs/index.ipynb: prose, shown code, text and picture outputs; `#| hide` cells are left out"
import json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def text(value): return ''.join(value) if isinstance(value, list) else value

def from_root(markdown):
    "Links relative to nbs/ become relative to the repository"
    return re.sub(r'\]\((?!https?:|#|/)([^)]*)\)', lambda m: f"]({posixpath.normpath('nbs/'+m[1])})", markdown)

def outputs(cell):
    "Text outputs as indented blocks, markdown as it is; pictures of the index are files of their own"
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        if 'text/markdown' in data: yield text(data['text/markdown'])
        elif out.get('output_type')=='stream' or 'text/plain' in data and not any(k.startswith('image/') for k in data):
            shown = text(out.get('text') or data['text/plain']).rstrip()
            yield '\n'.join('    '+line for line in shown.splitlines())

def build(notebook):
    "The README of a notebook, as text"
    parts = ['<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->']
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = text(cell['source']).strip()
        if not source or re.search(r'^#\|\s*hide', source, re.M): continue
        if cell['cell_type']=='markdown': parts.append(from_root(source)); continue
        code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
        if code: parts.append(f'```python\n{code}\n```')
        parts += outputs(cell)
    return '\n\n'.join(parts)+'\n'

if __name__=='__main__':
    new,path = build(root/'nbs/index.ipynb'), root/'README.md'
    if '--check' in sys.argv:
        if path.read_text(encoding='utf-8')!=new: sys.exit('README.md is not what nbs/index.ipynb says: run `make readme` and commit the result')
    else: path.write_text(new, encoding='utf-8')
