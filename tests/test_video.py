"The reader on real clips, on odd containers, on damage, and inside the machinery around it"
import json, os, pickle, subprocess, sys, tracemalloc
from pathlib import Path
import av # before decord, whose libraries would take the place of its own
import numpy as np
import pytest
from vadnb.core import VideoError
from vadnb.data import decoding, frame_sources, video_writing
from vadnb.data.container import upright
from vadnb.data.frame_sources import PyavFrames, decord_fault
from vadnb.data.video import VideoReader, frame_number, numbered_frames, probe, write_video

root = Path(__file__).resolve().parent.parent
numbers = lambda frames: [frame_number(x) for x in frames]

def definition(path, index=None, orientation=(False, False, False)):
    "Every frame by a plain PyAV loop, up to the first error"
    import av
    res = []
    with av.open(str(path)) as c:
        s = c.streams.best('video') if index is None else c.streams[index]
        try:
            for f in c.decode(s): res.append(upright(f.to_ndarray(format='rgb24'), orientation))
        except av.FFmpegError: pass
    return res

# name, frames, (height, width), index from packets, rotation
clips = [
    ('torchvision/v_SoccerJuggling_g23_c01.avi', 240, (240, 320), False, 0),
    ('torchvision/v_SoccerJuggling_g24_c01.avi', 251, (240, 320), False, 0),
    ('torchvision/RATRACE_wave_f_nm_np1_fr_goo_37.avi', 72, (240, 560), False, 0),
    ('ucf101/v_ApplyEyeMakeup_g01_c01.avi', 164, (240, 320), False, 0),
    ('mmaction2/demo.mp4', 280, (256, 340), True, 0),
    ('mmaction2/part_0.mp4', 32, (256, 340), True, 0),
    ('decord/video_90.mov', 3, (568, 320), True, -90),
    ('decord/unordered.mov', 4, (50, 50), True, 0),
    ('decord/flipping_a_pancake.mkv', 310, (240, 426), True, 0),
    ('moviepy/no_duration.webm', 74, (720, 1280), True, 0),
    ('torchcodec/nasa_13013.mp4', 390, (270, 480), True, 0),
    ('../ucf_crime/clips/Fighting033_x264_570_841.mp4', 271, (240, 320), True, 0),
    ('../ssv2/clips/task5_0.webm', 52, (240, 427), True, 0),
]

@pytest.mark.parametrize('name,frames,size,indexed,rotation', clips, ids=[Path(c[0]).name for c in clips])
def test_real_clip(shared, name, frames, size, indexed, rotation):
    path = shared/'data'/'video'/name
    reader = VideoReader(path, threads=1)
    assert (len(reader), reader.size, reader.backend) == (frames, size, 'pyav')
    assert (reader._source.facts.keys is not None) == indexed
    assert reader.info.rotation == rotation
    full = definition(path, orientation=(rotation==-90, False, rotation==-90))
    assert len(full) == frames
    idx = np.random.default_rng(0).integers(0, frames, 10)
    idx = np.concatenate([idx, [frames-1, 0, 0]])
    assert np.array_equal(reader.get_batch(idx), np.stack([full[i] for i in idx]))
    assert sum(1 for _ in reader) == frames
    t = reader.timestamps
    assert t.shape == (frames,) and (np.diff(t)>0).all()

def test_a_header_that_lies_is_reported(shared):
    info = probe(shared/'data/video/torchvision/RATRACE_wave_f_nm_np1_fr_goo_37.avi')
    assert info.frames==72 and info.problems==['the header announces 73 frames, 72 decode']

def test_a_clip_that_breaks_off(shared):
    path = shared/'data/video/decord/corrupted.mp4'
    for ask in (len, lambda r: r.get_batch([40]), lambda r: list(r)):
        with pytest.raises(VideoError, match=r'corrupted\.mp4: 28 of 50 announced frames decode.*re-encode or replace the file'): ask(VideoReader(path))
    kept = VideoReader(path, damaged='keep')
    assert len(kept)==28 and len(kept.info.problems)==1
    assert np.array_equal(kept.get_batch([27, 3]), np.stack([definition(path)[i] for i in (27, 3)]))
    with pytest.raises(VideoError, match='frame 28 was asked for, the video has 28 frames'): kept.get_batch([28])

