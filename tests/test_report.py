"The report as a file: safe with strangers' text, complete on its own, honest about what is missing"
import json, os, re, subprocess, sys
from html.parser import HTMLParser
import numpy as np
import pytest
from vadnb.core import CheckpointError, DataError, write_json
from vadnb.pictures import frame_strip, timeline
from vadnb.plots import figure_bytes, new_figure, save_figure, thin
from vadnb.report.curves import curves
from vadnb.report.report import report_page, write_report
from vadnb.report.run import read_run
from vadnb.results.layers import Boxes, Classes, Curve, Heat, Map, Segments
from vadnb.results.record import Result, Source

evil = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\' $\\frac{ \ud800 \x00 _'

class Page(HTMLParser):
    "Elements, attributes, ids and visible text; unbalanced tags are an error"
    void = {'meta', 'img', 'br', 'wbr'}
    def __init__(self, text):
        super().__init__()
        self.open,self.elements,self.words,self.ids = [], [], [], []
        self.feed(text); self.close()
        assert not self.open, f'never closed: {self.open}'
    def handle_starttag(self, name, attrs):
        self.elements.append((name, dict(attrs))); self.ids += [v for k,v in attrs if k=='id']
        if name not in self.void: self.open.append(name)
    def handle_startendtag(self, name, attrs): self.elements.append((name, dict(attrs))); self.ids += [v for k,v in attrs if k=='id']
    def handle_endtag(self, name): assert self.open.pop().lower()==name
    def handle_data(self, data):
        if 'style' not in self.open: self.words.append(data)
    @property
    def text(self): return ' '.join(' '.join(self.words).split())
    def names(self): return {n for n,_ in self.elements}

