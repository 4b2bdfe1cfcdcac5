"The feature cache where it could be wrong: killed, damaged, too large, shared, out of place"
import hashlib, json, multiprocessing, os, pickle, signal, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, default_collate
from vadnb.core import ConfigError, DataError
from vadnb.data import shards as in_files, store
from vadnb.data.shards import row_bytes
from vadnb.data.store import folder_name
from vadnb.train import feature_cache
from vadnb.train.feature_cache import CachedFeatures, cached

KEY = 'enc'
# tensors are so small here that torch starts no threads: forking is safe
processes = multiprocessing.get_context('fork')

class Raw(Dataset):
    "Images of 8 x 8 pixels, each a file of 192 bytes; counts what it decodes"
    augmented,classes = False, ['a', 'b']
    def __init__(self, folder, numbers): self.paths,self.decoded = [folder/f'{n}.raw' for n in numbers],[]
    def __len__(self): return len(self.paths)
    def content(self, i): return hashlib.blake2b(self.paths[i].read_bytes(), digest_size=16).hexdigest()
    def tags(self, i): return dict(name=self.paths[i].name, cls=torch.tensor(i%2))
    def fingerprint(self): return f'{len(self)} images'
    def __getitem__(self, i):
        self.decoded.append(int(self.paths[i].stem))
        image = torch.frombuffer(bytearray(self.paths[i].read_bytes()), dtype=torch.uint8).reshape(3, 8, 8)
        return dict(image=image, mask=image[0]>128, label=torch.tensor(i), **self.tags(i))

def encode(x): return x.float()/255

@pytest.fixture
def data(tmp_path):
    "Data sets of some of twelve images"
    folder = tmp_path/'data'
    folder.mkdir()
    for n in range(12): (folder/f'{n}.raw').write_bytes(hashlib.shake_128(bytes([n])).digest(192))
    return lambda numbers=range(12): Raw(folder, numbers)

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Shards of three rows"
    monkeypatch.setattr(store, 'SHARD_BYTES', 3*ROW)
    in_files.VERIFIED.clear()

ROW = row_bytes(dict(feature=torch.zeros(1, 3, 8, 8), mask=torch.zeros(1, 8, dtype=torch.uint8), label=torch.zeros(1, dtype=torch.int64)))

def ask(data, folder, **more):
    "The cache, as a process that starts would get it, and what it said"
    in_files.VERIFIED.clear()
    said = []
    return cached(data, **(dict(encode=encode, key=KEY, mode='disk', folder=folder, batch_size=2, say=said.append) | more)), said

def shards(folder, key=KEY): return sorted((folder/folder_name(key)).glob('*.safetensors'))
def held(folder, key=KEY): return sum(p.stat().st_size for p in (folder/folder_name(key)).iterdir())

def right(cache, data):
    "Every item is what the images give"
    assert isinstance(cache, CachedFeatures) and len(cache)==len(data)
    for a,b in zip(cache, data, strict=True):
        assert a.keys()=={*b}-{'image'} | {'feature'}
        assert torch.equal(a['feature'], encode(b['image'][None])[0]) and a['name']==b['name']
        for k in ('mask', 'label', 'cls'): assert torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype
    data.decoded.clear()

def test_computed_once(data, tmp_path):
    first = data()
    cache,said = ask(first, tmp_path/'c')
    assert sorted(first.decoded)==[*range(12)] and [p.name for p in shards(tmp_path/'c')]==[f'00000{n}.safetensors' for n in (1, 2, 3, 4)]
    assert said==[f'feature cache: 12 images, {12*ROW/1000:.3g} kB, in {tmp_path/"c"}: 0 rows found, 12 to compute']
    assert cache.nbytes==12*(ROW-in_files.ROW) and cache.fingerprint()==first.fingerprint() and cache.classes==['a', 'b']
    second = data([7, 3, 11])
    cache,_ = ask(second, tmp_path/'c')
    assert second.decoded==[]
    # labels lie in the cache as they were for their content, so compare what the content gives
    assert [s['name'] for s in cache]==['7.raw', '3.raw', '11.raw'] and [int(s['label']) for s in cache]==[7, 3, 11] and [int(s['cls']) for s in cache]==[0, 1, 0]
    # what a kill has left is cleared away also where nothing is missing
    stale = tmp_path/'c'/folder_name(KEY)/'.000005.safetensors.17.tmp'
    stale.write_bytes(b'half')
    third = data()
    cache,_ = ask(third, tmp_path/'c')
    assert third.decoded==[] and not stale.exists()
    right(cache, third)

