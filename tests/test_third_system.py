"""The third system, a file of its own (segments_system.py), through every command. Nothing else knows of it."""
import json, os, signal, time
from pathlib import Path
import numpy as np
import pytest
import torch
import segments_system
from command import vadnb as command
from toy_system import processes, run_file
from vadnb.core import read_json, read_jsonl, write_atomic
from vadnb.data.video import write_video
from vadnb.results.record import read_record
from vadnb.train.checkpoint import find_checkpoint, read_part

here = Path(segments_system.__file__).resolve()

def vadnb(*words, code=0):
    "What a command prints, or what it says on stderr when it ends with another code"
    ended,out,err = command(*words)
    assert ended==code, out+err
    return out if code==0 else err

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Grey clips that turn red or bright (day), blue (night), of unlike lengths"
    root = tmp_path_factory.mktemp('third')
    colours = dict(red=(220, 40, 40), bright=(230, 230, 230), blue=(40, 40, 220))
    lists,rng = dict(day={}, night={}, test={}), np.random.default_rng(0)
    for set_name,n,labels in (('day', 8, ('red', 'bright')), ('night', 3, ('blue',)), ('test', 4, ('red', 'bright'))):
        for i in range(n):
            length,segments = 10+2*i, []
            frames = rng.integers(90, 110, (length, 32, 32, 3)).astype(np.uint8)
            for start,label in zip((2, 6), labels if i%3 else ()):
                frames[start:start+3] = colours[label]
                segments.append((start, start+3, label))
            write_video(root/f'{set_name}{i}.mp4', frames, 10)
            lists[set_name][f'{set_name}{i}.mp4'] = segments
    for name,clips in lists.items(): (root/f'{name}.json').write_text(json.dumps(clips))
    write_atomic(root/'segments.yaml', json.dumps(dict(
        system='segments', name='run', runs=str(root/'runs'), data_root=str(root), data=dict(test='test.json'),
        optim=dict(lr=.05, warmup=2), train=dict(batch_size=2, epochs=12, workers=0, device='cpu', trackers=[], ema=.9, log_every=1))))
    return root

def curve(run): return [(r['step'], r['loss']) for r in read_jsonl(run/'log.jsonl') if r['kind']=='train']

@pytest.fixture(scope='module')
def run(world):
    vadnb('train', '--config', world/'segments.yaml')
    return world/'runs'/'run'

def test_verify(world):
    said = vadnb('verify', '--config', world/'segments.yaml')
    assert '8 and 3, all there' in said and 'ready to train' in said and 'one batch' in said
    (world/'lost.json').write_text(json.dumps({'gone.mp4': []}))
    code,out,_ = command('verify', '--config', world/'segments.yaml', '--data.night', 'lost.json')
    assert code==1 and 'gone.mp4: no such file' in out and 'not ready' in out

def test_it_trains_and_its_checkpoint_is_two_files(run):
    folder = find_checkpoint(run)
    assert {p.name for p in folder.iterdir()}=={'detector.safetensors', 'heads.safetensors', 'ema.safetensors', 'state.safetensors',
                                                'state.json', 'card.json', 'labels.txt', 'detector_sizes.json'}
    card = read_json(folder/'card.json')
    assert card['facts']==dict(labels=[['bright', 'red'], ['blue']]) and card['parts']==['detector', 'heads']
    assert card['calibration']['value']['clips'][:2]==['day0.mp4', 'day1.mp4']
    assert not any(k.startswith('body') for k in read_part(folder, 'ema'))
    assert [r['status'] for r in read_jsonl(run/'log.jsonl') if r['kind']=='end']==['done'] and len(curve(run))==12*8
    assert read_json(run/'health.json')['findings']==[]

def test_killed_and_resumed_to_the_last_bit(world, run):
    "kill -9 of a process of its own at some step; the same command again"
    words = ['train', '--config', world/'segments.yaml', '--name', 'killed', '--slow', '.02', '--train.save_every', '1']
    process = processes.Process(target=run_file, args=(here, words))
    process.start()
    killed,deadline = world/'runs'/'killed', time.time()+300
    while not (killed/'checkpoints'/'step-000016').exists() and process.is_alive() and time.time()<deadline: time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode==-signal.SIGKILL
    vadnb(*words)
    assert [r['kind'] for r in read_jsonl(killed/'log.jsonl') if r['kind'] in ('start', 'resume')]==['start', 'resume']
    assert curve(killed)==curve(run)
    for part in ('detector', 'heads', 'ema'):
        a,b = (read_part(find_checkpoint(r), part) for r in (run, killed))
        assert all(torch.equal(a[k], b[k]) for k in a)

def test_eval_measures_the_test_set(world, run):
    said = vadnb('eval', '--run', run)
    found = read_json(run/'eval.json')['metrics']
    assert '4 clips' in said and found['frame_accuracy']>.9 and 'coin' in said
    assert 'names no test data; set --data.test' in vadnb('eval', '--run', run, '--data.test', 'null', code=2)
    other = vadnb('eval', '--run', run, '--data.test', 'day.json', '--out', world/'other.json')
    assert '8 clips' in other

def test_predict_gives_segments_with_their_source(world, run):
    (world/'clips').mkdir(exist_ok=True)
    for name in ('test1.mp4', 'test2.mp4'): (world/'clips'/name).write_bytes((world/name).read_bytes())
    (world/'clips'/'broken.mp4').write_bytes(b'no video')
    said = vadnb('predict', world/'clips', '--run', run, '--out', world/'out', code=3)
    assert 'broken.mp4' in said and '1 of 3 could not be scored' in said
    result = read_record(next((world/'out').glob('test1*.layers.json')))
    (source,name),layer = next(iter(result.layers().items()))
    assert (source.system, source.run, name)==('segments', 'run', 'detections') and source.checkpoint.startswith('step-')
    assert [(r['start'], r['end'], r['label']) for r in sorted(layer.record()['segments'], key=lambda r: r['start'])]==[(2, 5, 'red'), (6, 9, 'bright')]

def test_report_shows_its_segments(run):
    vadnb('report', '--run', run)
    page = (run/'report.html').read_text()
    assert 'frame accuracy' in page.replace('_', ' ') and page.count('<html')==1

def test_what_it_does_not_offer_is_one_line(run):
    for words in (['demo', '--only', 'segments'], ['pictures', '--run', run]):
        said = vadnb(*words, code=2)
        assert 'Traceback' not in said and len(said.strip().splitlines())==1 and 'segments' in said

def test_another_checkpoint_is_refused(world, run):
    "Other frozen weights, other label maps, other parts, a card of a stranger"
    folder,card = find_checkpoint(run), read_json(find_checkpoint(run)/'card.json')
    text = (folder/'card.json').read_text()
    try:
        for change,says in ((dict(provenance=dict(body='0.5')), 'was trained with body 0.5'), (dict(parts=['detector']), 'is made of detector, heads'),
                            (dict(parts=['../heads']), 'cannot be the name of a part'), (dict(system='other'), 'is of other')):
            (folder/'card.json').write_text(json.dumps(card | change))
            assert says in vadnb('eval', '--run', run, '--which', 'last', code=2)
    finally: (folder/'card.json').write_text(text)
    said = vadnb('train', '--config', world/'segments.yaml', '--train.epochs', '20', '--data.night', 'day.json', code=2)
    assert 'was trained with labels' in said
