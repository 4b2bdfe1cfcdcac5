"The program: what it does with good input on a tiny world, and the one line it says about every bad one"
import contextlib, errno, io, json, multiprocessing, os, re, resource, shlex, shutil, signal, subprocess, sys, warnings
from pathlib import Path
import pytest, torch, yaml
from command import vadnb
from vadnb.cli import COMMANDS, main
from vadnb.core import CheckpointError, append_jsonl, read_json, read_jsonl, write_json
from vadnb.worlds.street import street_world
from vadnb.data.regions import read_regions
from vadnb.systems.registry import load_config
from vadnb.train import checkpoint
from vadnb.train.checkpoint import checkpoint_folders, lock_run
from vadnb.train.run_folder import RunFolder

def refuse(*words, warned=False):
    "The one line that a command says before it leaves with code 2, after its warnings where it may have some"
    code,out,err = vadnb(*words)
    assert code==2, out+err
    lines = [l for l in err.splitlines() if not (warned and l.startswith('vadnb: warning: '))]
    assert len(lines)==1 and lines[0].startswith('vadnb: error: '), err
    assert err.count('vadnb: error:')==1 and 'Traceback' not in err and 'Errno' not in err
    return lines[-1]

def ends_well(*words):
    code,out,err = vadnb(*words)
    assert code==0, err
    return out

def files(folder):
    "Every file below a folder with its content, links with their target"
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_symlink() or p.is_file()}

@pytest.fixture(scope='module')
def world(tmp_path_factory): return street_world(tmp_path_factory.mktemp('world'), videos=8, valid_videos=4, test_videos=0, frames=(40, 48)).root

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('runs')

def options(world, runs, name):
    return shlex.split(f"""--config fgclip_demo --data_root {world} --runs {runs} --name {name} --data.valid_json valid.json --data.test_json valid.json --data.test_annotation null
        --data.frames 4 --data.size '[32, 32]'
        --train.batch_size 4 --train.steps 3 --train.workers 0 --train.device cpu --train.progress false --train.trackers '[]'""")

@pytest.fixture(scope='module')
def trained(world, runs):
    "A finished run and what training it printed"
    return runs/'first', vadnb('train', *options(world, runs, 'first'))

@pytest.fixture
def run(trained): return trained[0]

@pytest.fixture
def train(world, runs, request):
    "The words of a training with a name of its own"
    return ['train', *options(world, runs, re.sub(r'\W', '_', request.node.name)[:60])]

@pytest.fixture
def no_page(monkeypatch):
    "Training without its report, which takes longer than a few steps in a tiny world"
    monkeypatch.setattr('vadnb.report.report.write_report', lambda run, *_: Path(run)/'report.html')

# ---------------------------------------------------------------- what works

def test_train(trained):
    run,(code,out,err) = trained
    assert code==0, err
    assert out.splitlines()[0]==f'done at step 3 of 3: {run}' and out.splitlines()[-1]==f'report: {run}/report.html'
    assert any(line.startswith('frame auc') for line in out.splitlines())
    rows = read_jsonl(run/'log.jsonl')
    assert rows[0]['kind']=='start' and rows[-1]['status']=='done' and all(row['loss']>0 for row in rows if row['kind']=='train')
    for name in ('config.yaml', 'health.json', 'report.html', 'last/model.safetensors', 'best/state.json'): assert (run/name).is_file()

def test_eval_repeats_the_numbers_of_training(run, tmp_path):
    out = ends_well('eval', '--run', run, '--out', tmp_path/'eval.json')
    found,logged = read_json(tmp_path/'eval.json'), [r for r in read_jsonl(run/'log.jsonl') if r['kind']=='valid'][-1]
    trained = {k: v for k,v in logged.items() if k not in ('kind', 'step', 'epoch')}
    assert {k: found['metrics'][k] for k in trained}==trained
    assert {k.split('/')[0] for k in found['metrics'].keys()-trained.keys()}=={'interval', 'class', 'map', 'map_vadclip', 'baseline', 'box_ap'}     # no class has two videos here, so none has an interval
    assert 'AUC in its videos' in out and '95 % interval' in out
    assert 'full supervision' in found['supervision'] and found['supervision'] in out.splitlines()
    assert found['checkpoint']=='step-000003' and '4 videos' in out and str(tmp_path/'eval.json') in out

