"Every fault that health knows of fgclip, planted in a training run and named in its file, its log and nowhere else"
import math, warnings
import pytest, torch
from vadnb.core import read_json, read_jsonl, write_json
from vadnb.models.clip import CLIP
from vadnb.models.memory_bank import MemoryBank
from vadnb.systems.fgclip import features
from vadnb.systems.fgclip.data import FGCLIPData
from vadnb.systems.fgclip.system import FGCLIP
from vadnb.systems.fgclip.checks import contrastive_checks
from vadnb.train.health import HealthError
from vadnb.train.learner import fit
from vadnb.worlds.street import street_world
from test_fgclip_system import BANKS, changed_json, config, make_world

@pytest.fixture(scope='module')
def world(tmp_path_factory): return make_world(tmp_path_factory.mktemp('health')/'world')

@pytest.fixture
def findings(world, tmp_path):
    "Train and give back what health.json says, by code, after comparing it with the log; of batches of four it says that they are small"
    def f(*more, error=None, few=False, root=world):
        cfg = config(root, tmp_path, 'run', '--train.steps', '4', *more)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if error:
                with pytest.raises(HealthError, match=error): fit(cfg)
            else: fit(cfg)
        written,log = read_json(tmp_path/'run'/'health.json'), read_jsonl(tmp_path/'run'/'log.jsonl')
        assert {c.code for c in contrastive_checks()}<={c['code'] for c in written['checked']}
        # of a bank that is not there nothing is said to hold
        bank, = (c.get('state') for c in written['checked'] if c['code']=='memory_bank')
        if not any(str(w).startswith('--bank.') for w in more): assert bank=='does not apply'
        assert [(x['code'], x['severity']) for x in written['findings']]==[(r['code'], r['severity']) for r in log if r['kind']=='health']
        res = {}
        for x in written['findings']:
            if few or x['code']!='few_candidates': res.setdefault(x['code'], []).append(x)
        return res
    return f

def only(found, code, severity='warning', n=1):
    "The findings, when they are all of one code and severity"
    assert {k: [x['severity'] for x in v] for k,v in found.items()}=={code: [severity]*n}
    return found[code] if n>1 else found[code][0]

@pytest.mark.parametrize('some', [(), (*BANKS, '--bank.warmup', '3', '--model.log_scale', math.log(100)), (*BANKS, '--train.batch_size', '2', '--train.accumulate', '2', '--train.steps', '8'),
    ('--loss.kind', 'siglip', '--loss.background_weight', '1', '--loss.quiet_weight', '1'), ('--model.long_captions', 'long', '--loss.hard_negative_weight', '0.5', '--data.train_json', 'negatives.json')])
def test_a_healthy_run_has_no_finding(findings, some): assert findings(*some)=={}

# ---------------------------------------------------------------- the bank

def test_a_bank_that_is_never_switched_on(findings):
    found = only(findings(*BANKS, '--bank.warmup', '50'), 'memory_bank', n=2)
    for x,name in zip(found, ('global', 'region')):
        assert f'the memory bank of the {name} loss is switched on after 50 optimizer steps and the run has 4' in x['message'] and x['evidence']==dict(warmup=50, steps=4) and x['step']==0

def test_a_warm_up_as_long_as_the_run_is_never_over(findings):
    "After three steps the fourth reads it, as in a healthy run above"
    assert len(only(findings(*BANKS, '--bank.warmup', '4'), 'memory_bank', n=2))==2

def test_a_bank_that_is_not_read(findings, monkeypatch):
    monkeypatch.setattr(MemoryBank, 'active', property(lambda self: False))
    found = only(findings(*BANKS, '--train.steps', '8'), 'memory_bank', n=2)
    assert all('switched on since step 2 and the loss does not read it' in x['message'] and x['step']==7 for x in found)

def test_a_bank_that_is_read_empty(findings, monkeypatch):
    monkeypatch.setattr(MemoryBank, 'push', lambda self, *rows: None)
    found = only(findings(*BANKS), 'memory_bank', n=2)
    assert all(x['step']==3 and 'is read at step 4 and holds nothing' in x['message'] for x in found)       # found once, told of the last time

def test_a_bank_of_a_set_without_regions(findings):
    found = findings('--data.train_json', 'free.json', '--bank.regions', '8', '--bank.warmup', '1')
    assert 'holds nothing' in found['memory_bank'][0]['message'] and 'the region loss never had more than 0 candidate' in found['single_candidate'][0]['message']

@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_bank_that_counts_forward_passes(findings, monkeypatch, accumulate):
    push = MemoryBank.push
    def counting(self, *rows): push(self, *rows); self.step()
    monkeypatch.setattr(MemoryBank, 'push', counting)
    found = only(findings(*BANKS, '--train.accumulate', accumulate, '--train.batch_size', '2', error='once per optimizer step and never per forward pass'), 'memory_bank', 'fault')
    assert f'has counted {1+accumulate} steps after 1 optimizer steps' in found['message']

