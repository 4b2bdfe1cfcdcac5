"The decode cache under training: several loading processes fill it at once, and training sees the pixels it would see without it"
import re
import numpy as np
import pytest
import torch
from vadnb.data.action_clips import ActionClips, collate
from vadnb.data.segments import ActionAnnotation, ActionVideo
from vadnb.data.augmentation import ClipAugmentation
from vadnb.data.clip_frames import VideoSource
from vadnb.config import config_keys
from vadnb.core import ConfigError
from vadnb.data.decode_cache import FRAMES, DecodeCache
from vadnb.data.time_grid import ClipForm
from vadnb.data.video import VideoReader, write_video
from vadnb.systems.adatad.config import Config
from vadnb.train.feed import make_loader
from vadnb.train.samples import DrawnSamples

FORM = ClipForm(window=16, stride=2, size=(24, 24), short_side=28)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "(annotation, paths) of two videos, each of which comes twice"
    folder,rng = tmp_path_factory.mktemp('videos'),np.random.default_rng(0)
    frames = rng.integers(0, 255, (2, 90, 36, 48, 3), dtype=np.uint8)
    files = [write_video(folder/f'{k}.mp4', iter(x), fps=25) for k,x in enumerate(frames)]
    videos = {k: ActionVideo(k, 'train', 3.6, 90, events=(('run', .5, .9),)) for k in 'abcd'}
    return ActionAnnotation('a.json', ['run'], videos), {k: files[i%2] for i,k in enumerate('abcd')}

def clips(world, cache): return ActionClips(world[0], world[1], VideoSource(world[1], FORM, ClipAugmentation(), cache))

def test_loading_processes_share_one_cache(world, tmp_path):
    order = [[(e, i)] for e in range(2) for i in range(4)]
    def seen(cache, workers):
        return list(make_loader(DrawnSamples(clips(world, cache), 0), collate, workers, sampler=order))
    without,kept = seen(None, 0),seen(DecodeCache(tmp_path, 1., 28, 2, say=lambda line: None), 2)
    for a,b in zip(without, kept):
        assert torch.equal(a['frames'], b['frames']) and torch.equal(a['segments'][0], b['segments'][0]) and a['colour']==b['colour']
    # two videos of 45 kept frames, two pieces each, written once
    assert len(list(tmp_path.glob('v*')))==2 and len(list(tmp_path.rglob('*.safetensors')))==2

def test_a_damaged_file_of_the_cache_is_decoded_again(world, tmp_path, monkeypatch):
    said = []
    def first(): return next(DecodeCache(tmp_path, 1., 28, 2, say=said.append).frames(world[1]['a'], np.arange(0, 20, 2), (28, 28)))
    whole = first()
    file = next(tmp_path.rglob('*.safetensors'))
    data = bytearray(file.read_bytes()); data[-9] ^= 255; file.write_bytes(data)
    assert torch.equal(first(), whole) and any('checksum' in line for line in said)
    asked,stream = [],VideoReader.stream
    monkeypatch.setattr(VideoReader, 'stream', lambda self, indices, *args, **how: asked.append(indices) or stream(self, indices, *args, **how))
    assert torch.equal(first(), whole) and not asked

def test_messages_name_keys_that_there_are(world, tmp_path):
    keys,said = config_keys(Config),[]
    assert {FRAMES.folder, FRAMES.limit, FRAMES.memory}<=keys.keys()
    with pytest.raises(ConfigError) as e: DecodeCache(tmp_path, 0)
    said += [str(e.value), FRAMES.elsewhere]
    DecodeCache(tmp_path, 1e-6, 28, 2, say=said.append).choose([*world[1].values()])
    (tmp_path/'file').touch()
    cache = DecodeCache(tmp_path/'file', 1., 28, 2, say=said.append)
    assert cache.frames(world[1]['a'], np.arange(0, 20, 2), (28, 28)) is None
    small = DecodeCache(tmp_path/'small', 1e-4, 28, 2, say=said.append)
    assert small.frames(world[1]['a'], np.arange(0, 20, 2), (28, 28)) is None
    named = [re.findall(r'\bcache[._]\w+', line) for line in said]
    assert len(said)==5 and all(named), said
    assert {k for ks in named for k in ks}<=keys.keys(), said
