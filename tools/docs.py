"The site: notebooks as they are stored, floor by floor; names lead to where they are made, and nothing is fetched from elsewhere"
import argparse, ast, json, posixpath, re, shutil, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
# folder → what the reader finds there; the order is that of the floors, after what one reads first
FLOORS = dict(tutorials='Tutorials', reports='Reports', root='What all floors use', data='Data', worlds='Worlds', models='Models', losses='Losses',
              metrics='Metrics', results='Results', train='Training', report='Run reports', systems='Systems', commands='Commands')

def text(value): return ''.join(value) if isinstance(value, list) else value
def read(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def is_hidden(source): return bool(re.search(r'^#\|\s*(hide|default_exp)\b', source, re.M)) or 'nbdev_export()' in source
def without_directives(source): return re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()

def floors(nbs):
    "Floor → notebooks, relative to `nbs`"
    res = {k: [] for k in FLOORS}
    for p in sorted(nbs.rglob('*.ipynb')):
        name = p.relative_to(nbs)
        if '.ipynb_checkpoints' in name.parts or name.name=='index.ipynb': continue
        res[name.parts[0] if len(name.parts)>1 else 'root'].append(name.as_posix())
    return res

# ---------------------------------------------------------------- names
def made_in(source):
    "Names that an exported cell defines; methods that are patched in as Class.method"
    for node in ast.parse(without_directives(source)).body:
        if isinstance(node, ast.ClassDef): yield node.name
        elif isinstance(node, ast.FunctionDef):
            patched = any('patch' in ast.unparse(d) for d in node.decorator_list)
            owner = node.args.args[0].annotation if patched and node.args.args else None
            yield f'{ast.unparse(owner)}.{node.name}' if owner else node.name
        elif isinstance(node, ast.Assign): yield from (t.id for t in node.targets if isinstance(t, ast.Name) and t.id.isupper())

def described(nbs, name):
    "(module, names that it imports → module.name, list of names per exported cell, by number of the cell)"
    module,imported,made = None, {}, {}
    for i,c in enumerate(read(nbs/name)):
        source = text(c['source'])
        if c['cell_type']!='code': continue
        if found := re.search(r'^#\|\s*default_exp\s+(\S+)', source, re.M): module = 'vadnb.'+found[1]
        for m in re.finditer(r'^from (vadnb[\w.]*) import (\w+(?:, *\w+)*)$', source, re.M):
            imported |= {n: f'{m[1]}.{n}' for n in re.split(r', *', m[2])}
        if re.search(r'^#\|\s*export', source, re.M): made[i] = [n for n in made_in(source) if not n.split('.')[-1].startswith('_')]
    return module, imported, made

class Names:
    "Where each exported name is made"
    def __init__(self, nbs, notebooks):
        self.known = {n: described(nbs, n) for n in notebooks}
        self.labels,taken = {}, Counter()
        for name,(module,_,made) in self.known.items():
            for n in (n for names in made.values() for n in names):
                slug = re.sub(r'[._]+', '-', f'{module}.{n}').lower().strip('-')
                taken[slug] += 1
                self.labels.setdefault(f'{module}.{n}', slug if taken[slug]==1 else f'{slug}-{taken[slug]}')
        last = Counter(q.split('.')[-1] for q in self.labels)
        self.alone = {q.split('.')[-1]: q for q in self.labels if last[q.split('.')[-1]]==1}

    def label(self, notebook, said):
        "Label of a name as prose gives it, or None; plain words count only where the notebook makes or imports them"
        module,imported,_ = self.known[notebook]
        head,_,rest = said.partition('.')
        for q in (f'{module}.{said}', f"{imported.get(head)}{'.'+rest if rest else ''}", f'vadnb.{said}', said):
            if q in self.labels: return self.labels[q]
        return self.labels.get(self.alone.get(said)) if re.search(r'_|[a-z][A-Z]', said) else None

# ---------------------------------------------------------------- pages
# what is no prose: fenced code, links, formulas; then code in a line, perhaps called
PARTS = re.compile(r'(```.*?```|!?\[[^]]*\]\([^)]*\)|\$\$.*?\$\$|^#+ .*?$)|`([A-Za-z_][\w.]*)(\([^`]*\))?`', re.S | re.M)

def linked(markdown, notebook, names):
    "Prose whose names are links"
    def one(m):
        label = None if m[1] else names.label(notebook, m[2])
        return f'[{m[0]}](#{label})' if label else m[0]
    return PARTS.sub(one, markdown)

def moved(markdown, notebook, pages):
    "Links to files that are no page lead to the repository"
    def one(m):
        path,_,part = m[1].partition('#')
        target = posixpath.normpath(posixpath.join('nbs', posixpath.dirname(notebook), path)) if path else ''
        if not path or target.removeprefix('nbs/') in pages or target.startswith('nbs/images/'): return m[0]
        if not (root/target).exists(): sys.exit(f'nbs/{notebook}: links to {m[1]}, which is not there')
        return f"]({cfg['git_url']}/blob/{cfg['branch']}/{target}{'#'+part if part else ''})"
    return re.sub(r'\]\((?!https?:|mailto:)([^)\s]+)\)', one, markdown)

def markdown_cell(source): return dict(cell_type='markdown', metadata={}, source=source)

def page(nbs, notebook, names):
    "The cells of a page"
    made,res = names.known[notebook][2], []
    for i,c in enumerate(read(nbs/notebook)):
        source = text(c['source'])
        if is_hidden(source) or not source.strip(): continue
        if c['cell_type']=='markdown':
            res.append(markdown_cell(linked(moved(source, notebook, names.known), notebook, names)))
            continue
        module = names.known[notebook][0]
        if made.get(i): res.append(markdown_cell('\n'.join(f"({names.labels[f'{module}.{n}']})=" for n in made[i])))
        res.append(c | dict(source=without_directives(source)))
    return res

def tree(caption, entries):
    listed = '\n'.join(entries)
    return markdown_cell(f'```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{listed}\n```')

def index_of_names(floor, notebooks, names):
    "A page with every exported name of a floor"
    lines = [f'# Names: {FLOORS[floor].lower()}', '']
    for n in notebooks:
        module,_,made = names.known[n]
        links = [f"[`{x}`](#{names.labels[f'{module}.{x}']})" for xs in made.values() for x in xs]
        if links: lines += [f"**[{module}]({posixpath.relpath(n, 'names')})** " + ' · '.join(dict.fromkeys(links)), '']
    return '\n'.join(lines)

CONF = '''
import sys; sys.path.insert(0, {tools!r})
project,author,copyright,release = 'vadnb', {author!r}, {copyright!r}, {version!r}
extensions = ['myst_nb', 'docs_mathml']
nb_execution_mode = 'off'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_dmath_double_inline,myst_dmath_allow_space = True, True
math_number_all,html_math_renderer = True, 'mathml'
html_theme,html_title,html_static_path = 'furo', 'vadnb', ['static']
html_css_files,html_copy_source,html_show_sphinx = ['site.css'], False, False
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']
'''
CSS = '''
math[display=block] { overflow-x: auto; overflow-y: hidden; padding: .3em 0 }
.cell_output img, .cell_output svg { max-width: 100%; height: auto }
body[data-theme=dark] .cell_output img { background: #fff; border-radius: 4px }
@media (prefers-color-scheme: dark) { body:not([data-theme=light]) .cell_output img { background: #fff; border-radius: 4px } }
@media (max-width: 40em) { h1 { font-size: 1.8em } h2 { font-size: 1.5em } }
.article-container table { display: block; overflow-x: auto }
'''

def prepare(nbs, out, only=None):
    "Write what Sphinx reads; `only` names notebooks, for a small site"
    every = {f: [n for n in ns if only is None or n in only] for f,ns in floors(nbs).items()}
    names = Names(nbs, ['index.ipynb', *(n for f in every.values() for n in f)])
    shutil.rmtree(out, ignore_errors=True)
    (out/'static').mkdir(parents=True)
    (out/'static/site.css').write_text(CSS, encoding='utf-8')
    values = dict(tools=str(root/'tools'), author=cfg['author'], copyright=cfg['copyright'], version=cfg['version'])
    (out/'conf.py').write_text(CONF.format(**values), encoding='utf-8')
    if (nbs/'images').is_dir(): shutil.copytree(nbs/'images', out/'images')
    trees = []
    for floor,shown in every.items():
        for n in shown: write(out/n, page(nbs, n, names))
        entries = [n.removesuffix('.ipynb') for n in shown]
        if any(names.known[n][2] for n in shown):
            (out/'names').mkdir(exist_ok=True)
            (out/f'names/{floor}.md').write_text(index_of_names(floor, shown, names), encoding='utf-8')
            entries.append(f'names/{floor}')
        if entries: trees.append(tree(FLOORS[floor], entries))
    write(out/'index.ipynb', [*page(nbs, 'index.ipynb', names), *trees])
    return names

def write(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'), language_info=dict(name='python'))
    for i,c in enumerate(cells): c['id'] = f'c{i}'
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)), encoding='utf-8')

