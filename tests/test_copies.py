"What is learned from and judged by is told apart by content, whatever it is called, in every system"
import shutil
from pathlib import Path
import pytest
from command import vadnb
from test_adatad import config as adatad_config
from test_uniad_system import config as uniad_config, words as uniad_words
from test_fgclip_system import config as fgclip_config
from test_action_cls import config as action_config
from vadnb.data.action_sets import ucf101
from vadnb.train.verify import copies_row
from vadnb.worlds.directions import make_ucf_directions
from vadnb.worlds.motions import make_motions
from vadnb.worlds.street import street_world
from vadnb.worlds.textures import texture_world

def fgclip(folder): return fgclip_config(street_world(folder/'world', videos=2, valid_videos=2, test_videos=2, size=(48, 64), frames=(32, 36)), folder, 'run', '--data.valid_json', 'valid.json')
def adatad(folder): return adatad_config(make_motions(folder/'world', videos=2, valid_videos=2, test_videos=1, frames=(150, 160), rounds=(2, 3), rest=(10, 20)), folder, 'run')
def uniad(folder): return uniad_config(texture_world(folder/'world', ['dots'], train=8, good=2, defective=2, size=(64, 64)).root, folder, 'run')
def action_cls(folder):
    ucf = make_ucf_directions(folder/'ucf', groups=3, test_groups=1, clips=1, seed=1)
    ucf101(str(ucf.lists), str(folder/'sets'), videos=str(ucf.videos))
    return action_config(folder, folder, 'run', '--data.train', '["ucf101_train01"]', '--data.valid', '["ucf101_test01"]', '--data.test', '[]', '--data.hold_out', '0')

@pytest.mark.parametrize('make', [fgclip, adatad, uniad, action_cls])
def test_a_file_that_is_learned_from_and_judged_by(make, tmp_path):
    cfg = make(tmp_path)
    data = cfg.make_data()
    files = {k: [Path(f) for f in data.split(k).files()] for k in ('train', 'valid')}
    def said(): return copies_row(cfg.make_data())[0]
    assert said()[1] is True, said()
    shutil.copy(files['train'][0], files['train'][1])
    what,holds,says = said()
    assert holds is None and f"{files['train'][0].name} (train)" in says and f"{files['train'][1].name} (train)" in says and says.count(str(tmp_path))==1
    shutil.copy(files['train'][0], files['valid'][0])
    what,holds,says = said()
    assert (what, holds)==('copies', False) and all(f'{files[k][0].name} ({k})' in says for k in ('train', 'valid'))

def test_verify_fails_for_one_file_under_two_names(tmp_path):
    cfg = uniad(tmp_path)
    files = {k: cfg.make_data().split(k).files() for k in ('train', 'valid', 'test')}
    some = '--config', 'uniad_demo', *uniad_words(cfg.data_root, tmp_path, 'run')
    code,out,_ = vadnb('verify', *some)
    assert code==0 and 'no two images are the same' in out
    shutil.copy(files['train'][0], files['test'][0]) # judged by `vadnb eval`: training does not read it
    code,out,_ = vadnb('verify', *some)
    assert code==0 and 'are the same; take them out of one split' in out
    shutil.copy(files['train'][0], files['valid'][0])
    code,out,_ = vadnb('verify', *some)
    assert code==1 and f'{Path(files["valid"][0]).name} (valid)' in out