def test_progress_sees_the_batches_to_come(data, tmp_path):
    seen = []
    ask(data(), tmp_path/'c', batch_size=5, progress=lambda it: seen.append(len(it)) or it)
    assert seen==[2]      # of three, the first has told how large a row is

def test_a_changed_file_is_computed_again(data, tmp_path):
    ask(data(), tmp_path/'c')
    data().paths[5].write_bytes(bytes(192))
    again = data()
    cache,said = ask(again, tmp_path/'c')
    assert again.decoded==[5] and '11 rows found, 1 to compute' in said[0]
    right(cache, again)

def test_checked_once_per_process(data, tmp_path, monkeypatch):
    ask(data(), tmp_path/'c')
    seen,true = [],in_files.checksum
    monkeypatch.setattr(in_files, 'checksum', lambda *words: seen.append(1) or true(*words))
    ask(data(), tmp_path/'c')
    assert len(seen)==4
    cached(data([1, 2]), encode, KEY, 'disk', tmp_path/'c', say=lambda line: None)
    assert len(seen)==4
    os.utime(shards(tmp_path/'c')[0], ns=(1, 1))
    cached(data([1, 2]), encode, KEY, 'disk', tmp_path/'c', say=lambda line: None)
    assert len(seen)==5

@pytest.mark.parametrize('moment', ['before the second shard has its name', 'in the middle of the last batch'])
def test_a_kill_leaves_whole_shards(data, tmp_path, moment):
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def work():
        calls,replace = [],os.replace
        def second(*words): calls.append(1); die() if len(calls)==2 else replace(*words)
        if moment.startswith('before'): os.replace = second
        ask(data(), tmp_path/'c', encode=lambda x: die() if moment.startswith('in') and torch.equal(x[-1], data()[11]['image']) else encode(x))
    p = processes.Process(target=work)
    p.start(); p.join(300)
    assert p.exitcode==-signal.SIGKILL
    n = 1 if moment.startswith('before') else 3
    stale = list((tmp_path/'c'/folder_name(KEY)).glob('.*.tmp'))
    assert len(shards(tmp_path/'c'))==n and len(stale)==moment.startswith('before')
    again = data()
    cache,said = ask(again, tmp_path/'c')
    assert sorted(again.decoded)==[*range(3*n, 12)] and f'{3*n} rows found' in said[0]
    assert not list((tmp_path/'c'/folder_name(KEY)).glob('.*.tmp'))
    right(cache, again)

def flip(p): raw = bytearray(p.read_bytes()); raw[-100] ^= 16; p.write_bytes(raw)
HARM = {'a bit': flip, 'a bit of the header': lambda p: p.write_bytes(p.read_bytes().replace(b'label', b'lacel', 1)), 'cut': lambda p: p.write_bytes(p.read_bytes()[:-9]), 'empty': lambda p: p.write_bytes(b''),
        'longer': lambda p: p.write_bytes(p.read_bytes()+b'0'), 'text': lambda p: p.write_text('no tensors'), 'rows of another': lambda p: None}

@pytest.mark.parametrize('harm', HARM)
def test_damage_is_repaired_and_said(data, tmp_path, harm):
    ask(data(), tmp_path/'c')
    whole = shards(tmp_path/'c')[1].read_bytes()
    if harm=='rows of another':
        ask(data(), tmp_path/'c', key='other', encode=lambda x: encode(x)+1)
        shards(tmp_path/'c')[1].write_bytes(shards(tmp_path/'c', 'other')[1].read_bytes())
    else: HARM[harm](shards(tmp_path/'c')[1])
    assert shards(tmp_path/'c')[1].read_bytes()!=whole
    again = data()
    cache,said = ask(again, tmp_path/'c')
    assert sorted(again.decoded)==[3, 4, 5] and len(said)==2
    assert str(tmp_path/'c'/folder_name(KEY)/'000002.safetensors') in said[0] and ("belongs to another encoder ('other' instead of 'enc')" if harm=='rows of another' else 'is damaged') in said[0]
    right(cache, again)
    assert len(ask(data(), tmp_path/'c')[1])==1