# ---------------------------------------------------------------- what was built
class Page(HTMLParser):
    "Anchors, links and whatever a browser would fetch"
    FETCHED = dict(link='href', script='src', img='src', iframe='src', source='src', video='src', audio='src', object='data', embed='src')
    def __init__(self, said):
        super().__init__()
        self.anchors,self.links,self.fetched = set(), [], []
        self.feed(said)
        self.fetched += re.findall(r'''(?:url\(|@import )["']?(https?:[^"')]+)''', said)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {v for k in ('id', 'name') if (v := a.get(k))}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if url := a.get(self.FETCHED.get(tag, '')):
            if not (tag=='link' and a.get('rel') in ('canonical', 'next', 'prev', 'index', 'search', 'author')): self.fetched.append(url)

def faults(site):
    "What is wrong with a built site: dead links, and whatever would be asked of another server"
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    for name,p in pages.items():
        yield from (f'{name}: fetches {u}' for u in p.fetched if re.match(r'(https?:)?//', u))
        for url in p.links+[u for u in p.fetched if not re.match(r'(https?:)?//|data:', u)]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc: continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            if not (site/target).exists(): yield f'{name}: {url} leads nowhere'
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors: yield f'{name}: {url} has no such place'
    for p in site.rglob('*.css'):
        yield from (f'{p.name}: fetches {u}' for u in re.findall(r'''(?:url\(|@import )["']?((?:https?:)?//[^"')]+)''', p.read_text(encoding='utf-8')))

def build(nbs, place, only=None):
    "→ folder of the site; raises SystemExit with what is wrong"
    prepare(nbs, place/'source', only)
    shutil.rmtree(place/'html', ignore_errors=True)
    words = ['-m', 'sphinx', '-q', '-E', '-b', 'html', '-j', 'auto', '-d', place/'doctrees', place/'source', place/'html']
    if subprocess.run([sys.executable, *map(str, words), '-W', '--keep-going']).returncode: sys.exit('the site could not be built: see above')
    (place/'html/.nojekyll').touch()
    if found := sorted(set(faults(place/'html'))): sys.exit('the site is wrong:\n'+'\n'.join(found[:40])+f'\n{len(found)} in all')
    return place/'html'

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default=str(root/'build/site'), help='folder that is made anew')
    parser.add_argument('--only', nargs='*', help='notebooks of a small site, relative to nbs')
    asked = parser.parse_args()
    print(build(root/'nbs', Path(asked.out), asked.only))
