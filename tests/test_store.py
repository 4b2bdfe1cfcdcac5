"The store of shards under stress: two at once, kills, full disks, flipped bits, other settings, a limit over many keys"
import hashlib, multiprocessing, os, pickle, resource, signal, struct, time
from contextlib import contextmanager
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import save_file
from vadnb.core import ConfigError, DataError
from vadnb.data import contents, shards as in_files, store as rooms
from vadnb.data.contents import content_of
from vadnb.data.shards import Rows, Shard, Words, map_shard, read_shard, settings_key
from vadnb.data.store import NoPlace, OverLimit, Store, Wanted, keep_in_memory

# tensors are so small here that torch starts no threads: forking is safe
processes = multiprocessing.get_context('fork')
KEY = settings_key('frames', side=64)
NAMES = [f'r{k}' for k in range(20)]

def truth(name, salt=0):
    "The row of a name: every type that is stored otherwise than another"
    raw = hashlib.shake_128(f'{name} {salt}'.encode()).digest(64*64*3)
    frame = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(64, 64, 3)
    return dict(frame=frame, mask=frame[...,0]>128, score=frame.float().mean().half(), places=frame.view(-1)[:4].long(),
                wide=frame[:2, :2, 0].bfloat16())

class Maker:
    "Computes rows in batches of two, and counts them"
    def __init__(self, salt=0, before=lambda name: None): self.made,self.salt,self.before = [],salt,before
    def __call__(self, names, later):
        for k in range(0, len(names), 2):
            some = names[k:k+2]
            for n in some: self.before(n); self.made.append(n)
            rows = [truth(n, self.salt) for n in some]
            yield Shard.of(some, {n: torch.stack([r[n] for r in rows]) for n in rows[0]})

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Shards of four rows"
    monkeypatch.setattr(rooms, 'SHARD_BYTES', 4*ROW)
    in_files.VERIFIED.clear()

ROW = in_files.row_bytes(next(Maker()(['r0'], False)).tensors)

def ask(root, names=NAMES, maker=None, key=KEY, **more):
    "The rows as a process that starts would get them, who made them, and what was said"
    in_files.VERIFIED.clear()
    maker,said = maker or Maker(),[]
    store = Store(root, key, say=said.append, **more)
    return Rows(names, store.keep(Wanted(names, maker, 2))), maker, said

def right(rows, names=NAMES, salt=0):
    assert len(rows)==len(names)
    for got,name in zip(rows, names, strict=True):
        want = truth(name, salt)
        assert got.keys()==want.keys()
        for n,v in want.items(): assert got[n].dtype==v.dtype and torch.equal(got[n], v), (name, n)

def files(root, key=KEY): return sorted(Store(root, key).folder.glob('*.safetensors'))
def left(root): return [p for p in root.rglob('.*.tmp')]

def in_child(work, *args, wait=60):
    "Exit code of a process that does `work`"
    def body():
        try: work(*args); os._exit(0)
        except BaseException: import traceback; traceback.print_exc(); os._exit(1)
    p = processes.Process(target=body)
    p.start()
    if not wait: return p
    p.join(wait)
    if p.is_alive(): p.kill()
    return p.exitcode

def together(*works):
    group = [in_child(w, wait=0) for w in works]
    for p in group: p.join(300)
    for p in group: p.kill()
    return [p.exitcode for p in group]

# ---------------------------------------------------------------- rows

def test_rows_and_ranges(tmp_path):
    rows,_,_ = ask(tmp_path, NAMES[::-1])
    right(rows, NAMES[::-1])
    rng = np.random.default_rng(0)
    many = [slice(*sorted(rng.integers(0, 21, 2))) for _ in range(20)] + [slice(None, None, k) for k in (2, 3, -1)]
    for i in [*many, rng.integers(0, 20, 30), [5], [], np.array([19, 0, -1])]:
        got,names = rows[i],np.array(NAMES[::-1])[i]
        for n in truth('r0'):
            want = torch.stack([truth(x)[n] for x in names]) if len(names) else truth('r0')[n][None][:0]
            assert got[n].dtype==want.dtype and torch.equal(got[n], want)
    rows[2:9]['frame'].fill_(7); rows[3]['frame'].fill_(7)
    right(rows, NAMES[::-1])
    with pytest.raises(IndexError): rows[20]
    right(pickle.loads(pickle.dumps(rows)), NAMES[::-1])