def test_streams_and_timestamps(shared):
    path = shared/'data/video/torchcodec/nasa_13013.mp4'
    truth = json.loads((path.parent/'nasa_13013.mp4.stream3.all_frames_info.json').read_text())
    seconds = sorted(float(f['pts_time'] if 'pts_time' in f else f['pts_seconds']) for f in (truth['frames'] if isinstance(truth, dict) else truth))
    reader = VideoReader(path)
    assert reader._source.facts.stream==3 and reader.info.streams==2
    assert np.allclose(reader.timestamps, seconds, atol=1e-4)
    other = VideoReader(path, stream=0)
    assert other.size==(180, 320)
    assert np.array_equal(other.get_batch([100, 5]), np.stack([definition(path, 0)[i] for i in (100, 5)]))
    with pytest.raises(VideoError, match=r'stream 1 is not a video stream.*\[0, 3\]'): VideoReader(path, stream=1)

def test_decord_where_it_may(shared):
    pytest.importorskip('decord')
    path = shared/'data/video/mmaction2/demo.mp4'
    ours,theirs = VideoReader(path, threads=1),VideoReader(path, backend='decord', threads=1)
    idx = [200, 3, 3, 77]
    assert theirs.backend=='decord' and len(theirs)==len(ours)
    assert np.abs(ours.get_batch(idx).astype(int)-theirs.get_batch(idx)).mean()<1
    for name,why in (('decord/video_90.mov', 'turned'), ('torchcodec/nasa_13013.mp4', 'several video streams'), ('ucf101/v_ApplyEyeMakeup_g01_c01.avi', 'no presentation times')):
        with pytest.raises(VideoError, match=why): VideoReader(shared/'data/video'/name, backend='decord')

def test_decord_that_returns_other_frames_is_caught(tmp_path, monkeypatch):
    pytest.importorskip('decord')
    path = write_video(tmp_path/'a.mp4', numbered_frames(30))
    assert decord_fault(PyavFrames(path))==''
    other = frame_sources.decord_trial.replace('for i in sys.argv[2:]', 'for i in (0, 14, 29)')
    monkeypatch.setattr(frame_sources, 'decord_trial', other)
    assert 'differ' in decord_fault(PyavFrames(path))
    monkeypatch.setattr(frame_sources, 'decord_trial', 'while True: pass')
    assert 'did not answer' in decord_fault(PyavFrames(path), seconds=1)

def test_edit_list_hides_frames(tmp_path):
    import av
    source = write_video(tmp_path/'whole.mp4', numbered_frames(120), gop=40, options={'x264-params': 'scenecut=0'})
    path = tmp_path/'trimmed.mp4'
    with av.open(str(source)) as a, av.open(str(path), 'w', options={'avoid_negative_ts': 'disabled'}) as b:
        s = a.streams.video[0]; o = b.add_stream_from_template(s)
        for p in a.demux(s):
            if not p.size: continue
            p.pts -= 17*512; p.dts -= 17*512; p.stream = o
            b.mux(p)
    reader = VideoReader(path)
    assert len(reader)==103
    assert numbers(reader.get_batch([0, 50, 102]))==[17, 67, 119]

def test_an_edit_list_that_hides_whole_groups_is_no_damage(shared, tmp_path):
    "60 frames are announced and 45 shown: as players and PyAV have it; what is missing of those 45 is damage as before"
    path = shared/'cases'/'fgclip'/'edit_cut.mp4'
    full = definition(path)
    reader = VideoReader(path, threads=1)
    assert len(reader)==len(full)==45 and reader.info.problems==[]
    assert np.array_equal(reader.get_batch([44, 0, 20]), np.stack([full[i] for i in (44, 0, 20)]))
    # the last shown packet of the file, overwritten
    with av.open(str(path)) as c: last = max((p for p in c.demux(video=0) if p.size), key=lambda p: p.pos); at,n = last.pos,last.size
    data = bytearray(path.read_bytes()); data[at:at+n] = bytes(n)
    (tmp_path/'holed.mp4').write_bytes(data)
    with pytest.raises(VideoError, match=r'holed\.mp4: 42 of 45 announced frames decode'): len(VideoReader(tmp_path/'holed.mp4', threads=1))