def make(folder, rows, config='system: fgclip\noptim:\n  lr: 0.0001\n', health=None):
    folder.mkdir(parents=True)
    (folder/'log.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    if config: (folder/'config.yaml').write_text(config)
    if health: write_json(folder/'health.json', health)
    return folder

def log(n=100, level=.9, **start):
    rows = [dict(kind='start', step=0, system='fgclip', total_steps=n, metric='auc', metric_mode='max', parameters=dict(trainable=123, frozen=4), samples=40,
                 groups=[dict(name='text', lr=2e-6, weight_decay=.01, parameters=123)], versions=dict(torch='2.15.0')) | start]
    for s in range(10, n+1, 10):
        rows.append({'kind': 'train', 'step': s, 'epoch': s/10, 'loss': 10/s, 'loss/global': 6/s, 'lr/text': 1e-6, 'grad_norm': 1., 'data_wait': .1, 'seconds': 2.})
        if s%50==0: rows += [{'kind': 'valid', 'step': s, 'auc': level-1/s, 'baseline/auc/random': .5}, dict(kind='checkpoint', step=s, path=f'checkpoints/step-{s:06d}'),
                             dict(kind='best', step=s, metric='auc', value=level-1/s)]
    return rows
done = dict(kind='end', step=100, status='done', reason='')

@pytest.fixture
def run(tmp_path): return make(tmp_path/'first', log()+[done], health=dict(checked=[dict(code='zero_gradient', what='every parameter receives a gradient')], findings=[]))

def assert_self_contained(text):
    page = Page(text)
    assert page.names().isdisjoint({'script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'foreignobject', 'video', 'audio'})
    for name,attrs in page.elements:
        assert not any(k.startswith('on') for k in attrs), (name, attrs)
        for key in ('src', 'srcset', 'href', 'xlink:href', 'action', 'data', 'poster'):
            if key in attrs: assert attrs[key].startswith(('#', 'data:image/')), (name, key, attrs[key])
        if 'href' in attrs and attrs['href'].startswith('#'): assert attrs['href'][1:] in page.ids
    style = text[text.index('<style>'):text.index('</style>')]
    assert 'url(' not in style and '@import' not in style
    assert len(page.ids)==len(set(page.ids))
    return page

def page_of(folder, against=None): return assert_self_contained(report_page(read_run(folder), against and read_run(against)))

def test_one_file_that_needs_nothing(run):
    path = write_report(run)
    page = assert_self_contained(path.read_text())
    meta = [a for n,a in page.elements if n=='meta']
    assert dict(name='viewport', content='width=device-width, initial-scale=1') in meta
    assert any(a.get('http-equiv')=='Content-Security-Policy' and "default-src 'none'" in a['content'] for a in meta)
    for text in ('The run finished at step 100 of 100.', '0.8900', 'random', 'Nothing was found by 1 check.', 'every parameter receives a gradient', '123', 'vadnb train --config'): assert text in page.text
    assert (run/'curves.png').read_bytes()[:4]==b'\x89PNG'
    assert sorted(p.name for p in run.iterdir())==['config.yaml', 'curves.png', 'health.json', 'log.jsonl', 'report.html']      # no temporary file left

def test_same_run_same_bytes_in_another_process(run):
    first = write_report(run).read_bytes(), (run/'curves.png').read_bytes()
    subprocess.run([sys.executable, '-c', 'import sys; from vadnb.report.report import write_report; write_report(sys.argv[1])', run], check=True, env=os.environ | dict(PYTHONHASHSEED='7'))
    assert first==((run/'report.html').read_bytes(), (run/'curves.png').read_bytes())

def test_strangers_text_stays_text(tmp_path):
    rows = log(system=evil, device=evil, versions={evil: evil}, groups=[dict(name=evil, lr=evil, weight_decay=None, parameters='many')], total_steps=evil)
    rows += [{'kind': 'valid', 'step': 100, 'auc': .5, evil: .5, f'baseline/auc/{evil}': .4, f'baseline/{evil}/{evil}': .4}, {'kind': 'train', 'step': 100, 'loss': 1., f'loss/{evil}': 1., f'lr/{evil}': 1e-3},
             dict(kind='health', step=90, code=evil, severity=evil, message=evil, evidence={evil: [evil]}), dict(kind='health', step=91, code='skipped_samples', severity='warning', message='x', evidence=dict(samples=[evil])),
             dict(kind='end', step=100, status='failed', reason=evil)]
    folder = make(tmp_path/'<b onclick=x>&amp;', rows, config=json.dumps(dict(optim={'<script>': '</style><script>x'}, note=evil.replace('\ud800', '').replace('\x00', ''))))
    other = make(tmp_path/"o'<i>", log(level=.8))
    (folder/'pictures').mkdir(); (folder/'predictions').mkdir()
    save_figure(new_figure(1, 1), folder/'pictures'/'<script>x.png')
    (folder/'pictures'/'<svg onload=x>.png').write_text('<svg onload="alert(1)">')
    write_json(folder/'predictions'/'<script>.json', dict(scores=[0, 1, 0], video='<script>a.mp4', segments=[[0, 1, '</text><script>']]))
    (folder/'predictions'/'<img src=x>.txt').write_text('x')
    page = page_of(folder, against=other)
    assert '<script>alert(1)</script>' in page.text and '<b onclick=x>&amp;' in page.text
    assert {'b', 'i'} & {n for n,a in page.elements if 'onclick' in a}==set()
    assert sum(n=='img' for n,_ in page.elements)==1

@pytest.mark.parametrize('rows, says', [
    (log(), 'The log has no end: the run was killed, or is still going. The last row is step 100 of 100. Its newest checkpoint is that of step 100.'),
    (log()[:3], 'It saved no checkpoint.'),
    (log()+[dict(kind='end', step=100, status='stopped', reason='received SIGTERM')], 'stopped early, at step 100 of 100: received SIGTERM'),
    (log()+[dict(kind='end', step=100, status='failed', reason='OSError: disk full')], 'failed at step 100 of 100: OSError: disk full'),
    (log()+[dict(kind='end', step=100, status='failed', reason='x'), dict(kind='resume', step=100, total_steps=200)], 'The last row is step 100 of 200. Its newest checkpoint is that of step 100. It was resumed once at step 100.'),
    ([dict(kind='start', step=0)], 'No loss and no metric was logged.'),
    ([dict(kind='start', step=0)], 'Nothing was evaluated')])
def test_every_end_has_words(tmp_path, rows, says):
    assert says in page_of(make(tmp_path/'r', rows)).text

def test_killed_while_writing_a_row(tmp_path):
    folder = make(tmp_path/'r', log())
    with open(folder/'log.jsonl', 'a') as f: f.write('{"kind": "train", "step": 110, "lo')
    assert 'The last row is step 100 of 100' in page_of(folder).text

def test_says_what_is_missing(tmp_path):
    page = page_of(make(tmp_path/'r', log(), config=None))
    for text in ('health.json is missing', 'Health: not known', 'config.yaml is missing', 'this run cannot be repeated'): assert text in page.text

def test_findings_worst_first_and_each_once(tmp_path):
    found = [dict(step=s, code=c, severity=v, message=m, evidence={}) for s,c,v,m in [(1, 'a', 'note', 'a small thing'), (2, 'b', 'warning', 'a doubtful thing'), (3, 'c', 'fault', 'a broken thing')]]
    late = dict(kind='health', step=4, code='d', severity='fault', message='logged just before the kill', evidence={})
    rows = log()+[dict(kind='health', **f) for f in found]+[late]
    text = Page(write_report(make(tmp_path/'r', rows, health=dict(checked=[dict(code='c', what='nothing is broken'), dict(code='e', what='all is well')], findings=found))).read_text()).text
    order = [text.index(m) for m in ('a broken thing', 'logged just before', 'a doubtful thing', 'a small thing', 'all is well')]
    assert order==sorted(order) and text.count('a broken thing')==1
    assert 'nothing is broken' not in text and '2 faults, 1 warning, 1 note' in text

def test_losses_that_were_not_numbers(tmp_path):
    rows = log()
    for r in rows[-6:]:
        if r['kind']=='train': r['loss'] = None
    with_all = [r | dict(loss=None) if r['kind']=='train' else r for r in log()]
    assert 'not finite' in page_of(make(tmp_path/'some', rows)).text
    assert 'not finite' in page_of(make(tmp_path/'all', with_all)).text

def test_comparison(tmp_path, run):
    other = make(tmp_path/'second', log(level=.8, samples=30, versions=dict(torch='2.14.0'))[:-4], config='system: fgclip\noptim:\n  lr: 0.001\n  ema: 0.99\n')
    page = page_of(run, against=other)
    assert 'Compared with second' in page.text and 'second: The log has no end' in page.text
    assert '+0.1100' in page.text                            # best 0.89 at step 100 against best 0.78 at step 50
    assert sum(n=='mark' for n,_ in page.elements)==1
    for text in ('optim.lr 0.0001 0.001', 'optim.ema (not set) 0.99', 'samples 40 30', 'versions · torch 2.15.0 2.14.0'): assert text in page.text
    assert 'Compared with' not in page_of(run).text

def test_two_runs_of_one_name(tmp_path):
    a,b = make(tmp_path/'monday'/'demo', log()), make(tmp_path/'tuesday'/'demo', log())
    assert 'Compared with tuesday/demo' in Page(write_report(a, against=b).read_text()).text

def test_lower_is_better_is_said(tmp_path):
    rows = [r | dict(metric_mode='min') if r['kind']=='start' else r for r in log()]
    assert 'lower is better' in page_of(make(tmp_path/'r', rows)).text

def test_long_runs_stay_small_and_keep_extremes(tmp_path):
    rows = [dict(kind='start', step=0, total_steps=4_000)]
    for i in range(1, 4_001):
        rows.append({'kind': 'train', 'step': i, 'loss': 1/i+(99 if i==2001 else 0), **{f'loss/{k}': 1/i for k in range(6)}, **{f'lr/{k}': 1e-4 for k in range(20)}, 'data_wait': .1, 'seconds': 1.})
        if i%10==0: rows += [{'kind': 'valid', 'step': i, **{f'ap/{k}': i/4e3 for k in range(30)}}, dict(kind='checkpoint', step=i, path='x'), dict(kind='health', step=i, code=f'c{i}', severity='fault', message='m'*300, evidence=dict(files=['f'*200]*500))]
    page = report_page(read_run(make(tmp_path/'r', rows)))
    assert len(page)<1_000_000
    text = Page(page).text
    assert 'averages about' in text and 'Not drawn:' in text and 'more in log.jsonl' in text and '400 checkpoints are too many to mark' in text
    values = np.random.default_rng(0).normal(size=10_000)
    _,mean,low,high = thin(np.arange(10_000), values)
    assert (high.max(), low.min())==(values.max(), values.min()) and len(mean)==160

def test_pictures_have_a_budget(run):
    (run/'pictures').mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 450, 3), dtype=np.uint8)
    png = figure_bytes(frame_strip([noise], size=9), 'png')
    assert len(png)>500_000
    for i in range(20): (run/'pictures'/f'{i:02}.png').write_bytes(png)
    (run/'pictures'/'00a.png').write_bytes(b'\x89PNG\r\n\x1a\n'+b'\0\0\0\rIHDR'+b'\x7f'*8+b'x'*100_000)      # claims two billion pixels a side
    (run/'pictures'/'00b.png').write_bytes(png[:200_000])                                                      # cut off in the middle
    text = write_report(run).read_text()
    page = assert_self_contained(text)
    assert len(text)<2_000_000 and sum(n=='img' for n,_ in page.elements)==10
    assert 'are too many for a report' in page.text and '00b.png' in page.text and '10 more pictures in the folder' in page.text

@pytest.mark.parametrize('content', ['[1, 2', '{"scores": [0, null]}', '{"scores": ["a"]}', '{"scores": []}', '{"scores": [0, 1], "segments": [[0]]}', '{"scores": [0, 1], "segments": 3}', '{"scores": [0, 1], "fps": "x"}', '[]'])
def test_predictions_of_any_shape(run, content):
    (run/'predictions'/'deep').mkdir(parents=True)
    (run/'predictions'/'deep'/'clip.json').write_text(content)
    assert 'clip.json' in page_of(run).text

def test_predictions_are_read_through_their_layers(run):
    said = {('a', 'danger'): Curve([0, .5, 1], .5), ('b', 'found'): Segments([(1, 3, 'theft', .75)]),
            ('b', 'kinds'): Classes(['x', 'y'], [[.25, .75]], [(0, 3)]), ('a', 'heat'): Heat(np.ones((1, 2, 2)), [1])}
    result = Result('deep/clip.mp4', 3, 25., {(Source(s), n): v for (s,n),v in said.items()})
    result.save(run/'predictions')
    Result('part.png', layers=dict(map=Map(np.eye(3)), where=Boxes([(0, 1, (0, 0, 1, 1))]))).save(run/'predictions')
    save_figure(new_figure(1, 1), run/'predictions'/'part.png')
    page = page_of(run)
    label, = [a['aria-label'] for n,a in page.elements if 'over time of' in a.get('aria-label', '')]
    assert label=='danger, found, kinds over time of deep · clip.mp4'
    for text in ('theft 0.75', 'y 0.75', 'part.layers.json'): assert text in page.text
    # heat needs a picture, which stands beside the lanes
    assert [a['alt'] for n,a in page.elements if n=='img']==['deep/clip', 'part']
    # what is not shown is not read either
    (run/'predictions'/'deep'/'clip.layers.npz').unlink()
    assert page_of(run).text==page.text.replace('deep/clip.layers.npz, ', '')

@pytest.mark.parametrize('content', ['[1, 2', '[]', '{"format": "vadnb-layers/2"}', '{"format": "vadnb-layers/1"}',
                                     '{"format": "vadnb-layers/1", "video": {"frames": 1e999}, "layers": []}'])
def test_records_of_any_shape(run, content):
    (run/'predictions'/'deep').mkdir(parents=True)
    (run/'predictions'/'deep'/'clip.layers.json').write_text(content)
    page = page_of(run)
    assert 'clip.layers.json' in page.text and 'Also in the folder' not in page.text

def test_strangers_words_in_a_record_stay_words(run):
    text = '<script>alert(1)</script>"><img src=x>'
    said = {text: Segments([(0, 2, text, .5)]), 'kinds': Classes([text, 'y'], [[.5, .5]]*3)}
    Result('"><img src=x>.mp4', 3, 25., said, dict(system=text)).save(run/'predictions')
    page = page_of(run)
    assert '<script>alert(1)<' in page.text and not {'script', 'img'}&page.names()

def test_out_touches_only_what_was_asked_for(run, tmp_path):
    before = sorted(run.iterdir())
    assert write_report(run, out=tmp_path/'there'/'a.html')==tmp_path/'there'/'a.html'
    assert sorted(run.iterdir())==before

def test_one_line_errors(run, tmp_path):
    for folder,says in [(tmp_path/'frist', "did you mean 'first'"), (tmp_path, 'holds no log.jsonl')]:
        with pytest.raises(CheckpointError, match=re.escape(says)) as e: write_report(folder)
        assert '\n' not in str(e.value)
    with pytest.raises(CheckpointError, match='did you mean'): write_report(run, against=tmp_path/'frst')
    write_report(run); old = (run/'report.html').read_bytes()
    (run/'health.json').write_text('[]')
    with pytest.raises(CheckpointError, match="'checked' must be a list"): write_report(run)
    (run/'log.jsonl').write_text('not json\n')
    with pytest.raises(CheckpointError, match='line 1: not valid JSON'): write_report(run)
    assert (run/'report.html').read_bytes()==old            # an earlier report survives
    with pytest.raises(DataError, match='nothing to draw'): curves([])

def test_nothing_global_is_changed(run):
    code = '''import sys, matplotlib; before = dict(matplotlib.rcParams)
from vadnb.report.report import write_report; write_report(sys.argv[1])
assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules
assert dict(matplotlib.rcParams)==before'''
    subprocess.run([sys.executable, '-c', code, run], check=True, env=os.environ | dict(MPLBACKEND='agg'))

def test_timeline_of_a_long_video_is_small():
    assert len(figure_bytes(timeline(np.random.default_rng(0).random(200_000), fps=30)))<60_000
