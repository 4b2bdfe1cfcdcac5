"The site: names lead to their cells, hidden cells stay out, and what is wrong with a page stops the build"
import json, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import docs

SHOWN = ['losses/30_contrastive.ipynb', 'data/13_tracks.ipynb', 'tutorials/80_video_anomaly.ipynb']

@pytest.fixture(scope='module')
def site(tmp_path_factory): return docs.build(root/'nbs', tmp_path_factory.mktemp('site'), SHOWN)

def pages(site, name): return docs.Page((site/name).read_text(encoding='utf-8'))

def test_names_lead_to_their_cells(site):
    "From the list of a floor and from prose; each place is a cell with code"
    names = pages(site, 'names/data.html')
    assert '../data/13_tracks.html#vadnb-data-tracks-track' in names.links
    said = (site/'data/13_tracks.html').read_text(encoding='utf-8')
    place = said.index('id="vadnb-data-tracks-track"')
    assert '<span class="nc">Track</span>' in said[place:place+600]
    assert any(u.endswith('#vadnb-losses-contrastive-info-nce') for u in pages(site, 'losses/30_contrastive.html').links)

def test_pages_show_what_is_stored_and_hide_what_is_hidden(site):
    said = (site/'tutorials/80_video_anomaly.html').read_text(encoding='utf-8')
    assert '<img' in said and '#|' not in said and 'default_exp' not in said
    assert '<math' in (site/'losses/30_contrastive.html').read_text(encoding='utf-8')

def test_every_link_of_every_notebook_leads_somewhere(tmp_path):
    "Pages of the site, or files of the repository; every exported name has one place"
    names = docs.prepare(root/'nbs', tmp_path)
    pages = {p.relative_to(tmp_path).as_posix(): json.loads(p.read_text(encoding='utf-8'))['cells'] for p in tmp_path.rglob('*.ipynb')}
    assert {*pages}=={p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    placed = [l for cells in pages.values() for c in cells if c['cell_type']=='markdown' for l in docs.re.findall(r'^\(([\w-]+)\)=$', c['source'], docs.re.M)]
    assert sorted(placed)==sorted(names.labels.values()) and len({*placed})==len(placed)>2000

@pytest.fixture
def nbs(tmp_path):
    def notebook(name, *cells):
        path = tmp_path/'nbs'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [dict(cell_type='markdown' if c.startswith('~') else 'code', metadata={}, outputs=[], source=c.removeprefix('~')) for c in cells]
        path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    notebook('index.ipynb', '~# start')
    notebook('data/1_a.ipynb', '~# a', '#| default_exp data.a', '#| export\ndef fit(x): return x\n\nclass Reader: pass', '#| export\n@patch\ndef read(self:Reader): pass',
             '#| export\ndef far_away(): pass\ndef _own(): pass\nLIMIT = 3', '#| hide\nsecret = 1')
    notebook('losses/2_b.ipynb', '~# b', '#| default_exp losses.b', 'from vadnb.data.a import fit', '~`fit`, `far_away(3)`, `Reader.read`, `unknown`, [`fit`](#b)')
    notebook('models/3_c.ipynb', '~# c', '#| default_exp models.c', '~`fit` is a plain word here, `data.a.fit` is not. ```\n`far_away`\n```')
    return tmp_path/'nbs', notebook

def test_a_name_is_told_from_a_plain_word(nbs, tmp_path):
    names = docs.prepare(nbs[0], tmp_path/'out')
    assert sorted(names.labels)==[f'vadnb.data.a.{n}' for n in ('LIMIT', 'Reader', 'Reader.read', 'far_away', 'fit')]
    prose = {n: json.loads((tmp_path/'out'/n).read_text())['cells'][-1]['source'] for n in ('losses/2_b.ipynb', 'models/3_c.ipynb')}
    link = '[`{}`](#vadnb-data-a-{})'.format
    assert prose['losses/2_b.ipynb']==f"{link('fit', 'fit')}, {link('far_away(3)', 'far-away')}, `Reader.read`, `unknown`, [`fit`](#b)"
    assert prose['models/3_c.ipynb']==f"`fit` is a plain word here, {link('data.a.fit', 'fit')} is not. ```\n`far_away`\n```"
    assert 'secret' not in (tmp_path/'out/data/1_a.ipynb').read_text()

def test_a_dead_link_stops_the_build(nbs, tmp_path):
    nbs[1]('data/4_d.ipynb', '~# d', '~see [this](../data/9_gone.ipynb)')
    with pytest.raises(SystemExit, match='4_d.ipynb: links to ../data/9_gone.ipynb, which is not there'): docs.prepare(nbs[0], tmp_path/'out')

@pytest.mark.parametrize('said,wrong', [
    ('<script src="https://evil.example/x.js"></script>', 'a.html: fetches https://evil.example/x.js'),
    ('<link rel="stylesheet" href="//evil.example/x.css">', 'a.html: fetches //evil.example/x.css'),
    ('<p style="background: url(https://evil.example/x.png)">', 'a.html: fetches https://evil.example/x.png'),
    ('<img src="gone.png">', 'a.html: gone.png leads nowhere'), ('<a href="b.html#nowhere">x</a>', 'a.html: b.html#nowhere has no such place'),
    ('<a href="c.html">x</a>', 'a.html: c.html leads nowhere'),
    ('<a href="https://github.com">x</a><a href="b.html#here">y</a><img src="data:image/png;base64,AA">', None)])
def test_what_is_wrong_with_a_page_is_found(tmp_path, said, wrong):
    (tmp_path/'a.html').write_text(said)
    (tmp_path/'b.html').write_text('<p id="here">')
    assert [*docs.faults(tmp_path)]==([wrong] if wrong else [])