def test_memory_holds_the_same(tmp_path):
    maker = Maker()
    right(Rows(NAMES, keep_in_memory(Wanted(NAMES, maker, 5), 1e6, say=len)))
    assert maker.made==NAMES
    with pytest.raises(OverLimit, match='limit_gb: 20 rows need about'):
        keep_in_memory(Wanted(NAMES, maker), 19*ROW, say=len)

def test_a_content_is_its_bytes(tmp_path, monkeypatch):
    path,opened = tmp_path/'a.mp4',[]
    path.write_bytes(b'one')
    true = hashlib.file_digest
    monkeypatch.setattr(hashlib, 'file_digest', lambda *words: opened.append(1) or true(*words))
    first = content_of(path)
    # a change within a tick of the clock is seen, because what has just been written is read again
    for text in (b'two', b'six', b'one'):
        path.write_bytes(text)
        assert content_of(path)==hashlib.blake2b(text, digest_size=16).hexdigest()
    assert content_of(path)==first
    opened.clear()
    monkeypatch.setattr(contents, 'RESTED', -10**18)
    assert content_of(path)==content_of(path)==first and len(opened)==1
    path.unlink()
    with pytest.raises(DataError, match='a.mp4: cannot be read'): content_of(path)

# ---------------------------------------------------------------- two at once

def test_two_fill_one_store(tmp_path):
    "Halves that overlap, at the same time: everything is there, nothing twice"
    def work(names):
        def slow(name): time.sleep(.01)
        maker = Maker(before=slow)
        rows,_,_ = ask(tmp_path/'s', names, maker)
        right(rows, names)
        (tmp_path/f'{names[0]}.made').write_text(' '.join(maker.made))
    assert together(lambda: work(NAMES[:14]), lambda: work(NAMES[6:]))==[0, 0]
    made = [n for p in tmp_path.glob('*.made') for n in p.read_text().split()]
    assert sorted(made)==sorted(NAMES)
    held = [n for p in files(tmp_path/'s') for n in read_shard(p, KEY).names]
    assert sorted(held)==sorted(NAMES)
    rows,maker,said = ask(tmp_path/'s')
    assert maker.made==[] and said==[f'store: 20 rows, {20*ROW/1000:.3g} kB, all found in {tmp_path/"s"}']

def test_who_waits_says_so(tmp_path):
    said = []
    def other():
        with Store(tmp_path, KEY).locked(True): (tmp_path/'in').touch(); time.sleep(.5)
    p = in_child(other, wait=0)
    while not (tmp_path/'in').exists(): time.sleep(.01)
    with Store(tmp_path, KEY, say=said.append).locked(False): pass
    p.join(300)
    assert said==[f'store: waits for another process that works in {Store(tmp_path, KEY).folder}']

def test_a_child_does_not_hold_on(tmp_path):
    "A loading process that outlives the lock of its parent"
    with Store(tmp_path, KEY).locked(True): p = in_child(lambda: time.sleep(30), wait=0)
    with Store(tmp_path, KEY, say=lambda line: pytest.fail(line)).locked(True): pass
    p.kill(); p.join(300)

# ---------------------------------------------------------------- kills and full disks

@pytest.mark.parametrize('moment', ['write', 'sync', 'rename', 'compute'])
def test_a_kill_leaves_whole_shards(tmp_path, moment):
    "Killed in the third shard; what was whole stays, what was begun is cleared away"
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def work():
        calls,replace,fsync = [],os.replace,os.fsync
        def nth(true, *words): calls.append(1); die() if len(calls)==3 else true(*words)
        if moment=='rename': os.replace = lambda *words: nth(replace, *words)
        if moment=='sync': os.fsync = lambda *words: nth(fsync, *words)
        if moment=='write':
            true = in_files.write_atomic
            def half(path, data, error):
                if len(calls)==2: path.with_name(f'.{path.name}.{os.getpid()}.tmp').write_bytes(data[:len(data)//2])
                nth(true, path, data, error)
            in_files.write_atomic = half
        ask(tmp_path, maker=Maker(before=lambda name: die() if moment=='compute' and name=='r10' else None))
    assert in_child(work)==-signal.SIGKILL
    assert len(files(tmp_path))==2 and len(left(tmp_path))==(moment!='compute')
    rows,maker,said = ask(tmp_path)
    assert maker.made==NAMES[8:] and '8 rows found, 12 to compute' in said[-1] and not left(tmp_path)
    right(rows)

def test_kills_at_any_moment(tmp_path):
    "Killed again and again after a few milliseconds, until a run comes through"
    for wait in np.linspace(.005, .12, 12):
        p = in_child(lambda: ask(tmp_path, maker=Maker(before=lambda name: time.sleep(.003))), wait=0)
        time.sleep(wait)
        p.kill(); p.join(300)
        for path in files(tmp_path): read_shard(path, KEY)
    rows,_,_ = ask(tmp_path)
    right(rows)
    assert not left(tmp_path)

@contextmanager
def files_of_at_most(size):
    "A disk on which no file grows beyond `size` bytes"
    (soft,hard),old = resource.getrlimit(resource.RLIMIT_FSIZE),signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)); signal.signal(signal.SIGXFSZ, old)