def test_a_bank_that_counts_forward_passes_only(findings, monkeypatch):
    "Without accumulation the count is that of optimizer steps; with it, it is not"
    push = MemoryBank.push
    def counting(self, *rows): push(self, *rows); self.steps += 1
    monkeypatch.setattr(MemoryBank, 'push', counting)
    monkeypatch.setattr(MemoryBank, 'step', lambda self: None)
    only(findings(*BANKS, '--train.accumulate', '2', '--train.batch_size', '2', error='has counted 2 steps after 1'), 'memory_bank', 'fault')

# ---------------------------------------------------------------- candidates

def test_one_candidate(findings):
    found = findings('--train.batch_size', '1', '--bank.regions', '8', '--bank.warmup', '1')
    names = {x['evidence']['loss']: x['message'] for x in found['single_candidate']}
    assert 'global' in names and 'the global loss never had more than 1 candidate in 4 steps, so it is zero and teaches nothing: raise --train.batch_size' in names['global']

def test_a_bank_helps_a_batch_of_one(findings): assert 'global' not in {x['evidence']['loss'] for x in findings('--train.batch_size', '1', *BANKS, '--train.steps', '8').get('single_candidate', [])}

def test_batches_without_regions(findings):
    "One abnormal video in eight: three of four batches hold no region"
    found = findings('--data.train_json', 'one_crime.json', '--train.batch_size', '2', '--train.steps', '8')
    said = [x for x in found['single_candidate'] if x['evidence'].get('batches')]
    assert len(said)==1 and '6 of 8 batches held nothing for the region loss' in said[0]['message'] and said[0]['evidence']==dict(loss='region', batches=6)

def test_a_set_without_regions(findings):
    found = findings('--data.train_json', 'free.json')
    assert {x['evidence']['loss'] for x in found['single_candidate']}=={'region'} and 'check that the annotation has regions' in found['single_candidate'][0]['message']
    assert {'single_candidate', 'unmeasured'}<=found.keys()<={'single_candidate', 'unmeasured', 'zero_gradient'}
    assert {x['evidence']['name'] for x in found['unmeasured']}>={'loss/region'}

def test_a_loss_that_is_off_needs_no_candidates(findings):
    found = findings('--data.train_json', 'free.json', '--loss.region_weight', '0')
    assert 'single_candidate' not in found

def test_candidates_that_change(findings, tmp_path):
    found = findings('--bank.clips', '16', '--bank.warmup', '8', '--train.steps', '16')
    note = only(found, 'candidates_changed', 'note')
    rows = [r for r in read_jsonl(tmp_path/'run'/'log.jsonl') if r['kind']=='train']
    before,after = note['evidence']['before'], note['evidence']['after']
    assert after>2*before and math.log(after)-math.log(before)>.69 and 'above_chance/global says how much better than a guess' in note['message'] and f'{math.log(before):.2f}' in note['message']
    for r in rows: assert -r['above_chance/global']==pytest.approx(r['loss/global']-math.log(r['candidates/global']), abs=.05) and 0<=r['recall_at_1/global']<=1

# ---------------------------------------------------------------- scales, captions, videos

def test_a_scale_that_is_too_low(findings):
    found = only(findings('--model.log_scale', '0'), 'logit_scale', n=2)
    assert 'the logit scale of the global loss is 1' in found[0]['message'] and all('start higher with model.log_scale' in x['message'] for x in found)

def test_a_scale_that_is_not_clamped(findings, monkeypatch):
    monkeypatch.setattr(CLIP, 'clamp_scales', lambda self: [p.data.fill_(math.log(150)) for p in self.scales().values()])
    found = only(findings(), 'logit_scale', n=2)
    assert all('must be clamped to 100' in x['message'] and x['step']==2 and x['evidence']['scale']>140 for x in found)

def test_false_negatives_that_are_not_masked(findings, world):
    found = only(findings('--loss.mask_same_caption', 'false', *BANKS), 'false_negatives', n=2)
    captions = [i['global_caption'] for i in read_json(world.train)]
    most = max(captions.count(c) for c in captions)
    assert found[0]['evidence']['copies']==most>1 and f'ln {most} = {math.log(most):.2f}' in found[0]['message']
    assert f"{sum(captions.count(c)>1 for c in captions)} of 8 global captions are shared" in found[0]['message']

def test_a_frozen_projection(findings, monkeypatch):
    init = FGCLIP.__init__
    def frozen(self, *args, **kwargs): init(self, *args, **kwargs); self.clip.roi_projection.weight.requires_grad_(False)
    monkeypatch.setattr(FGCLIP, '__init__', frozen)
    found = only(findings(), 'frozen_projections')
    assert 'clip.roi_projection.weight is frozen' in found['message'] and found['evidence']['parameters']==['clip.roi_projection.weight']

def test_no_normal_video(findings): assert 'no training video is normal' in only(findings('--data.train_json', 'crimes.json'), 'no_normal_video')['message']

def test_captions_that_are_cut(findings):
    found = only(findings('--data.train_json', 'long100.json', '--model.long_captions', 'cut'), 'captions_cut')
    assert found['message'].startswith('8 captions are cut') and len(found['evidence']['captions'])==8 and 'item 0' in found['evidence']['captions'][0] and 'model.long_captions long' in found['message']