def test_shards_of_another_version_are_not_read(data, tmp_path, monkeypatch):
    ask(data([1, 2]), tmp_path/'c')
    monkeypatch.setattr(feature_cache, 'FORMAT', 'vadnb-features-2')
    again = data([1, 2])
    cache,said = ask(again, tmp_path/'c')
    assert again.decoded==[1, 2] and 'vadnb-features-1 instead of vadnb-features-2' in said[0]

def test_another_shape_under_one_key_is_an_error(data, tmp_path):
    ask(data([1, 2, 3]), tmp_path/'c')
    with pytest.raises(DataError, match="rows of other shapes .* under one key, 'enc'"): ask(data(), tmp_path/'c', encode=lambda x: encode(x)[:, :2])

def test_the_folder_is_bounded(data, tmp_path):
    train,test = data(range(6)),data(range(6, 12))
    kept,_ = ask(train, tmp_path/'c')
    limit = (shards(tmp_path/'c')[1].stat().st_size+6*ROW)/1e9          # room for the six new rows and one old shard
    for n,p in enumerate(shards(tmp_path/'c')): os.utime(p, ns=(n+1, n+1))
    other,said = ask(test, tmp_path/'c', limit_gb=limit)
    assert 'removed 000001.safetensors' in said[0] and 'cache_gb' in said[0]
    assert [p.name for p in shards(tmp_path/'c')]==['000002.safetensors', '000003.safetensors', '000004.safetensors'] and held(tmp_path/'c')<=limit*1e9
    right(other, test)
    # the map outlives the name
    right(kept, train)
    # what is wanted stays, whatever its age
    cache,said = ask(data(range(3, 6)), tmp_path/'c', limit_gb=3*ROW/1e9)
    assert 'removed 000003.safetensors, 000004.safetensors' in said[0] and [p.name for p in shards(tmp_path/'c')]==['000002.safetensors']

def test_shards_of_mixed_rows_make_room_too(data, tmp_path):
    ask(data(range(6)), tmp_path/'c')
    want = data([0, 3, 6, 7])
    cache,said = ask(want, tmp_path/'c', limit_gb=4*ROW/1e9)
    assert 'removed 000001.safetensors, 000002.safetensors' in said[0] and sorted(want.decoded)==[0, 3, 6, 7]
    assert held(tmp_path/'c')<=4*ROW
    right(cache, want)

@pytest.mark.parametrize('mode', ['disk', 'memory'])
def test_more_than_allowed(data, tmp_path, mode):
    says = rf'cache_gb: 12 images need about {12*ROW/1000:.3g} kB, allowed are {11*ROW/1000:.3g} kB; set cache_gb to'
    with pytest.raises(ConfigError, match=says): ask(data(), tmp_path/'c', mode=mode, limit_gb=11*ROW/1e9)
    assert not shards(tmp_path/'c')
    raw = data()
    same,said = ask(raw, tmp_path/'c', mode='auto', limit_gb=11*ROW/1e9)
    assert same is raw and len(said)==1 and said[0].startswith('feature cache: off, because cache_gb: 12 images need')
    # also when the rows are there from a time of a higher limit
    ask(data(), tmp_path/'c')
    if mode=='disk':
        with pytest.raises(ConfigError, match=says): ask(data(), tmp_path/'c', limit_gb=11*ROW/1e9)
    right(ask(data(), tmp_path/'c', mode=mode, limit_gb=12*ROW/1e9)[0], data())

def test_no_room_on_the_disk(data, tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, 'disk_usage', lambda path: SimpleNamespace(free=11*ROW))
    with pytest.raises(ConfigError, match='cache_folder: .* has .* kB free, needed are'): ask(data(), tmp_path/'c')
    cache,said = ask(data(), tmp_path/'c', mode='auto')
    assert 'in memory, because cache_folder' in said[0] and not shards(tmp_path/'c')
    right(cache, data())
    monkeypatch.setattr(store, 'available_memory', lambda: 23*ROW)          # auto takes no more than half
    raw = data()
    same,said = ask(raw, tmp_path/'c', mode='auto')
    assert same is raw and len(said)==1 and 'cache_folder: ' in said[0] and 'of memory are needed' in said[0]
    right(ask(data(), None, mode='memory')[0], data())
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')                                     # two processes, two copies
    with pytest.raises(ConfigError, match='of memory are needed by each process'): ask(data(), None, mode='memory')