def test_a_transport_stream_that_was_cut_is_damaged(shared, tmp_path):
    "One frame before the last is lost, so that every index behind it would be off by one"
    path = shared/'cases'/'fgclip'/'cut.ts'
    with pytest.raises(VideoError, match=r'cut\.ts: the file is cut short: 10,434 bytes are 55 packets of 188 bytes .*28 frames decode'): len(VideoReader(path))
    kept = VideoReader(path, damaged='keep')
    assert len(kept)==28 and 'cut short' in kept.info.problems[0]
    whole = write_video(tmp_path/'whole.ts', numbered_frames(30), gop=12)
    assert numbers(VideoReader(whole))==list(range(30)) and not VideoReader(whole).info.problems

@pytest.mark.parametrize('hflip,vflip', [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize('degrees', [0, 90, 180, -90])
def test_mirrored_pictures(tmp_path, monkeypatch, degrees, hflip, vflip):
    corner = np.zeros((64, 96, 3), np.uint8); corner[:20, :30] = 255
    add = video_writing.add_stream
    def mirrored(*args): s = add(*args); s.set_display_rotation(degrees, hflip=hflip, vflip=vflip); return s
    monkeypatch.setattr(video_writing, 'add_stream', mirrored)
    x = VideoReader(write_video(tmp_path/'a.mp4', [corner]*2)).get_batch([1])[0]
    # FFmpeg's flip negates the shown coordinates: the picture is turned first, then mirrored
    expected = np.rot90(corner, degrees//90)[::-1 if vflip else 1, ::-1 if hflip else 1]
    assert x.shape==expected.shape and np.abs(x.astype(int)-expected).mean()<8

def test_tilted_picture_is_refused(tmp_path):
    path = write_video(tmp_path/'a.mp4', numbered_frames(3), rotation=30)
    with pytest.raises(VideoError, match=r'a\.mp4: is to be shown turned by'): VideoReader(path)

@pytest.mark.parametrize('suffix,codec', [('mp4', 'libx264'), ('mkv', 'libx264'), ('avi', 'mpeg4'), ('webm', 'libvpx-vp9')])
def test_truncation_anywhere(tmp_path, suffix, codec):
    whole = write_video(tmp_path/f'whole.{suffix}', numbered_frames(60), codec=codec, gop=12).read_bytes()
    if suffix=='mp4': # the index in front, as for streaming: the file opens and only then turns out to be short
        front = tmp_path/'front.mp4'
        write_video(front, numbered_frames(60), gop=12)
        import av
        with av.open(str(front)) as a, av.open(str(tmp_path/'f.mp4'), 'w', options={'movflags': 'faststart'}) as b:
            s = a.streams.video[0]; o = b.add_stream_from_template(s)
            for p in a.demux(s):
                if p.size: p.stream = o; b.mux(p)
        whole = (tmp_path/'f.mp4').read_bytes()
    for share in (.02, .3, .5, .8, .97):
        path = tmp_path/f'cut.{suffix}'; path.write_bytes(whole[:int(len(whole)*share)])
        if suffix=='avi' and share==.97: # only the AVI index, which decoding can do without, is cut
            assert numbers(VideoReader(path))==list(range(60)); continue
        with pytest.raises(VideoError, match=rf'cut\.{suffix}: '): len(VideoReader(path))

@pytest.mark.parametrize('suffix,codec', [('mp4', 'libx264'), ('mkv', 'libx265'), ('avi', 'libx264'), ('avi', 'mpeg4'), ('webm', 'libvpx-vp9')])
def test_holes_never_shift_frames(tmp_path, suffix, codec):
    "Zeroed bytes anywhere: the frames asked for, or one error; nothing shorter, nothing shifted"
    whole = write_video(tmp_path/f'whole.{suffix}', numbered_frames(90), codec=codec, gop=12).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for k in range(12):
        at = int(rng.integers(len(whole)//20, len(whole)-400))
        path = tmp_path/f'hole{k}.{suffix}'; path.write_bytes(whole[:at]+bytes(400)+whole[at+400:])
        try: reader = VideoReader(path, threads=1); n,got = len(reader),numbers(reader.get_batch([5, 88, 40, 63]))
        except VideoError as e: refused += 1; assert str(e).startswith(str(path)) and '\n' not in str(e)
        else: assert (n, got)==(90, [5, 88, 40, 63])
    assert refused

def test_size_that_changes_midway(tmp_path):
    import av
    path = tmp_path/'a.ts'
    for size in ((64, 96), (48, 64)):
        part = write_video(tmp_path/f'{size[0]}.h264', numbered_frames(10, size))
    (tmp_path/'joined.h264').write_bytes((tmp_path/'64.h264').read_bytes()+(tmp_path/'48.h264').read_bytes())
    with pytest.raises(VideoError, match=r'joined\.h264: frame 10 is 48x64, frame 0 is 64x96'): list(VideoReader(tmp_path/'joined.h264', threads=1))

def test_things_that_are_no_video(tmp_path):
    (tmp_path/'text.mp4').write_text('hello'); (tmp_path/'zero.mp4').touch(); (tmp_path/'empty').mkdir(); os.mkfifo(tmp_path/'pipe.mp4')
    (tmp_path/'list.m3u8').write_text('#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/x.ts\n')
    (tmp_path/'list.ffconcat').write_text('ffconcat version 1.0\nfile /etc/hostname\n')
    for p in [*tmp_path.iterdir(), Path('/dev/zero'), tmp_path/'missing.mp4']:
        with pytest.raises(VideoError) as e: VideoReader(p)
        assert str(e.value).startswith(str(p)) and '\n' not in str(e.value)

def test_audio_only(tmp_path):
    import av
    with av.open(str(tmp_path/'a.mp4'), 'w') as c:
        s = c.add_stream('aac', rate=8000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono'); f.rate = 8000
        c.mux(s.encode(f)); c.mux(s.encode())
    with pytest.raises(VideoError, match='no video stream'): VideoReader(tmp_path/'a.mp4')

def test_folder_order_gaps_and_faults(tmp_path):
    from PIL import Image
    frames = list(numbered_frames(12))
    def folder(name, names):
        (tmp_path/name).mkdir()
        for n,x in zip(names, frames): Image.fromarray(x).save(tmp_path/name/n)
        return tmp_path/name
    mixed = folder('mixed', [f'img_{i}.{"png" if i%2 else "bmp"}' for i in range(12)])
    (mixed/'notes.txt').write_text('no frame'); (mixed/'.hidden.png').write_text('no frame')
    reader = VideoReader(mixed, fps=5)
    assert numbers(reader.get_batch([11, 2, 10, 2]))==[11, 2, 10, 2]
    assert (reader.backend, len(reader), reader.fps, reader.size)==('folder', 12, 5.0, (64, 96))
    with pytest.raises(VideoError, match=r'(1|01)\.png and (1|01)\.png are the same frame'): VideoReader(folder('twice', ['1.png', '01.png']))
    bad = folder('bad', ['1.png', '2.png', '3.png']); (bad/'2.png').write_bytes(b'not a picture')
    with pytest.raises(VideoError, match=r'2\.png: cannot be read as a picture'): VideoReader(bad).get_batch([1])
    deep = folder('deep', []); Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep/'1.png')
    with pytest.raises(VideoError, match='8-bit'): VideoReader(deep)

def test_only_the_frames_asked_for_are_held(tmp_path):
    path = write_video(tmp_path/'a.mp4', numbered_frames(200, (240, 320)))
    one = 240*320*3
    reader = VideoReader(path, threads=1); len(reader)
    for use,limit in ((lambda: reader.get_batch([0, 66, 133, 199]), 7), (lambda: [None for _ in reader], 4), (lambda: [None for _ in reader.chunks(5)], 14)):
        tracemalloc.start(); use(); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert peak<limit*one

def squashed(frames, size):
    from vadnb.data.transforms import squash
    return squash(frames, size).permute(0, 2, 3, 1).numpy()

@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    "One video for each way there is to frames: packet table, sequential, turned, folder"
    from PIL import Image
    folder = tmp_path_factory.mktemp('kinds')
    (folder/'pictures').mkdir()
    for i,x in enumerate(numbered_frames(40)): Image.fromarray(x).save(folder/'pictures'/f'{i}.png')
    return {'indexed': write_video(folder/'a.mp4', numbered_frames(40), gop=12),
            'sequential': write_video(folder/'a.avi', numbered_frames(40), codec='mpeg4', bit_rate=400_000),
            'turned': write_video(folder/'turned.mp4', numbered_frames(40), rotation=90), 'folder': folder/'pictures'}

ORDERS = {'rising': [0, 3, 3, 17, 39], 'falling': [39, 17, 3, 3, 0], 'mixed': [5, 31, 5, 0, 38, 31, 5], 'one': [20], 'none': []}

@pytest.mark.parametrize('size', [None, (64, 96), (96, 64), (24, 40), (100, 130)], ids=str)
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('kind', ['indexed', 'sequential', 'turned', 'folder', 'decord'])
def test_stream_is_get_batch_and_the_resize_of_training(kinds, kind, order, size):
    if kind=='decord': pytest.importorskip('decord')
    backend = 'decord' if kind=='decord' else 'auto'
    reader = VideoReader(kinds['indexed' if kind=='decord' else kind], backend=backend, threads=1)
    index = np.array(ORDERS[order], int)
    got,want = list(reader.stream(index, size)), reader.get_batch(index)
    if size is not None: want = squashed(want, size)
    assert len(got)==len(index)
    assert all(x.dtype==np.uint8 and x.flags.c_contiguous and np.array_equal(x, y) for x,y in zip(got, want))
    planes = list(reader.stream(index, size, planes=True))
    assert len(planes)==len(got) and all(np.array_equal(p.transpose(1, 2, 0), y) for p,y in zip(planes, want))
    quick = list(reader.stream(index, size, resize='swscale'))
    assert [x.shape for x in quick]==[x.shape for x in got]
    # the ruler is read upright
    if kind!='turned': assert numbers(quick)==index.tolist()

def test_a_frame_streamed_twice_may_be_written_into(kinds):
    frames = VideoReader(kinds['indexed']).stream([7, 7, 7], (48, 64))
    first = next(frames)
    right = first.copy()
    first[:] = 0
    assert all(np.array_equal(x, right) for x in frames)

@pytest.mark.parametrize('kind', ['indexed', 'folder'])
def test_each_frame_is_read_once_and_no_further_than_needed(kinds, monkeypatch, kind):
    reader = VideoReader(kinds[kind])
    asked,given,read = [], [], reader._source.read
    def counted(wanted, size=None):
        asked.append(wanted.tolist())
        for i,x in read(wanted, size):
            given.append(i)
            yield i,x
    monkeypatch.setattr(reader._source, 'read', counted)
    frames = reader.stream([9, 4, 9, 30], (24, 40))
    assert not asked
    assert numbers([next(frames), next(frames)])==[9, 4] and given==[4, 9]
    assert numbers(frames)==[9, 30] and asked==[[4, 9, 30]] and given==[4, 9, 30]

def test_stream_refuses_what_get_batch_refuses(kinds):
    reader = VideoReader(kinds['indexed'])
    for bad in ([-1], [40], [3, 400], [1.], [True], [[1]]):
        with pytest.raises(VideoError) as plain: reader.get_batch(bad)
        with pytest.raises(VideoError) as streamed: reader.stream(bad, (24, 40))
        assert str(streamed.value)==str(plain.value)
    for size in ((0, 4), (4, -1), (4,), (4, 4, 3)):
        with pytest.raises(ValueError, match='positive'): reader.stream([0], size)
    with pytest.raises(VideoError, match='use squash or swscale'): reader.stream([0], (4, 4), resize='swsacle')

def test_stream_notices_the_end_of_a_file_that_was_not_counted(tmp_path):
    path = write_video(tmp_path/'a.avi', numbered_frames(40), codec='mpeg4', bit_rate=400_000)
    frames = VideoReader(path).stream([3, 40], (24, 40))
    assert frame_number(next(frames))==3
    with pytest.raises(VideoError, match=r'a\.avi: frame 40 was asked for, the video has 40 frames'): next(frames)

@pytest.mark.parametrize('resize', ['squash', 'swscale'])
@pytest.mark.parametrize('order', [1, -1])
def test_stream_holds_one_source_frame(tmp_path, resize, order):
    path = write_video(tmp_path/'a.mp4', numbered_frames(200, (240, 320)))
    one,index = 240*320*3, np.arange(0, 200, 2)[::order]
    reader = VideoReader(path, threads=1); len(reader)
    next(reader.stream([0], (24, 32), resize=resize)) # what the first call imports is not counted
    tracemalloc.start()
    kept = list(reader.stream(index, (24, 32), resize=resize))
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert numbers(kept)==index.tolist() and peak<(len(kept)+20)*24*32*3+(3 if resize=='squash' else 0)*one+300_000

def test_previews_are_no_larger_than_they_are_looked_at(kinds):
    reader = VideoReader(kinds['turned'])
    assert reader.size==(96, 64) and np.array_equal(reader.previews([3, 1]), reader.get_batch([3, 1]))
    assert reader.previews([3, 1, 3], 48).shape==(3, 48, 32, 3) and reader.previews([]).shape==(0, 96, 64, 3)
    assert VideoReader(kinds['folder']).previews([2], 16).shape==(1, 16, 24, 3)

def test_loader_workers(tmp_path):
    import torch
    path = write_video(tmp_path/'a.mp4', numbered_frames(60), gop=12)
    reader = VideoReader(path); first = next(iter(reader)) # the parent has decoded before the fork
    class Frames(torch.utils.data.Dataset):
        def __len__(self): return 12
        def __getitem__(self, i):
            fresh = VideoReader(path)
            assert fresh._source.threads==1
            return frame_number(reader.get_batch([i*5])[0]), frame_number(fresh.get_batch(torch.tensor([i*5]))[0])
    got = torch.cat([torch.stack(b, 1) for b in torch.utils.data.DataLoader(Frames(), batch_size=3, num_workers=2)])
    assert got.tolist()==[[i*5]*2 for i in range(12)] and frame_number(first)==0

def test_facts_follow_the_file(tmp_path):
    path = write_video(tmp_path/'a.mp4', numbered_frames(20)); assert len(VideoReader(path))==20
    write_video(path, numbered_frames(33)); assert len(VideoReader(path))==33
    old = VideoReader(path); new = pickle.loads(pickle.dumps(old))
    assert numbers(new.get_batch([32, 1]))==[32, 1]

def test_a_file_without_a_table_need_not_be_counted(tmp_path, monkeypatch):
    path = write_video(tmp_path/'a.avi', numbered_frames(40), codec='mpeg4', bit_rate=400_000)
    with monkeypatch.context() as m:
        def refuse(*args): raise AssertionError('counted')
        m.setattr(decoding, 'take_census', refuse)
        assert numbers(VideoReader(path).get_batch([30, 2]))==[30, 2]
    with pytest.raises(VideoError, match=r'a\.avi: frame 40 was asked for, the video has 40 frames'): VideoReader(path).get_batch([3, 40])

def test_import_is_light():
    code = "import sys, vadnb.data.video; print([m for m in ('torch', 'av', 'decord', 'PIL', 'matplotlib') if m in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert r.stdout.strip()=='[]', r.stdout+r.stderr

def test_writer_reads_one_frame_at_a_time(tmp_path):
    alive = 0
    class Counted(np.ndarray):
        def __del__(self): nonlocal alive; alive -= 1
    def frames():
        nonlocal alive
        for x in numbered_frames(50):
            alive += 1; assert alive<=4
            yield x.view(Counted)
            del x
    assert len(VideoReader(write_video(tmp_path/'a.mp4', frames())))==50

@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'avi'])
def test_names_and_tags_that_are_not_utf8(tmp_path, suffix):
    "A title in Latin-1 inside the file, and bytes that are no text in its name: the frames are what they were"
    import av
    plain,path = tmp_path/f'plain.{suffix}', Path(os.fsdecode(os.fsencode(tmp_path)+b'/caf\xe9.'+suffix.encode()))
    with av.open(str(plain), 'w') as c:
        c.metadata['title'] = 'Tag in Latin-one'
        s = c.add_stream('mpeg4' if suffix=='avi' else 'libx264', rate=25)
        s.width,s.height,s.pix_fmt = 96,64,'yuv420p'
        for x in numbered_frames(30): c.mux(s.encode(av.VideoFrame.from_ndarray(x, format='rgb24')))
        c.mux(s.encode())
    data = plain.read_bytes()
    assert data.count(b'Tag in Latin-one')==1
    path.write_bytes(data.replace(b'Tag in Latin-one', b'Caf\xe9 \xfcber \xff\xfe....'))
    reader = VideoReader(path, threads=1)
    assert numbers(reader)==list(range(30)) and numbers(reader.get_batch([7, 29, 0]))==[7, 29, 0]
    assert not probe(path).problems

@pytest.mark.parametrize('name', ['a\0.mp4', 'a'*5000+'.mp4', '\ud83d.mp4', 'loop.mp4'])
def test_what_cannot_be_a_name_is_one_line(tmp_path, name):
    (tmp_path/'loop.mp4').symlink_to('loop.mp4')
    with pytest.raises(VideoError) as e: VideoReader(tmp_path/name)
    assert '\n' not in str(e.value) and len(str(e.value))<500