@pytest.mark.parametrize('shared', [False, True])
def test_a_full_disk(tmp_path, shared):
    ask(tmp_path, NAMES[:4])
    size = files(tmp_path)[0].stat().st_size
    words = Words(folder='frames_folder')
    says = 'frames_folder: .*000002.safetensors: cannot be written .File too large.; free some space'
    with files_of_at_most(size//2), pytest.raises(NoPlace, match=says):
        ask(tmp_path, words=words, shared=shared)
    assert len(files(tmp_path))==1 and not left(tmp_path) and issubclass(NoPlace, ConfigError)
    rows,maker,_ = ask(tmp_path)
    assert maker.made==NAMES[4:]
    right(rows)

def test_no_space_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms.shutil, 'disk_usage', lambda path: SimpleNamespace(free=19*ROW))
    with pytest.raises(NoPlace, match='folder: .* has .* kB free, needed are'): ask(tmp_path)
    assert files(tmp_path)==[]

# ---------------------------------------------------------------- damage and strangers

def test_a_flipped_bit_anywhere_is_found(tmp_path):
    ask(tmp_path)
    path = files(tmp_path)[1]
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 25):
        raw = bytearray(whole)
        raw[at] ^= 1<<int(at)%8
        path.write_bytes(raw)
        rows,maker,said = ask(tmp_path)
        assert maker.made==NAMES[4:8] and len(said)==2, at
        assert str(path) in said[0] and 'removed, its rows are computed again' in said[0]
        right(rows)
        path = next(p for p in files(tmp_path) if 'r4' in map_shard(p, KEY).names)
        whole = path.read_bytes()

def test_a_shard_of_other_settings_is_not_read(tmp_path):
    other = settings_key('frames', side=65)
    ask(tmp_path)
    rows,maker,_ = ask(tmp_path, maker=Maker(salt=1), key=other)
    assert maker.made==NAMES
    right(rows, salt=1)
    files(tmp_path)[1].write_bytes(files(tmp_path, other)[1].read_bytes())
    rows,maker,said = ask(tmp_path)
    assert maker.made==NAMES[4:8] and f"belongs to another setting ('{other}' instead of '{KEY}')" in said[0]
    right(rows)
    _,_,said = ask(tmp_path, words=Words(format='vadnb-frames-1'))
    assert 'is no shard of this version (vadnb-rows-1 instead of vadnb-frames-1)' in said[0]

class Bomb:
    def __reduce__(self): return os.mkdir, (str(Bomb.path),)

def test_a_strangers_file_is_neither_run_nor_believed(tmp_path):
    Bomb.path = tmp_path/'ran'
    ask(tmp_path/'s')
    folder = Store(tmp_path/'s', KEY).folder
    meta = dict(format='vadnb-rows-1', key=KEY, digests='x y', bits='{}', checksum='0')
    one = dict(frame=torch.zeros(2, 8))
    (folder/'000091.safetensors').write_bytes(pickle.dumps(Bomb()))
    torch.save(dict(x=Bomb()), folder/'000092.safetensors')
    lies = [dict(digests='x'), dict(bits='{"no": [1]}'), dict(bits='[]'), dict(bits='{"frame": 3}'), {}]
    for k,change in enumerate(lies, 93):
        save_file(one, folder/f'0000{k}.safetensors', meta | change)
    save_file(one, folder/'000098.safetensors')
    (folder/'000099.safetensors').write_bytes(struct.pack('<Q', 1<<60)+b'{}')
    rows,maker,said = ask(tmp_path/'s')
    assert maker.made==[] and sum('removed, its rows' in line for line in said)==9 and not Bomb.path.exists()
    right(rows)
    (folder/'000050.safetensors').mkdir()
    with pytest.raises(NoPlace, match='000050.safetensors cannot be removed'): ask(tmp_path/'s')