def test_a_disk_that_fills_up_on_the_way(data, tmp_path, monkeypatch):
    calls,fsync = [],os.fsync
    def full(fd):
        calls.append(fd)
        if len(calls)>1: raise OSError(28, 'No space left on device')
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ConfigError, match='cache_folder: .*000002.safetensors: cannot be written .No space left'): ask(data(), tmp_path/'c')
    assert [p.name for p in shards(tmp_path/'c')]==['000001.safetensors'] and not list((tmp_path/'c'/folder_name(KEY)).glob('.*.tmp'))
    cache,said = ask(data(), tmp_path/'c', mode='auto')
    assert 'in memory, because cache_folder' in said[-1]
    right(cache, data())

def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ConfigError, match='cache_folder: .*cannot be written'): ask(data(), tmp_path/'file')
    cache,said = ask(data(), tmp_path/'file', mode='auto')
    assert len(said)==1 and 'in memory, because cache_folder' in said[0]
    right(cache, data())

def test_bad_features_name_the_image(data, tmp_path):
    bad = data()[8]['image']
    for value in ('nan', 'inf'):
        with pytest.raises(DataError, match=r'8\.raw: its feature holds NaN or infinity'):
            ask(data(), tmp_path/'c', encode=lambda x: torch.where((x==bad).all((1, 2, 3))[:, None, None, None], float(value), encode(x)))
    # what was computed before stays, and the folder is free again
    assert len(shards(tmp_path/'c'))==2
    with pytest.raises(DataError, match=r'10\.raw, feature: is \(2, 8, 8\)'): ask(data(), tmp_path/'d', encode=lambda x: encode(x)[:, :2 if (x==data()[10]['image']).all((1, 2, 3)).any() else 3])
    right(ask(data(), tmp_path/'c')[0], data())