def test_texts_without_a_weight(findings, world):
    note = only(findings('--data.train_json', 'negatives.json'), 'hard_negatives', 'note')
    assert note['evidence']['texts']==sum(len(r['negative_captions']) for i in read_json(world.root/'negatives.json') for r in i['bbox_info'])

def test_a_weight_without_texts(findings):
    found = findings('--loss.hard_negative_weight', '0.5')
    assert 'no region has negative_captions' in found['hard_negatives'][0]['message'] and found.keys()<={'hard_negatives', 'unmeasured', 'zero_gradient'}

# ---------------------------------------------------------------- whether anything can be told apart

def test_few_candidates_are_said_and_enough_are_not(findings):
    found = findings('--train.steps', '8', few=True)
    # one batch is the cause, and one line says it
    one, = found['few_candidates']
    assert {*one['evidence']['candidates']}=={'global', 'region'} and 'the global loss chooses among 3.' in one['message'] and 'the region loss' in one['message']

def test_banks_give_enough_candidates(findings):
    assert findings(*BANKS, '--train.batch_size', '8', '--train.steps', '12', few=True)=={}

def test_a_bank_that_is_written_once(findings, monkeypatch):
    push = MemoryBank.push
    monkeypatch.setattr(MemoryBank, 'push', lambda self, *rows: None if int(self.count) else push(self, *rows))
    found = findings('--bank.clips', '16', '--bank.warmup', '2', '--train.steps', '8')
    assert 'holds rows of step 1 and older at step' in only(found, 'memory_bank')['message']

def test_a_bank_whose_rows_are_compared_with_nothing(findings, monkeypatch):
    read = features.read_bank
    monkeypatch.setattr(features, 'read_bank', lambda pairs, bank: (read(pairs, bank), read(pairs, None))[1])
    found = findings('--bank.clips', '16', '--bank.warmup', '2', '--train.steps', '8')
    assert 'no pair is compared with any of them' in only(found, 'memory_bank')['message']

def test_weights_that_bring_no_scale(findings, world):
    torch.manual_seed(0)
    clip = CLIP('tiny', log_scale=math.log(1/.07))
    clip.clip.save_pretrained(world.root/'weights')
    found = findings('--model.pretrained', 'true', '--model.weights', world.root/'weights', '--model.size', 'null')
    assert {x['key'] for x in found['logit_scale']}=={'global', 'region'} and 'hardly told apart below 50' in found['logit_scale'][0]['message']

def test_frozen_scales(findings, monkeypatch):
    init = FGCLIP.__init__
    def frozen(self, *args, **kwargs): init(self, *args, **kwargs); [p.requires_grad_(False) for p in self.clip.scales().values()]
    monkeypatch.setattr(FGCLIP, '__init__', frozen)
    assert only(findings(), 'frozen_scales')['evidence']['scales']==['global', 'region']

def test_black_videos_look_all_alike(findings, monkeypatch):
    collate = FGCLIPData.collate
    def black(self, items): return (b := collate(self, items)) | dict(frames=torch.zeros_like(b['frames']))
    monkeypatch.setattr(FGCLIPData, 'collate', black)
    assert 'global' in {x['key'] for x in findings('--train.steps', '8')['collapse']}

def test_boxes_that_hold_the_whole_picture(findings, world):
    def whole(item): return item | dict(bbox_info=[r | dict(keyframes=[k | dict(bbox=[0, 0, 1, 1]) for k in r['keyframes']]) for r in item['bbox_info']])
    changed_json(world, 'train.json', 'whole.json', whole)
    n = sum(len(i['bbox_info']) for i in read_json(world.train))
    assert f'the boxes of {n} of {n} training regions' in only(findings('--data.train_json', 'whole.json'), 'whole_frame_boxes')['message']

def test_a_factor_that_nothing_reads(findings, monkeypatch):
    groups = FGCLIP.groups
    monkeypatch.setattr(FGCLIP, 'groups', lambda self: [g | dict(lr=self.cfg.optim.lr) if 'text' in g['name'] else g for g in groups(self)])
    assert only(findings('--rates.text', '0.4'), 'rate_scale')['evidence']==dict(factors=['text'], groups=['text', 'text_no_decay'])

def test_captions_that_slipped_by_one(findings, tmp_path):
    "Learned by heart, they are found among those of training; validation shows that nothing was learned"
    world = street_world(tmp_path/'world', videos=12, valid_videos=32, test_videos=0, size=(48, 64), frames=(32, 36))
    items = read_json(world.train)
    write_json(world.root/'rolled.json', [i | dict(global_caption=items[k-1]['global_caption']) for k,i in enumerate(items)])
    some = '--data.valid_json', 'valid.json', '--data.valid_frames', '2', '--data.train_json', 'rolled.json', '--train.steps', '24'
    found = findings(*some, root=world)['no_better_than_guess']
    assert 'valid clip' in {x['key'] for x in found} and all('whether captions belong' in x['message'] for x in found)