def test_eval_of_a_run_that_was_stopped_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path/'run', symlinks=True)
    rows = read_jsonl(run/'log.jsonl')
    rows[0]['total_steps'],rows[-1] = 80, rows[-1] | dict(status='stopped', reason='received SIGTERM')
    (tmp_path/'run'/'log.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    says = 'The run stopped early, at step 3 of 80: received SIGTERM.'
    assert says in ends_well('eval', '--run', tmp_path/'run').splitlines() and read_json(tmp_path/'run'/'eval.json')['run']==says
    assert 'stopped early' not in ends_well('eval', '--run', run, '--out', tmp_path/'eval.json') and read_json(tmp_path/'eval.json')['run']=='finished'

def test_the_last_table_of_training_is_of_the_best_checkpoint(train, runs, no_page, monkeypatch):
    from vadnb.systems.fgclip.scan import FrameScan
    metrics,seen = FrameScan.metrics, []
    def falling(self): seen.append(1); return metrics(self) | dict(frame_auc=1/len(seen))
    monkeypatch.setattr(FrameScan, 'metrics', falling)
    out = ends_well(*train, '--train.unit', 'step', '--train.evaluate_every', '1')
    n = [l for l in out.splitlines() if l.startswith('validation at step ')]
    assert n==['validation at step 1, the best checkpoint by frame auc; the last, step 3, has 0.333'], out
    row, = [l.split() for l in out.splitlines() if l.startswith('frame auc ')]
    assert row[2]=='1.000'

def test_regions_that_contradict_the_annotation_are_told(world, run, runs, tmp_path):
    clips = read_regions(world/'valid.json')
    normal,crime = [next(c.name for c in clips if c.normal==kind) for kind in (True, False)]
    rows = [f'{c.name}.mp4 {"Fighting 5 9" if c.name==normal or not c.normal and c.name!=crime else "Normal -1 -1"} -1 -1' for c in clips]
    (tmp_path/'list.txt').write_text('\n'.join(rows)+'\n')
    words = ['--data.test_annotation', tmp_path/'list.txt']
    _,out,_ = vadnb('verify', *options(world, runs, 'never'), *words)
    row, = [l for l in out.splitlines() if l.startswith('warn') and 'test regions' in l]
    code,_,err = vadnb('eval', '--run', run, '--out', tmp_path/'eval.json', *words)
    for said in row,err:
        assert 'regions here and are Normal in' in said and f'boxes do not: {crime}' in said
        assert f'no region here and events in' in said and f'do not know of them: {normal}' in said
    assert code==0

def test_eval_on_other_data_says_so(run, tmp_path):
    ends_well('eval', '--run', run, '--out', tmp_path/'eval.json', '--data.test_json', 'train.json', '--which', 'last')
    assert read_json(tmp_path/'eval.json')['overrides']==['--data.test_json', 'train.json']

def test_eval_without_test_data_names_the_keys(run):
    line = refuse('eval', '--run', run, '--data.test_json', 'null')
    assert "the run's configuration names no test data; set one of --data.test_json, --data.test_annotation" in line

def test_predict(world, run, tmp_path):
    paths = sorted(world.rglob('*.mp4'))[:2]
    out = ends_well('predict', *paths, '--run', run, f'--out={tmp_path}', '--score.stride', '4', '--score.threshold', '0')
    for path in paths:
        found = read_json(tmp_path/f'{path.stem}.json')
        assert found['frames']==len(found['scores'])==read_json(world/'frames.json')[path.stem]
        assert found['segments']==[dict(found['segments'][0], start=0, end=found['frames'])]      # a threshold of 0 takes everything
        assert len((tmp_path/f'{path.stem}.csv').read_text().splitlines())==found['frames']+1
        assert f"{path}: {found['frames']} frames" in out and (tmp_path/f'{path.stem}.png').stat().st_size>1000

def test_predict_on_a_folder_of_frames_asks_for_their_rate(run, tmp_path):
    from PIL import Image
    for i in range(9): Image.new('RGB', (64, 48), (i*20, 90, 90)).save(tmp_path/f'{i:03d}.png')
    assert 'a folder of pictures has no frame rate; give --score.folder_fps' in refuse('predict', tmp_path, '--run', run, '--out', tmp_path/'out')
    assert not (tmp_path/'out').exists()
    (tmp_path/'004.png').unlink()
    code,_,err = vadnb('predict', tmp_path, '--run', run, '--out', tmp_path.parent/'out', '--score.folder_fps', '8')
    line, = err.splitlines()
    assert code==0 and line.startswith('vadnb: warning: ') and '1 numbers are missing, the first between 003.png and 005.png: results count frames by their place' in line

def test_report(run, tmp_path):
    assert str(tmp_path/'a.html') in ends_well('report', '--run', run, '--against', run, '--out', tmp_path/'a.html')
    assert '<h2>Compared with' in (tmp_path/'a.html').read_text()

def test_verify_a_sound_set(world, runs):
    out = ends_well('verify', *options(world, runs, 'verified'))
    assert out.splitlines()[-1]=='ready to train' and 'FAIL' not in out and not (runs/'verified').exists()

def test_verify_a_broken_set(world, runs):
    (world/'text.mp4').write_text('this is no video')
    items = read_json(world/'train.json')
    write_json(world/'broken.json', [dict(items[0], f_path='text.mp4', bbox_info=[]), *items[1:]])
    code,out,err = vadnb('verify', *options(world, runs, 'verified'), '--data.train_json', 'broken.json')
    assert code==1 and err=='' and out.splitlines()[-1]=='not ready' and any(line.startswith('FAIL') and 'text.mp4' in line for line in out.splitlines())
    code,out,_ = vadnb('verify', *options(world, runs, 'verified'), '--data.train_json', 'nowhere.json')
    assert code==1 and 'nowhere.json: no such file' in out

def test_lr_find(world, runs, tmp_path):
    out = ends_well('lr-find', *options(world, runs, 'found'), '--steps', '12', '--out', tmp_path/'rates')
    found = read_json(tmp_path/'rates.json')
    assert len(found['rates'])==len(found['losses'])==12 and found['rates']==sorted(found['rates']) and found['rates'][0]==pytest.approx(1e-7)
    assert (tmp_path/'rates.png').stat().st_size>1000 and '--optim.lr' in out
    assert not (runs/'found').exists()                        # a range test leaves no run behind
    # unless a place is named, picture and numbers wait in the folder of the run, which can begin there
    assert f'{runs}/found/lr_find.png' in ends_well('lr-find', *options(world, runs, 'found'), '--steps', '12')
    assert {p.name for p in (runs/'found').iterdir()}=={'lr_find.png', 'lr_find.json'}
    RunFolder(runs/'found').check()
    (runs/'found'/'notes.txt').write_text('mine')
    with pytest.raises(CheckpointError, match='is not a run folder'): RunFolder(runs/'found').check()

def test_convert(world, tmp_path):
    ends_well('convert', 'skeleton', world/'UCF_Crimes_Videos', tmp_path/'own.json')
    assert {Path(x['f_path']).stem for x in read_json(tmp_path/'own.json')}==set(read_json(world/'frames.json'))
    (tmp_path/'list.txt').write_text('Abuse028_x264.mp4  Abuse  165  240  -1  -1\nNormal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1\n')
    assert '2 videos, 1 segments' in ends_well('convert', 'ucf-annotation', tmp_path/'list.txt', tmp_path/'list.json')
    assert read_json(tmp_path/'list.json')['Abuse028_x264']=={'class': 'Abuse', 'segments': [[165, 240]], 'frames': None}

def test_print_config_is_a_configuration(world, runs, run, tmp_path):
    words = [*options(world, runs, 'printed'), '--optim.lr=1e-5', '--optim.milestones', '[2, 4]', '--data.valid_json', 'null']
    out = ends_well('train', *words, '--print_config')
    (tmp_path/'again.yaml').write_text(out)
    assert load_config(tmp_path/'again.yaml')==load_config('fgclip_demo', words[2:])
    assert ends_well('train', '--config', tmp_path/'again.yaml', '--print_config')==out
    assert yaml.safe_load(ends_well('predict', '--run', run, '--score.stride', '5', '--print_config'))['score']['stride']==5
    assert yaml.safe_load(ends_well('demo', '--print_config'))['name']=='demo-action_cls'
    assert not (runs/'printed').exists()

def test_shipped_configurations_load():
    assert load_config('fgclip_ucf_debug', ['--model.pretrained', 'false']).optim.lr==5e-6
    # YAML reads 1e-4 as text; the configuration knows that a number is meant
    assert load_config('fgclip_demo', ['--optim.lr', '1e-4']).optim.lr==1e-4

def test_a_finished_run_goes_on_when_asked(train, no_page):
    ends_well(*train, '--train.steps', '1')
    assert 'done at step 2 of 2' in ends_well(*train, '--train.steps', '2', '--data.valid_json', 'null')

@pytest.mark.parametrize('name', COMMANDS)
def test_help(name):
    out = ends_well(name, '--help')
    assert out.startswith(f'usage: vadnb {name}') and 'show this help' in out and '(type' not in out

def test_help_lists_every_key(run):
    for words in (['train', '--config', 'fgclip_demo'], ['train', '--config=fgclip_demo'], ['predict', '--run', str(run)], ['demo']):
        out = ends_well(*words, '--help')
        assert '--train.on_bad_sample {raise,skip}' in out and 'largest gradient norm over all parameters' in out and ('--data.size' in out or words==['demo'] and '--data.train' in out)

def test_quick_commands_leave_torch_alone():
    "Nor do the words that systems offer need it"
    code = '''import sys, vadnb.data.tracks
from vadnb.cli import main
heavy = {'torch', 'transformers', 'timm', 'matplotlib.pyplot', 'av'}
for words in (['--help'], ['train', '--help'], ['trian'], ['train', '--config', 'nothing'], ['report', '--run', 'nowhere'],
              ['convert', '--help'], ['convert', 'nothing', 'a', 'b'], ['demo', '--only', 'nothing']):
    try: main(words)
    except SystemExit: pass
    assert not heavy & set(sys.modules), words
import vadnb.systems.fgclip.offers, vadnb.systems.uniad.offers
assert not {'torch', 'transformers', 'timm'} & set(sys.modules)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert 'image-tree' in done.stdout and 'ucf-boxes' in done.stdout

def test_what_a_system_is_made_of_comes_when_it_is_asked_for():
    from vadnb.systems.fgclip import FGCLIP, Config, System
    import vadnb.systems.uniad as uniad
    assert System is FGCLIP and uniad.System is uniad.UniADSystem and {'Config', 'System'} <= set(dir(uniad))
    assert uniad.Config().system=='uniad' and Config.__module__=='vadnb.systems.fgclip.config' and not hasattr(uniad, 'other')

# ---------------------------------------------------------------- words on the command line

@pytest.mark.parametrize('words,says', [
    ('trian', ["'trian' is unknown", "did you mean 'train'?"]),
    ('train', ["'--config' is missing", 'fgclip_demo']),
    ('train --config', ["'--config' needs a value"]),
    ('train --config --name', ["'--config' needs a value"]),
    ('train --config fgclip_dmeo', ["'fgclip_dmeo'", "did you mean 'fgclip_demo'?"]),
    ('train --config nowhere.yaml', ['nowhere.yaml: no such configuration file']),
    ('train --config fgclip_demo stray words', ['stray words', 'usage: vadnb train']),
    ('train --config fgclip_demo -x', ['-x']),
    ('train --config fgclip_demo --', ["unknown option '--'"]),
    ('train --config fgclip_demo --=3', ["unknown option '--=3'"]),
    ('train --config fgclip_demo --optim 3', ["unknown option '--optim'"]),
    ('train --config fgclip_demo --optim.lr', ["'--optim.lr' needs a value"]),
    ('train --config fgclip_demo --optim.lr --seed 3', ["'--optim.lr' needs a value"]),
    ('train --config fgclip_demo --optim.lr=', ["'optim.lr' must be a number, found ''"]),
    ('train --config fgclip_demo --optim.lrr 1', ["unknown option '--optim.lrr'", "did you mean 'optim.lr'?"]),
    ('train --config fgclip_demo --optim.learning_rate 1', ["did you mean 'optim.lr'?"]),
    ('train --config fgclip_demo --batch-size 1', ["did you mean 'train.batch_size'?"]),
    ('train --config fgclip_demo --optim.lr fast', ["'optim.lr' must be a number, found 'fast'"]),
    ('train --config fgclip_demo --optim.lr nan', ["'optim.lr' must be"]),
    ('train --config fgclip_demo --optim.lr -1', ["command line: 'optim.lr' must be 0 or more"]),
    ('train --config fgclip_demo --train.steps 2.5', ["'train.steps' must be a whole number or null, found '2.5'"]),
    ('train --config fgclip_demo --train.steps 0', ["'train.steps' must be 1 or more"]),
    ('train --config fgclip_demo --train.tf32 maybe', ["'train.tf32' must be true or false"]),
    ('train --config fgclip_demo --train.on_bad_sample ignore', ["'train.on_bad_sample' must be one of raise, skip, found 'ignore'"]),
    ('train --config fgclip_demo --model_name_or_path x', ["unknown option '--model_name_or_path'", "did you mean 'model.weights'?"]),
    ('train --config action_cls_demo --model_name_or_path x', ["did you mean 'model.base'?"]),
    ('train --config uniad_demo --per_device_train_batch_size 2', ["did you mean 'train.batch_size'?"]),
    ('train --config adatad_demo --fp16 --bf16', ["'--fp16' needs a value; did you mean 'train.precision'? (--fp16 of other programs is --train.precision fp16 here)"]),
    ('train --config action_cls_demo --lora_r 8', ["did you mean 'lora.rank'?"]),
    ('train --config fgclip_demo --data.size 32', ["'data.size' must be a list of whole numbers"]),
    ('train --config fgclip_demo --data.size [32]', ["'data.size' must be a height and a width"]),
    *[(f'verify --config {c} --data.size [1000000,1000000]', ["'data.size' must be a height and a width, 1 to 4096 pixels each"])
      for c in ('fgclip_demo', 'uniad_demo', 'adatad_demo')],
    ('verify --config uniad_demo --data.size [2048,2048]', ["'data.size' must be at most 16384 tokens"]),
    ('train --config fgclip_demo --train.epochs 1e30', ["'train.epochs' must be above 0, and at most a million"]),
    ('train --config fgclip_demo --name ../x', ["'name' must be a plain folder name, found '../x'"]),
    ('train --config fgclip_demo --system other', ["'system' is fgclip"]),
    ('train --config fgclip_demo --model.pretrained true', ["'model.weights' names nothing", '--model.weights PATH']),
    ('train --help --config nothing', ["'nothing' is not shipped"]),
    ('train --run nowhere', ["'--config' is missing"]),
    ('predict', ['inputs', 'usage: vadnb predict']),
    ('predict a.mp4', ["'--run' is missing"]),
    ('predict a.mp4 --run nowhere', ['nowhere: no such run']),
    ('predict --print_config', ["'--run' is missing"]),
    ('eval', ["'--run' is missing"]),
    ('eval --run nowhere', ['nowhere: no such run']),
    ('report', ["'--run' is missing"]),
    ('report --rum x', ["unknown option '--rum'", "did you mean 'run'?"]),
    ('report --run nowhere', ['nowhere: no such run folder']),
    ('lr-find --config fgclip_demo --low x', ["'low' must be a number, found 'x'"]),
    ('lr-find --config fgclip_demo --low 1 --high 0.1', ["'--low' 1 must be above 0 and below '--high' 0.1"]),
    ('lr-find --config fgclip_demo --steps 3', ["'--steps' must be 10 or more, found 3"]),
    ('convert', ['what, source, target', 'usage: vadnb convert']),
    ('convert skeletn a b.json', ["cannot convert 'skeletn'", "did you mean 'skeleton'?"]),
    ('convert skeleton nowhere b.json', ['nowhere: no such folder']),
    ('convert ucf-annotation nowhere.txt b.json', ['nowhere.txt: no such file']),
    ('demo --nope 3', ["unknown option '--nope'"]),
])
def test_words(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refuse(*shlex.split(words))
    for part in says: assert part in line
    assert list(tmp_path.iterdir())==[]

# ---------------------------------------------------------------- configuration files

head = 'system: fgclip\nmodel: {pretrained: false, size: tiny}\n'
@pytest.mark.parametrize('content,says', [
    (head+'optim:\n  lrr: 3\n', ["unknown key 'optim.lrr'", "did you mean 'optim.lr'?"]),
    (head+'learning_rate: 3\n', ["unknown key 'learning_rate'", "did you mean 'optim.lr'?"]),
    (head+'optim: 3\n', ["'optim' is a section", 'found 3']),
    (head+'train:\n', ["'train' is a section", 'found nothing']),
    (head+'optim:\n  lr: fast\n', ["'optim.lr' must be a number, found 'fast'"]),
    (head+'optim:\n  lr: .nan\n', ["'optim.lr' must be a finite number, found nan"]),
    (head+'name: 5\n', ["'name' must be text, found '5'"]),
    (head+'train: {steps: 0}\n', ["'train.steps' must be 1 or more"]),
    (head+'score:\n  prompts: {normal: a, b: [c]}\n', ["'score.prompts' must be a mapping from text to a list of texts"]),
    (head+'seed: 1\nseed: 2\n', ['line 4', "'seed' is written twice"]),
    (head+'optim:\n  lr: [1\n', ['line', 'not valid YAML']),
    ('!!python/object/apply:os.mkdir ["hacked"]\n', ['not valid YAML']),
    (head+'score: &a {prompts: *a}\n', ['alias']),
    ('- a\n', ['found list']), ('', ['found nothing']), ('optim: {lr: 1}\n', ["'system' is missing"]), ('system: fgclp\n', ["did you mean 'fgclip'?"]),
    (b'system: \xff\xfe', ['not UTF-8']), ('a: '+'['*3000, ['nested too deeply']),
])
def test_configuration_files(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'own.yaml').write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refuse('train', '--config', 'own.yaml')
    assert line.startswith('vadnb: error: own.yaml')
    for part in says: assert part in line
    assert [p.name for p in tmp_path.iterdir()]==['own.yaml']

# ---------------------------------------------------------------- annotation

def crime(items): return next(x for x in items if x['bbox_info'])
def region(items): return crime(items)['bbox_info'][0]
def box(items): return region(items)['keyframes'][0]['bbox']
annotations = dict(
    missing_field=(lambda v: v[0].pop('f_path'), ['item 0', "'f_path' is missing"]),
    unknown_field=(lambda v: v[0].update(global_captoin=v[0].pop('global_caption')), ["'global_captoin'", "did you mean 'global_caption'?"]),
    wrong_type=(lambda v: region(v).update(start_frame='3'), ['bbox_info[0].start_frame', "found '3'"]),
    no_list=(lambda v: v[0].update(bbox_info=None), ['bbox_info: must be a list']),
    outside=(lambda v: box(v).__setitem__(2, 1.5), ['keyframes[0].bbox', 'leaves [0, 1]']),
    inverted=(lambda v: box(v).__setitem__(slice(0, 3, 2), [.5, .2]), ['keyframes[0].bbox', 'must be greater than']),
    backwards=(lambda v: region(v).update(start_frame=30, end_frame=10), ['bbox_info[0].end_frame', '10 comes before start_frame 30']),
    negative=(lambda v: region(v).update(start_frame=-3), ['start_frame', '-3']),
    disorder=(lambda v: region(v)['keyframes'].reverse(), ['keyframes', 'comes after', 'increasing order']),
    empty_caption=(lambda v: v[0].update(global_caption=' '), ['global_caption: is empty']),
    long_caption=(lambda v: v[0].update(global_caption='word '*200), ['global_caption', '202 tokens']),
    twice=(lambda v: v[0].update(f_path=v[1]['f_path']), ['item 1', 'own name']),
    no_video=(lambda v: v[0].update(f_path='Arson404_x264.mp4'), ['f_path', "no video for 'Arson404_x264.mp4'"]),
    above=(lambda v: v[0].update(f_path='../../etc/passwd'), ['f_path', 'leads outside the data root']),
    absolute=(lambda v: v[0].update(f_path='/etc/passwd'), ['f_path', 'is absolute and leads outside the data root', '--data_root']),
    link=(lambda v: v[0].update(f_path='link.mp4'), ['f_path', 'leads outside the data root']),
    null_byte=(lambda v: v[0].update(f_path='a\0.mp4'), ['f_path', 'cannot be a path']),
    endless_name=(lambda v: v[0].update(f_path='a'*5000+'.mp4'), ['f_path', 'cannot be a path']),
    half_character=(lambda v: v[0].update(f_path='\ud83d.mp4'), ['half a surrogate']),
    empty=(lambda v: v.clear(), ['holds no video']),
)

@pytest.mark.parametrize('name', annotations)
def test_annotation(name, world, train, runs):
    change,says = annotations[name]
    items = read_json(world/'train.json')
    change(items)
    if not (world/'link.mp4').is_symlink(): (world/'link.mp4').symlink_to('/etc/passwd')
    (world/f'{name}.json').write_text(json.dumps(items))
    line = refuse(*train, '--data.train_json', f'{name}.json')
    assert line.startswith(f'vadnb: error: {world}/{name}.json')
    for part in says: assert part in line
    assert len(line)<600 and not Path(runs/train[train.index('--name')+1]).exists()

@pytest.mark.parametrize('content,says', [('[{"f_path": "a.mp4", "f_path": "b.mp4"}]', "'f_path' is written twice"), ('[{"a": 1,', 'line 1, column'), ('5', 'found int'), ('{}', 'holds no video'),
                                          ('[{"f_path": NaN}]', 'NaN'), ('['*100_000, 'nested too deeply'), (b'\xff\xfe', 'not UTF-8')])
def test_files_that_are_no_annotation(content, says, world, train):
    (world/'no.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refuse(*train, '--data.train_json', 'no.json')
    assert line.startswith(f'vadnb: error: {world}/no.json') and says in line

def test_a_region_past_the_end_of_its_video(world, train):
    items = read_json(world/'train.json')
    region(items).update(end_frame=1000)
    write_json(world/'past.json', items)
    line = refuse(*train, '--data.train_json', 'past.json', '--train.batch_size', '8')
    assert f"{world}/past.json" in line and 'bbox_info[0].end_frame: 1000' in line

def test_missing_data(world, train):
    assert f'{world}/trian.json: no such file' in refuse(*train, '--data.train_json', 'trian.json')
    assert "did you mean 'train.json'?" in refuse(*train, '--data.train_json', 'trian.json')
    assert f"data_root: {world/'nowhere'} is not there; give the folder" in refuse(*train, '--data_root', world/'nowhere')
    assert 'is a folder' in refuse(*train, '--data.train_json', 'UCF_Crimes_Videos')
    line = refuse(*train, '--train.batch_size', '9')
    assert '8 training samples do not fill one batch of 9' in line and "'train.batch_size'" in line

# ---------------------------------------------------------------- videos

@pytest.fixture
def damaged(world):
    "Files named .mp4 that are not, or not any more"
    good = sorted(world.rglob('Normal*.mp4'))[0].read_bytes()
    half = len(good)//2
    kinds = dict(text=b'this is no video\n'*99, empty=b'', cut=good[:half], tail=good[half:], scratched=good[:half]+bytes(half//4)+good[half+half//4:])
    for name,data in kinds.items(): (world/f'{name}.mp4').write_bytes(data)
    items = read_json(world/'train.json')
    for name in kinds: write_json(world/f'with_{name}.json', [dict(items[0], f_path=f'{name}.mp4', bbox_info=[]), *items[1:]])
    return kinds

def test_unreadable_videos(world, train, run, damaged):
    for name in damaged:
        assert f'{world}/{name}.mp4: ' in refuse('predict', world/f'{name}.mp4', '--run', run)
        assert f'{world}/{name}.mp4: ' in refuse(*train, '--data.train_json', f'with_{name}.json', '--train.batch_size', '8')

def test_an_unreadable_video_in_a_loading_process(world, train, damaged):
    for key in ('train_json', 'valid_json'):
        line = refuse(*train, f'--data.{key}', 'with_text.json', '--train.batch_size', '8', '--train.workers', '1')
        left = multiprocessing.active_children()
        for p in left: p.kill()
        assert f' {world}/text.mp4: ' in line and 'worker' not in line
        assert left==[]         # the program would wait for them without end when it leaves

def test_skipping_is_counted_and_listed(world, runs, train, damaged):
    code,out,err = vadnb(*train, '--data.train_json', 'with_text.json', '--train.on_bad_sample', 'skip', '--train.steps', '4', '--data.valid_json', 'null')
    assert code==0, err
    run = runs/train[train.index('--name')+1]
    found = [f for f in read_json(run/'health.json')['findings'] if f['code']=='skipped_samples']
    assert len(found)==1 and found[0]['evidence']['count']==1 and f'{world}/text.mp4' in found[0]['evidence']['samples'][0]
    page = (run/'report.html').read_text()
    assert '1 sample could not be read' in page and 'text.mp4' in page
    assert read_jsonl(run/'log.jsonl')[-1]['status']=='done'

def test_predict_without_a_video(run, tmp_path, world):
    good = sorted(world.rglob('*.mp4'))[0]
    before = files(run)
    assert 'nowhere.mp4: no such file or folder' in refuse('predict', good, 'nowhere.mp4', '--run', run)
    (tmp_path/'empty').mkdir()
    assert 'holds no pictures' in refuse('predict', tmp_path/'empty', '--run', run)
    shutil.copy(good, tmp_path/good.name)
    assert 'would write the same files' in refuse('predict', good, tmp_path/good.name, '--run', run)
    assert files(run)==before

# ---------------------------------------------------------------- runs, checkpoints, weights

def test_a_recording_without_a_length_is_told(run, tmp_path):
    import av
    from vadnb.data.video_writing import numbered_frames
    with av.open(str(tmp_path/'live.webm'), 'w', options=dict(live='1')) as c:
        s = c.add_stream('libvpx-vp9', rate=25)
        s.width,s.height,s.pix_fmt = 64, 48, 'yuv420p'
        for x in [*numbered_frames(30), None]: c.mux(s.encode(x if x is None else av.VideoFrame.from_ndarray(x, format='rgb24').reformat(64, 48)))
    (tmp_path/'torn.webm').write_bytes((tmp_path/'live.webm').read_bytes()[:-5])
    code,_,err = vadnb('predict', tmp_path/'live.webm', tmp_path/'torn.webm', '--run', run, '--out', tmp_path/'out', '--pictures', 'none')
    whole,torn = err.splitlines()
    assert code==0 and whole.startswith('vadnb: warning: ') and 'live.webm: its header announces no length' in whole
    assert 'torn.webm: it was cut off: byte' in torn

def test_a_run_given_to_train_is_told_how_to_go_on(run):
    assert f'to go on with that run: vadnb train --config {run}/config.yaml' in refuse('train', '--run', run)
    assert f'for that run: vadnb verify --config {run}/config.yaml' in refuse('verify', '--run', run)

def test_what_is_no_video_or_no_configuration_is_called_what_it_is(run, tmp_path):
    (tmp_path/'a.jpg').write_bytes(b'\xff\xd8\xff\xe0'+bytes(99))
    (tmp_path/'a.json').write_text('[]')
    for name,kind in (('a.jpg', 'a JPEG image'), ('a.json', 'a JSON file')):
        assert f'{name}: is {kind} and no video; give a video or a folder of pictures' in refuse('predict', tmp_path/name, '--run', run, '--out', tmp_path/'out')
    for config in ('fgclip', 'uniad', 'adatad', 'action_cls'):
        code,out,_ = vadnb('verify', '--config', f'{config}_demo', '--data_root', tmp_path/'a.jpg')
        assert code==1 and 'a.jpg is a JPEG image and no folder; give the folder' in out and out.endswith('not ready\n')
    assert f'{run}: is a folder and no configuration; give {run}/config.yaml in it' in refuse('train', '--config', run)

def test_a_changed_width_is_named(run):
    for words in (['eval', '--run', run], ['train', '--config', run/'config.yaml', '--train.steps', '4']):
        assert "'model.image_size' is 16" in refuse(*words, '--model.image_size', '16')

def test_configs_are_listed():
    out = ends_well('configs')
    assert all(any(l.startswith(name+' ') and len(l)>len(name)+20 for l in out.splitlines()) for name in ('fgclip_demo', 'uniad_mvtec'))

def test_run_folders_that_exist(world, runs, run):
    before = files(runs)
    words = ['train', *options(world, runs, 'first')]
    assert f'{run}: is finished (3 of 3 steps)' in refuse(*words)
    assert f'{run}: holds a run already' in refuse(*words, '--train.resume', 'never')
    with contextlib.closing(lock_run(run)): assert 'another process is training' in refuse(*words, '--train.steps', '5')
    assert files(runs)==before
    (runs/'mine').mkdir(); (runs/'mine/notes.txt').write_text('keep me')
    assert f'{runs}/mine: exists and is not a run folder; choose another --name' in refuse(*words, '--name', 'mine')
    assert files(runs/'mine')=={'notes.txt': b'keep me'}

def test_devices(train, monkeypatch):
    assert "device 'cuda:99' was asked for" in refuse(*train, '--train.device', 'cuda:99')
    assert "device 'gpu' is unknown; use auto, cpu, cuda" in refuse(*train, '--train.device', 'gpu')
    assert "'train.precision' fp16 needs a GPU" in refuse(*train, '--train.precision', 'fp16')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert 'no GPU is visible; use --train.device cpu or auto' in refuse(*train, '--train.device', 'cuda')

def test_weights(train, tmp_path):
    words = [*train, '--model.pretrained', 'true', '--model.size', 'null', '--model.weights']
    assert "'model.size' is set but the weights decide it" in refuse(*train, '--model.pretrained', 'true', '--model.weights', 'nowhere')
    assert 'nowhere: no such model folder or file' in refuse(*words, 'nowhere')
    assert f'{tmp_path}: holds no weights' in refuse(*words, tmp_path)
    (tmp_path/'pytorch_model.bin').write_bytes(b"\x80\x02cos\nmkdir\n(S'hacked'\ntR.")         # a pickle that makes a folder when it is loaded
    assert f'{tmp_path}/pytorch_model.bin: not a file of plain tensors' in refuse(*words, tmp_path)
    assert not Path('hacked').exists()
    (tmp_path/'model.safetensors').write_bytes(b'junk')
    assert f'{tmp_path}/model.safetensors: not a readable safetensors file' in refuse(*words, tmp_path)

def test_damaged_runs(run, tmp_path, world):
    video,step = sorted(world.rglob('*.mp4'))[0], 'checkpoints/step-000003'
    def copy(name):
        shutil.copytree(run, tmp_path/name, symlinks=True)
        return tmp_path/name
    broken = copy('cut'); (broken/step/'model.safetensors').write_bytes((run/step/'model.safetensors').read_bytes()[:1000])
    for words in (['predict', video], ['eval']): assert f'{step}/model.safetensors: damaged' in refuse(*words, '--run', broken)
    broken = copy('other'); (broken/step/'model.safetensors').write_bytes((run/step/'state.safetensors').read_bytes())
    assert 'model.json: is not what was written with model.safetensors' in refuse('predict', video, '--run', broken)
    broken = copy('lost'); (broken/step/'model.safetensors').unlink()
    assert f'{step}/model.safetensors: no such file' in refuse('eval', '--run', broken)
    broken = copy('nothing'); shutil.rmtree(broken/'checkpoints')
    assert 'holds no finished checkpoint' in refuse('eval', '--run', broken)
    broken = copy('plain'); (broken/'config.yaml').unlink()
    assert 'holds no config.yaml' in refuse('eval', '--run', broken)
    broken = copy('log'); (broken/'log.jsonl').write_text('{"kind": "start"\n{}\n')
    assert 'log.jsonl, line 1: not valid JSON' in refuse('report', '--run', broken)
    assert "no checkpoint 'step-9' (there are step-000003, best)" in refuse('eval', '--run', run, '--which', 'step-9')
    assert 'no such run folder' in refuse('report', '--run', run, '--against', run.parent/'frist')

def test_convert_leaves_files_alone(world, tmp_path):
    (tmp_path/'own.json').write_text('mine')
    assert f'{tmp_path}/own.json: exists already' in refuse('convert', 'skeleton', world, tmp_path/'own.json')
    assert (tmp_path/'own.json').read_text()=='mine'

def test_a_run_outlives_the_weights_it_started_from(world, runs, tmp_path, no_page):
    from vadnb.models.clip import CLIP
    CLIP('tiny').clip.save_pretrained(tmp_path/'weights')
    words = ['--model.pretrained', 'true', '--model.size', 'null', '--model.weights', tmp_path/'weights', '--data.valid_json', 'null']
    ends_well('train', *options(world, runs, 'finetuned'), *words, '--train.steps', '1')
    shutil.rmtree(tmp_path/'weights')
    assert 'no such model folder or file' in refuse('train', *options(world, runs, 'another'), *words, '--train.steps', '2')
    assert 'done at step 2 of 2' in ends_well('train', *options(world, runs, 'finetuned'), *words, '--train.steps', '2')
    assert '4 videos' in ends_well('eval', '--run', runs/'finetuned', '--out', tmp_path/'eval.json')

def test_weights_of_others_are_measured_and_used_without_a_run(world, runs, tmp_path, no_page, monkeypatch):
    from vadnb.models.clip import CLIP
    monkeypatch.chdir(tmp_path)
    CLIP('tiny').clip.save_pretrained(tmp_path/'clip')
    words = ['--model.pretrained', 'true', '--model.size', 'null', '--model.weights', tmp_path/'clip']
    # a run that stands still has the same weights, and calibrates them on the same videos
    ends_well('train', *options(world, runs, 'still'), *words, '--train.steps', '1', '--optim.lr', '1e-30')
    ends_well('eval', '--run', runs/'still')
    out = ends_well('eval', *options(world, runs, 'alone'), *words)
    assert 'thresholds: set by 4 validation videos' in out and 'fgclip_demo (clip), 4 videos' in out
    alone,still = read_json('alone_eval.json'), read_json(runs/'still'/'eval.json')
    assert (alone['run'], alone['checkpoint'], alone['samples'], alone['supervision'])==('none', 'clip', 4, 'learned from: nothing here; the weights are clip')
    assert alone['metrics']==still['metrics'] and any(k.startswith('baseline/frame_auc/') for k in alone['metrics'])
    video = sorted(world.rglob('Normal*.mp4'))[0]
    ends_well('predict', video, '--run', runs/'still')
    ends_well('predict', video, *options(world, runs, 'alone'), *words)
    a,b = (read_json(next(Path(p).glob('*.layers.json'))) for p in ('alone_predictions', runs/'still'/'predictions'))
    assert [l['kind'] for l in a['layers']]==[l['kind'] for l in b['layers']] and {**a['layers'][0], 'source': 0}=={**b['layers'][0], 'source': 0}
    # without data nothing is calibrated, and that is said
    code,out,err = vadnb('predict', video, '--out', tmp_path/'out', *[w if w!=world else tmp_path for w in options(world, runs, 'alone')], *words, '--data_root', tmp_path)
    assert code==0 and 'vadnb: warning: nothing is calibrated' in err and 'valid.json' in err, err
    assert 'rest on model.weights, and that is null' in refuse('predict', video, *options(world, runs, 'random'))
    assert not Path('random_predictions').exists()

# ---------------------------------------------------------------- disks

@contextlib.contextmanager
def small_disk(limit):
    "No file may grow beyond `limit` bytes: the kernel refuses the rest, as it does when a disk is full"
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)); signal.signal(signal.SIGXFSZ, old)

def test_a_disk_that_fills_up_while_saving(train, runs, no_page):
    run = runs/train[train.index('--name')+1]
    words = [*train, '--train.unit', 'step', '--data.valid_json', 'null']
    ends_well(*words, '--train.steps', '1')
    whole = files(run/'checkpoints')
    with small_disk(1_000_000): line = refuse(*words, '--train.steps', '2')
    assert f'{run}/checkpoints/step-000002: cannot be written' in line and 'free some space' in line and 'step-000001 is whole' in line
    assert files(run/'checkpoints')==whole and read_jsonl(run/'log.jsonl')[-1]['status']=='failed'
    assert 'done at step 2 of 2' in ends_well(*words, '--train.steps', '2')          # with room again, the run resumes

def test_a_disk_without_room_for_the_second_part(train, runs, no_page, monkeypatch):
    run,written = runs/train[train.index('--name')+1], []
    def save_file(tensors, path, *more):
        written.append(path)
        if len(written)==4: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path, *more)
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, 'save_file', save_file)
    line = refuse(*train, '--train.unit', 'step', '--train.save_every', '1', '--data.valid_json', 'null')
    assert 'step-000002: cannot be written (No space left on device)' in line
    assert [p.name for p in (run/'checkpoints').iterdir()]==['step-000001'] and [p.name for p in checkpoint_folders(run)]==['step-000001']

def test_results_survive_a_disk_that_refuses(run, tmp_path, world, monkeypatch):
    (tmp_path/'file').write_text('in the way')
    before,video,few = files(run), sorted(world.rglob('*.mp4'))[0], ['--score.stride', '16']
    assert f'{tmp_path}/file/a.html: cannot be written' in refuse('report', '--run', run, '--out', tmp_path/'file/a.html')
    assert f'{tmp_path}: cannot be written' in refuse('eval', '--run', run, '--out', tmp_path, *few, warned=True)
    assert f'{tmp_path}/file: cannot be written ({tmp_path}/file is no folder)' in refuse('predict', video, '--run', run, '--out', tmp_path/'file', *few)
    assert f'{tmp_path}/file/a.json: cannot be written' in refuse('convert', 'skeleton', world, tmp_path/'file/a.json')
    assert f'{tmp_path}/file/new: cannot be written' in refuse('train', *options(world, tmp_path/'file', 'new'))
    with small_disk(500): assert 'report.html: cannot be written (File too large); free some space' in refuse('report', '--run', run)
    def read_only(*_): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, 'replace', read_only)
    for words in (['eval', *few], ['report'], ['predict', video, *few]): assert 'cannot be written (Read-only file system)' in refuse(*words, '--run', run, warned=True)
    assert files(run)==before

def test_a_log_line_is_whole_or_absent(tmp_path):
    log = tmp_path/'log.jsonl'
    append_jsonl(log, dict(step=1))
    with small_disk(30), pytest.raises(Exception, match='free some space'): append_jsonl(log, dict(step=2, says='a'*50))
    append_jsonl(log, dict(step=3))
    assert [row['step'] for row in read_jsonl(log)]==[1, 3]

def program(**streams): return subprocess.run([sys.executable, '-m', 'vadnb.cli', '--help'], stderr=subprocess.PIPE, text=True, **streams)

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_output_to_a_full_disk():
    with open('/dev/full', 'w') as full: done = program(stdout=full)
    assert (done.returncode, done.stderr)==(2, 'vadnb: error: output: cannot be written (No space left on device); free some space or choose another folder\n')

def test_output_to_a_reader_who_left():
    reader,writer = os.pipe()
    os.close(reader)
    done = program(stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr)==(141, '')

# ---------------------------------------------------------------- what is not the user's fault

def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(run:str=''): raise ValueError('a bug')
    monkeypatch.setitem(COMMANDS, 'report', broken)
    with pytest.raises(ValueError, match='a bug'): main(['report'])

def test_a_gpu_without_memory_is_told(run, monkeypatch):
    def broken(run:str=''): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setitem(COMMANDS, 'report', broken)
    assert "lower 'data.frames' or 'train.batch_size'" in refuse('report', '--run', run)

def test_an_interrupted_command(monkeypatch):
    def broken(run:str=''): raise KeyboardInterrupt
    monkeypatch.setitem(COMMANDS, 'report', broken)
    assert vadnb('report')==(130, '', 'vadnb: interrupted\n')

def test_pictures_of_videos_are_drawn_or_not(world, run, tmp_path):
    path = sorted(world.rglob('*.mp4'))[0]
    ends_well('predict', path, '--run', run, '--out', tmp_path/'a', '--pictures', 'none', '--score.stride', '8')
    assert {''.join(p.suffixes[-1:]) for p in (tmp_path/'a').iterdir()}=={'.json', '.csv', '.npz'} and (tmp_path/'a'/f'{path.stem}.layers.json').exists()
    assert 'ranks the images of a folder, and videos have no such order; use all or none' in refuse('predict', path, '--run', run, '--out', tmp_path/'b', '--pictures', 'worst', '--score.stride', '8')
    assert not (tmp_path/'b').exists()

def test_videos_of_one_name_cost_themselves_before_anything_is_scored(world, run, tmp_path):
    paths,out = sorted(world.rglob('*.mp4'))[:3], tmp_path/'out'
    for k,name in ((0, 'a/x.mp4'), (1, 'b/x.mkv'), (0, 'b/z.avi'), (2, 'b/z.mp4')):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(paths[k], tmp_path/name)
    words = ['--run', run, '--out', out, '--pictures', 'none', '--score.stride', '8']
    ends_well('predict', tmp_path/'a', *words)
    before = files(out)
    code,said,err = vadnb('predict', tmp_path/'b', *words)
    first,second,count = err.splitlines()
    assert code==3 and f"x.layers.json: results (of another file, x.mp4) lie where those of {tmp_path/'b'/'x.mkv'} would go" in first
    assert f"{tmp_path/'b'/'z.mp4'}: is not scored, because its results would be called like those of {tmp_path/'b'/'z.avi'}; rename one" in second
    assert count=='vadnb: error: 2 of 3 could not be scored' and 'z.avi: ' in said and 'x.mkv' not in said and 'z.mp4' not in said
    assert before.items()<=files(out).items() and (out/'z.layers.json').exists()
    # what was asked for by name too: the rest is done
    code,said,err = vadnb('predict', tmp_path/'a'/'x.mp4', paths[1], *words)
    assert code==3 and '(of this very file)' in err and '1 of 2 could not be scored' in err and f'{paths[1]}: ' in said
    assert '(of this very file)' in refuse('predict', tmp_path/'a'/'x.mp4', *words)