def test_two_at_once(data, tmp_path):
    "One computes; the other is made to ask in the middle of it, waits, and finds everything there"
    def until(path):
        for _ in range(2000):
            if path.exists(): return
            time.sleep(.01)
        os._exit(7)
    def work(rank):
        mine = data()
        def say(line):
            if 'waits' in line: (tmp_path/'waits').touch()
        def slowly(x): (tmp_path/'inside').touch(); until(tmp_path/'waits'); return encode(x)
        if rank==1: until(tmp_path/'inside')
        cache = cached(mine, slowly, KEY, 'disk', tmp_path/'c', batch_size=2, say=say)
        (tmp_path/f'decoded{rank}').write_text(str(len(mine.decoded)))
        right(cache, mine)
        os._exit(0)
    group = [processes.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for p in group: p.start()
    for p in group: p.join(300)
    for p in group: p.kill()
    assert [p.exitcode for p in group]==[0, 0]
    assert [(tmp_path/f'decoded{rank}').read_text() for rank in (0, 1)]==['12', '0']

@pytest.mark.parametrize('mode', ['disk', 'memory'])
def test_no_image_is_opened_again(data, tmp_path, mode):
    raw = data()
    cache,_ = ask(raw, tmp_path/'c', mode=mode)
    truth = [encode(s['image'][None])[0] for s in raw]
    for p in raw.paths: p.unlink()
    for workers in (0, 2):
        batches = list(DataLoader(cache, batch_size=5, collate_fn=default_collate, num_workers=workers))
        assert torch.equal(torch.cat([b['feature'] for b in batches]), torch.stack(truth))
        assert [n for b in batches for n in b['name']]==[p.name for p in raw.paths]
    # what a loading process that is started afresh would get
    there = pickle.dumps(cache)
    for a,b in zip(pickle.loads(there), cache, strict=True): assert all(torch.equal(a[k], b[k]) for k in ('feature', 'mask', 'label', 'cls'))
    if mode=='disk':
        shards(tmp_path/'c')[0].unlink()
        with pytest.raises(DataError, match='000001.safetensors'): pickle.loads(there)
    cache[3]['feature'].fill_(9.)
    assert torch.equal(cache[3]['feature'], truth[3])
    assert cache.fingerprint()=='12 images'

def test_off_touches_nothing(data, tmp_path):
    raw = data()
    assert ask(raw, tmp_path/'c', mode='off')[0] is raw
    for mode in ('auto', 'disk', 'memory'):
        raw.augmented = True
        same,said = ask(raw, tmp_path/'c', mode=mode)
        assert same is raw and len(said)==1 and 'augmented' in said[0]
    assert raw.decoded==[] and not (tmp_path/'c').exists()
    with pytest.raises(DataError, match='empty'): ask(data([]), tmp_path/'c')

def test_a_cache_of_an_earlier_day_is_read(data, tmp_path):
    "The layout `vadnb-features-1`, written here by hand"
    raw,folder = data(range(6)),tmp_path/'c'/f"v1-enc-{hashlib.blake2b(b'enc', digest_size=6).hexdigest()}"
    folder.mkdir(parents=True)
    for k in (0, 3):
        some = [raw[i] for i in range(k, k+3)]
        bits = torch.stack([s['mask'] for s in some]).reshape(3, 64).numpy()
        feature,mask = encode(torch.stack([s['image'] for s in some])),torch.from_numpy(np.packbits(bits, 1))
        tensors = dict(feature=feature, mask=mask, label=torch.stack([s['label'] for s in some]))
        names = ' '.join(raw.content(i) for i in range(k, k+3))
        words = dict(format='vadnb-features-1', key='enc', digests=names, bits='{"mask": [8, 8]}')
        facts = [(n, str(t.dtype), list(t.shape)) for n,t in sorted(tensors.items())]
        check = hashlib.blake2b(json.dumps([*words.values(), facts]).encode(), digest_size=16)
        for _,t in sorted(tensors.items()): check.update(t.numpy().tobytes())
        save_file(tensors, folder/f'00000{k//3+1}.safetensors', dict(words, checksum=check.hexdigest()))
    again = data(range(6))
    cache,said = ask(again, tmp_path/'c')
    assert again.decoded==[] and said==[f'feature cache: 6 images, {6*ROW/1000:.3g} kB, all found in {tmp_path/"c"}']
    right(cache, again)

class Clips(Dataset):
    "Samples without an image"
    augmented,classes,noun = False,['all'],'clips'
    def __len__(self): return 7
    def content(self, i): return f'clip{i}'
    def tags(self, i): return dict(name=f'clip {i}')
    def fingerprint(self): return '7 clips'
    def __getitem__(self, i):
        gen = torch.Generator().manual_seed(i)
        return dict(frames=torch.randint(0, 256, (4, 3, 8, 8), generator=gen).byte(), fps=torch.tensor(25.+i),
                    segments=torch.tensor([[0., i]]), **self.tags(i))

@pytest.mark.parametrize('mode', ['disk', 'memory'])
def test_any_tensors_in_and_out(tmp_path, mode):
    def look(frames, fps):
        assert frames.shape[1:]==(4, 3, 8, 8) and frames.dtype==torch.uint8 and fps.shape==frames.shape[:1]
        mean = frames.float().mean((2, 3, 4))
        return dict(mean=mean.half(), rate=mean*fps[:,None], bright=mean>127, best=mean.argmax(1))
    clips = Clips()
    for _ in range(2):
        cache,said = ask(clips, tmp_path/'c', mode=mode, encode=look, inputs=('frames', 'fps'))
        assert '7 clips' in said[0]
        for got,s in zip(cache, [clips[i] for i in range(7)], strict=True):
            want = {n: v[0] for n,v in look(s['frames'][None], s['fps'][None]).items()} | dict(segments=s['segments'])
            assert got.keys()==want.keys() | {'name'} and got['name']==s['name']
            for n,v in want.items():
                assert got[n].dtype==v.dtype
                torch.testing.assert_close(got[n], v)
    one,_ = ask(clips, None, mode='memory', encode=lambda x: x.float().mean((1, 2, 3, 4)), inputs='frames')
    assert {n: v.shape for n,v in one[0].items() if n!='name'}==dict(feature=(), fps=(), segments=(1, 2))
    for inputs,says in (('image', 'clip 0, image: is missing; an encoder takes tensors, and `inputs` names them'),
                        (('frames', 'name'), 'clip 0, name: is str')):
        with pytest.raises(DataError, match=says): ask(clips, None, mode='memory', encode=look, inputs=inputs)
    with pytest.raises(DataError, match='clip 0: its rate holds NaN or infinity; .* then the frames'):
        ask(clips, None, mode='memory', encode=lambda x: dict(rate=x.flatten(1).float()*float('nan')), inputs='frames')

def test_keys_have_folders_of_their_own(tmp_path):
    names = {folder_name(k) for k in ('a/b', 'a b', '../..', 'a'*300, 'a'*301, 'é', '')}
    assert len(names)==7 and all((tmp_path/n).resolve().parent==tmp_path.resolve() and len(n)<70 and n.startswith('v1-') for n in names)