def test_a_shard_that_vanishes_while_one_looks(tmp_path, monkeypatch):
    "Another store makes room between the listing and the opening"
    ask(tmp_path)
    gone,true = files(tmp_path)[2],rooms.read_shard
    def late(path, *words):
        if path==gone: path.unlink(missing_ok=True)
        return true(path, *words)
    monkeypatch.setattr(rooms, 'read_shard', late)
    rows,maker,said = ask(tmp_path)
    assert maker.made==NAMES[8:12] and len(said)==1
    right(rows)

# ---------------------------------------------------------------- limits

def test_a_limit_of_one_key(tmp_path):
    for k in range(0, 12, 4):
        ask(tmp_path, NAMES[k:k+4])
        os.utime(files(tmp_path)[-1], ns=(k, k))
    rows,_,said = ask(tmp_path, NAMES[12:], limit=12*ROW)
    assert 'removed 000001.safetensors, 000002.safetensors' in said[0]
    assert 'limit_gb sets how much may be kept' in said[0]
    assert sum(p.stat().st_size for p in files(tmp_path))<=12*ROW
    right(rows, NAMES[12:])
    with pytest.raises(OverLimit, match='limit_gb: 20 rows need about .*, allowed are .*; set limit_gb to'):
        ask(tmp_path, limit=19*ROW)
    assert len(files(tmp_path))==3

def test_one_limit_over_all_keys_while_many_write(tmp_path):
    "Six processes, each with keys of its own; somebody measures all the time"
    limit = 30*ROW
    def work(rank):
        for k in range(4):
            rows,_,_ = ask(tmp_path/'s', NAMES[:8], Maker(salt=k), f'{rank} {k}', limit=limit, shared=True)
            right(rows, NAMES[:8], k)
    group,most = [in_child(work, rank, wait=0) for rank in range(6)],0
    while any(p.is_alive() for p in group):
        size = 0
        for p in (tmp_path/'s').rglob('*'):
            try: size += p.stat().st_size*p.name.endswith(('.safetensors', '.tmp'))
            except FileNotFoundError: pass
        most = max(most, size)
    assert [p.exitcode for p in group]==[0]*6
    # a walk that meets a file before and another one after it made room may count both
    assert 15*ROW<most<=limit+4*ROW
    assert sum(p.stat().st_size for p in (tmp_path/'s').rglob('*.safetensors'))<=limit

def test_the_longest_unused_key_goes_first(tmp_path):
    def there(): return ''.join(k for k in 'abcd' if files(tmp_path, k))
    size = 4*ROW
    for key in 'abc':
        rows,_,_ = ask(tmp_path, NAMES[:4], key=key, limit=3*size, shared=True)
        time.sleep(.01)
    ask(tmp_path, NAMES[:4], key='a', limit=3*size, shared=True)
    held = files(tmp_path, 'a')[0].stat().st_size
    (files(tmp_path, 'b')[0].parent/'.000007.safetensors.1.tmp').write_bytes(bytes(held))        # of a kill
    _,_,said = ask(tmp_path, NAMES[:4], key='d', limit=4*held, shared=True)
    assert there()=='acd' and 'removed v1-b-' in said[-1] and not left(tmp_path)
    # a limit that became smaller holds from the next request on, whatever it asks for
    _,maker,_ = ask(tmp_path, NAMES[:4], key='a', limit=1.5*size, shared=True)
    assert there()=='a' and maker.made==[]
    with pytest.raises(OverLimit): ask(tmp_path, key='d', limit=19*ROW, shared=True)
    right(rows, NAMES[:4])            # of c, whose file is gone

def test_keys_bounded_one_by_one_leave_each_other_alone(tmp_path):
    for key in 'abc': ask(tmp_path, NAMES[:4], key=key, limit=5*ROW)
    assert all(files(tmp_path, key) for key in 'abc')
