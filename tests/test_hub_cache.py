"Names of the hub mean what lies in its cache on this machine, for every system that reads weights"
import os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file

root = Path(__file__).resolve().parent.parent

def cached(cache, name, files):
    "A model as `hf download` leaves it: blobs are left out, the snapshot holds the files"
    folder = cache/('models--'+name.replace('/', '--'))
    (folder/'refs').mkdir(parents=True)
    (folder/'refs/main').write_text('abc123')
    shutil.copytree(files, folder/'snapshots/abc123')

@pytest.fixture
def cache(tmp_path):
    from vadnb.models.clip import CLIP
    from transformers import CLIPConfig
    clip = CLIP('tiny')
    (tmp_path/'clip').mkdir()
    clip.clip.config.to_json_file(tmp_path/'clip/config.json', use_diff=False)
    save_file({k: v.contiguous() for k,v in clip.clip.state_dict().items()}, tmp_path/'clip/model.safetensors')
    (tmp_path/'empty').mkdir(); (tmp_path/'empty/config.json').write_text('{}')
    cached(tmp_path/'cache', 'somebody/tiny-clip', tmp_path/'clip')
    cached(tmp_path/'cache', 'somebody/no-weights', tmp_path/'empty')
    return tmp_path

CODE = '''
import sys, torch
from vadnb.core import CheckpointError
from vadnb.systems.registry import load_config
def system(name):
    s = load_config('fgclip_ucf_debug', ['--model.weights', name, '--model.activation', 'quick_gelu', '--data.size', '[64,64]']).build()
    s.start(True)
    return s
here,there = system('clip'), system('somebody/tiny-clip')
for k,v in here.state_dict().items(): assert torch.equal(v, there.state_dict()[k]), k
for name,says in (('somebody/no-weights', 'holds no weights'), ('somebody/else', 'somebody/else: no such')):
    try: system(name)
    except CheckpointError as e: assert says in str(e), e
    else: raise SystemExit(f'{name} was read')
'''

def test_a_name_of_the_hub_is_found_in_its_cache(cache):
    "In a process of its own: where the cache lies is read once"
    env = os.environ | dict(HF_HUB_CACHE=str(cache/'cache'), HF_HUB_OFFLINE='1', PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, '-c', CODE], cwd=cache, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
