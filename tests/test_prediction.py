"What `predict` hands back: against slow references, on real videos, with odd sizes and uneven clocks, in bounded memory"
import csv, json, os, subprocess, sys, tracemalloc
from pathlib import Path
import numpy as np, pytest
from vadnb.core import CheckpointError, DataError, VideoError
from vadnb.worlds.stage import frame_labels
from vadnb.worlds.street_events import street_scene
from vadnb.data.video import VideoReader, numbered_frames, frame_number, write_video
from vadnb.results.record import Source, read_record
from vadnb.results.saving import save_results, signed_results
from vadnb.results.localization import connected, heat_box, heat_boxes, runs, smooth
from vadnb.results.video import VideoPrediction

def made_up(path, n, fps, seed=0, heat=True, name=None, threshold=.5, grid=(6, 8)):
    "Scores with one hump, three classes, a warm spot that wanders to the right"
    rng,t = np.random.default_rng(seed), np.arange(n)
    s = smooth(np.clip(.1+.8*np.exp(-((t-.6*n)/(.1*n))**2)+rng.normal(0, .03, n), 0, 1), 5)
    at = np.arange(min(3, n-1), n, 8)
    rows,cols = np.mgrid[:grid[0],:grid[1]]
    maps = np.stack([s[a]*np.exp(-((rows-grid[0]/2)**2+(cols-a/n*grid[1])**2)/3) for a in at])
    return VideoPrediction(name or Path(path).name, path, fps, ['Abuse', 'normal', 'Fighting'], np.stack([.3*s, 1-s, .7*s], 1), threshold, maps if heat else None, at if heat else None, s)

# ---------------------------------------------------------------- slow references

@pytest.mark.parametrize('window', [1, 3, 9, 41, 201])
def test_smooth_is_the_mean_of_the_frames_that_exist(window):
    x,r = np.random.default_rng(window).random(90).astype(np.float32), window//2
    np.testing.assert_allclose(smooth(x, window), [x[max(i-r, 0):i+r+1].astype(float).mean() for i in range(90)], rtol=1e-6)

def test_runs_and_segments_against_a_walk():
    rng = np.random.default_rng(0)
    for _ in range(40):
        s = np.round(rng.random(rng.integers(1, 60)), 1)
        found,start = [],None
        for i,v in enumerate([*(s>=.5), False]):
            if v and start is None: start = i
            if not v and start is not None: found.append((start, i)); start = None
        assert runs(s>=.5)==found
        p = VideoPrediction('a.mp4', 'a.mp4', 10, ['normal', 'x'], np.stack([1-s, s], 1), .5, scores=s)
        for got,(a,b) in zip(p.segments(), found, strict=True):
            assert (got['start'], got['end'], got['seconds'])==(a, b, [a/10, b/10])
            assert got['peak_frame']==a+int(np.argmax(s[a:b])) and got['peak']==pytest.approx(s[a:b].max()) and got['mean']==pytest.approx(s[a:b].mean())

def test_most_anomalous_takes_the_best_runs_once():
    rng = np.random.default_rng(1)
    for _ in range(40):
        s = rng.random(80).astype(np.float32)*.4
        p = VideoPrediction('a.mp4', 'a.mp4', 10, ['normal', 'x'], np.stack([1-s, s], 1), .5, scores=s)
        assert p.segments()==[]
        every = p.most_anomalous(1000)
        level = (np.median(s)+s.max())/2
        assert sorted((m['start'], m['end']) for m in every)==runs(s>=level)
        assert every[0]['peak_frame']==s.argmax() and [m['peak'] for m in every]==sorted((m['peak'] for m in every), reverse=True)
        assert p.most_anomalous(3)==every[:3] and p.most_anomalous(0)==[]

def test_heat_box_against_a_walk_over_cells():
    rng = np.random.default_rng(2)
    for _ in range(60):
        h,w = rng.integers(1, 9, 2)
        x = rng.random((h, w)).astype(np.float32)
        top = tuple(int(v) for v in np.unravel_index(x.argmax(), x.shape))
        seen,todo,warm = {top}, [top], x.max()-.4*(float(x.max())-float(x.min()))
        while todo:
            r,c = todo.pop()
            for q in ((r+1, c), (r-1, c), (r, c+1), (r, c-1)):
                if q not in seen and 0<=q[0]<h and 0<=q[1]<w and x[q]>=warm: seen.add(q); todo.append(q)
        rows,cols = zip(*seen)
        box,peak = heat_box(x, .6)
        start = np.zeros(x.shape, bool); start[top] = True
        assert {tuple(map(int, q)) for q in np.argwhere(connected(x>=warm, start))}==seen
        assert peak==x.max()
        assert box==(pytest.approx((min(cols)/w, min(rows)/h, (max(cols)+1)/w, (max(rows)+1)/h)) if x.max()>x.min() else None)

def test_a_map_without_a_range_has_no_box():
    assert heat_box(-np.ones((2, 2)))==(None, -1) and heat_box(np.ones((1, 1)))==(None, 1)
    assert heat_box(np.array([[-3, -1], [-3, -3]]))[0]==(.5, 0, 1, .5)

def test_boxes_of_many_maps_are_those_of_each():
    maps = np.random.default_rng(4).integers(0, 4, (50, 5, 7)).astype(np.float32)
    for share in (.1, .5, .75, 1):
        boxes,peaks = heat_boxes(maps, share)
        for m,b,p in zip(maps, boxes, peaks): assert heat_box(m, share)==(tuple(b) if b.any() else None, p)

# ---------------------------------------------------------------- real videos

@pytest.mark.parametrize('clip', ['ucf_crime/clips/Fighting033_x264_570_841.mp4', 'video/torchvision/v_SoccerJuggling_g23_c01.avi'])
def test_real_videos(shared, tmp_path, clip):
    video = shared/'data'/clip
    reader = VideoReader(video)
    n,stem = len(reader),video.stem
    p = made_up(video, n, reader.fps)
    files = p.save(tmp_path, overlay=True)
    assert sorted(f.name for f in files)==sorted(f.name for f in tmp_path.iterdir())==sorted(stem+e for e in ('.json', '.csv', '.png', '_heat.npz', '.layers.json', '_overlay.mp4'))
    found = json.loads(files[0].read_text())
    assert found['frames']==len(found['scores'])==n and found['fps']==reader.fps and found['segments'] and found['most_anomalous']
    for s in found['segments']+found['most_anomalous']:
        assert s['label']=='Fighting' and s['start']<=s['peak_frame']<s['end'] and s['box']==pytest.approx(p.box_at(s['peak_frame']), abs=1e-6)
    with open(files[1], newline='') as f: rows = list(csv.reader(f))
    assert rows[0]==['frame', 'seconds', 'score', 'Abuse', 'normal', 'Fighting'] and len(rows)==n+1
    np.testing.assert_allclose(np.array([r[2:] for r in rows[1:]], float), np.c_[p.scores, p.probabilities], atol=6e-7)
    assert files[2].read_bytes()[:4]==b'\x89PNG'
    drawn = VideoReader(files[5])
    h,w = reader.size
    assert len(drawn)==n and drawn.fps==pytest.approx(reader.fps) and drawn.size[1]==w and drawn.size[0]>h
    # far from any heat each drawn picture is the video's own of that number, and not its neighbour's
    at = [5, n//4, n-5]
    ours,theirs,next_ = (x.astype(int) for x in (drawn.get_batch(at)[:,:h//4], reader.get_batch(at)[:,:h//4], reader.get_batch([i+9 for i in at[:2]])[:,:h//4]))
    assert np.abs(ours-theirs).mean()<6 and all(np.abs(ours[k]-theirs[k]).mean()<np.abs(ours[k]-next_[k]).mean() for k in (0, 1))

def test_the_picture_shows_the_peak_frames(tmp_path):
    video = write_video(tmp_path/'n.mp4', numbered_frames(60), 10)
    p = made_up(video, 60, 10, heat=False)
    # two axes of the timeline, then one picture per peak
    shown = [im.get_array() for ax in p.figure().axes for im in ax.images]
    assert [frame_number(np.asarray(x)) for x in shown]==[s['peak_frame'] for s in p.peaks()]

def test_maps_of_one_video_share_a_scale(tmp_path):
    video = write_video(tmp_path/'n.mp4', numbered_frames(60), 10)
    s = np.zeros(60); s[10:14] = .9; s[40:44] = .8
    heat = np.stack([np.full((2, 2), .2), np.full((2, 2), .7)])
    heat[0,0,0] = -.1
    p = VideoPrediction('n.mp4', video, 10, ['normal', 'x'], np.stack([1-s, s], 1), .5, heat, [12, 42])
    maps = [ax.images[1] for ax in p.figure().axes if len(ax.images)==2]
    assert [(m.norm.vmin, m.norm.vmax) for m in maps]==[pytest.approx((.45, .7))]*2 and [float(m.get_array().max()) for m in maps]==pytest.approx([.2, .7])

# ---------------------------------------------------------------- odd inputs

@pytest.mark.parametrize('size', [(33, 49), (33, 50), (34, 49), (64, 96)])
def test_odd_sizes(tmp_path, size):
    frames = list(np.random.default_rng(0).integers(0, 255, (9, *size, 3), dtype=np.uint8))
    video = write_video(tmp_path/'a.mkv', frames, 10, pix_fmt='yuv444p')
    p = made_up(video, 9, 10, threshold=0)
    drawn = VideoReader(p.save(tmp_path/'out', overlay=True)[-1])
    assert len(drawn)==9 and drawn.size[1]==size[1]+size[1]%2 and drawn.size[0]%2==0

def test_uneven_clock_is_kept(tmp_path):
    times = np.cumsum([0, .04, .04, .2, .04, .1, .04, .04, .04, .3, .04, .04])
    video = write_video(tmp_path/'a.mp4', numbered_frames(12), 25, times=times)
    reader = VideoReader(video)
    assert reader.info.variable_rate
    drawn = VideoReader(made_up(video, 12, reader.fps).save(tmp_path/'out', overlay=True)[-1])
    np.testing.assert_allclose(drawn.timestamps, times, atol=2e-3)

def test_a_folder_of_frames(tmp_path):
    from PIL import Image
    (tmp_path/'pics').mkdir()
    for i,x in enumerate(numbered_frames(12)): Image.fromarray(x).save(tmp_path/'pics'/f'{i:03d}.png')
    p = made_up(tmp_path/'pics', 12, 8.)
    files = p.save(tmp_path/'out', overlay=True)
    drawn = VideoReader(files[-1])
    assert (len(drawn), drawn.fps)==(12, 8) and [f.name for f in files][0]=='pics.json'
    with pytest.raises(DataError, match='holds the frames that were predicted'): p.save(tmp_path/'pics')
    assert len(list((tmp_path/'pics').iterdir()))==12

def test_a_video_of_one_frame(tmp_path):
    video = write_video(tmp_path/'a.mp4', numbered_frames(1), 25)
    p = VideoPrediction('a.mp4', video, 25, ['normal', 'x'], [[.2, .8]], .5, np.array([[[0, 1]]]), [0])
    assert json.loads(p.save(tmp_path/'out', overlay=True)[0].read_text())['segments'][0]['box']==[.5, 0, 1, 1]

def test_names_of_any_kind(tmp_path):
    classes = ['normal', 'a, "b"', 'Überfall $x_1$', '<i>|']
    p = VideoPrediction('Straße, 5 $a_b$.mp4', tmp_path/'gone.mp4', 25, classes, np.tile([.1, .2, .6, .1], (5, 1)), .5)
    files = p.save(tmp_path)
    assert files[0].name=='Straße, 5 $a_b$.json' and json.loads(files[0].read_text())['classes']==classes
    with open(files[1], newline='', encoding='utf-8') as f: assert next(csv.reader(f))[3:]==classes
    assert '<i>' not in p._repr_html_() and next(p.overlay_frames(np.zeros((5, 20, 16, 3), np.uint8))).shape[1]==16

def test_values_beyond_zero_and_one_are_drawn_on_a_wider_scale():
    s = np.array([-1, .5, 3.])
    p = VideoPrediction('a.mp4', 'a.mp4', 1, ['normal', 'x'], np.full((3, 2), .5), .5, scores=s)
    bars = [((f[-1]==(213, 94, 0))|(f[-1]==(86, 180, 233))).all(-1).sum() for f in p.overlay_frames(np.zeros((3, 40, 200, 3), np.uint8))]
    assert bars==[0, 75, 199]             # (.5+1)/4 of 200; one column of the full bar is the threshold's tick

# ---------------------------------------------------------------- files

def test_saved_twice_the_bytes_are_equal(tmp_path):
    video = write_video(tmp_path/'a.mp4', numbered_frames(20), 25)
    first,second = (made_up(video, 20, 25).save(tmp_path/k, overlay=True) for k in 'xy')
    for a,b in zip(first, second, strict=True): assert a.read_bytes()==b.read_bytes(), a.name

def test_different_stems_never_share_a_file(tmp_path):
    names = [f'a{e}.mp4' for e in ('', '_heat', '_overlay', '_overlay_heat', '_heat_heat', '.json', '_overlay.mp4')]
    files = [f for name in names for f in made_up(tmp_path/'gone.mp4', 9, 25, name=name).files(tmp_path, overlay=True)]
    assert len(set(files))==len(files)==6*len(names)

def test_the_source_is_never_written_over(tmp_path):
    video = write_video(tmp_path/'a_overlay.mp4', numbered_frames(9), 25)
    before = video.read_bytes()
    with pytest.raises(DataError, match='is the video that was predicted'): made_up(video, 9, 25, name='a.mp4').save(tmp_path, overlay=True)
    assert video.read_bytes()==before and len(list(tmp_path.iterdir()))==1

def test_a_missing_video_costs_the_pictures_only(tmp_path):
    p = made_up(tmp_path/'gone.mp4', 30, 25)
    assert len(p.save(tmp_path/'out'))==5
    with pytest.raises(VideoError, match='gone.mp4'): p.save(tmp_path/'other', overlay=True)
    assert not (tmp_path/'other').exists()

def test_another_video_is_refused_before_anything_is_written(tmp_path):
    video = write_video(tmp_path/'a.mp4', numbered_frames(20), 25)
    for n in (19, 21):
        with pytest.raises(DataError, match=f'has 20 frames, the prediction {n}'): made_up(video, n, 25).save(tmp_path/'out')
    assert not (tmp_path/'out').exists()
    p = made_up(video, 20, 25)
    for n in (19, 21):
        with pytest.raises(DataError, match='frames'): write_video(tmp_path/'out'/'a.mp4', p.overlay_frames(numbered_frames(n)), 25)
    assert not list((tmp_path/'out').iterdir())

def test_a_refusing_disk_leaves_no_half_file(tmp_path, monkeypatch):
    video = write_video(tmp_path/'a.mp4', numbered_frames(20), 25)
    p,replace = made_up(video, 20, 25), os.replace
    for kind,error in (('.csv', CheckpointError), ('.png', CheckpointError), ('.npz', CheckpointError), ('.mp4', VideoError)):
        def refuse(a, b, kind=kind):
            if str(b).endswith(kind): raise OSError(28, 'No space left on device')
            replace(a, b)
        monkeypatch.setattr(os, 'replace', refuse)
        with pytest.raises(error, match='cannot be written'): p.save(tmp_path/kind, overlay=True)
        left = [f.name for f in (tmp_path/kind).iterdir()]
        assert not [f for f in left if f.startswith('.') or f.endswith(kind)] and 'a.json' in left

def test_videos_are_signed_and_saved_one_by_one(tmp_path):
    video = write_video(tmp_path/'a.mp4', numbered_frames(20), 25)
    come = [made_up(video, 20, 25), VideoError('b.mp4: is damaged'), made_up(video, 20, 25, name='a.avi', seed=1)]
    a,b,twin = save_results(signed_results(come, 'scorer', 'one', 'last'), tmp_path, tmp_path/'out', overlay=True)
    files = come[0].save(tmp_path/'other', overlay=True)
    assert [f.name for f in a.files]==[f.name for f in files] and a.lines==come[0].summary() and a.error is None
    # who says it stands in the record, and nothing else changes
    for x,y in zip(a.files, files): assert (x.read_bytes()==y.read_bytes())!=x.name.endswith('.layers.json'), x.name
    assert {s for s,_ in read_record(tmp_path/'out'/'a.layers.json').layers()}=={Source('scorer', 'one', 'last')}
    assert str(b.error)=='b.mp4: is damaged' and "'a.mp4' and 'a.avi' would both be written" in str(twin.error)

def test_a_video_that_is_gone_costs_its_overlay_and_no_other(tmp_path):
    video = write_video(tmp_path/'a.mp4', numbered_frames(20), 25)
    come = [made_up(tmp_path/'gone.mp4', 20, 25), made_up(video, 20, 25)]
    gone,there = save_results(come, tmp_path, tmp_path/'out', overlay=True)
    assert isinstance(gone.error, VideoError) and there.error is None and len(there.files)==6

# ---------------------------------------------------------------- long videos

def test_the_overlay_holds_a_few_frames_however_long_the_video(tmp_path):
    def peak(n):
        frame = np.zeros((120, 160, 3), np.uint8)
        video = write_video(tmp_path/f'{n}.mp4', (frame+i%200 for i in range(n)), 25)
        p,reader = made_up(video, n, 25), VideoReader(video)
        next(p.overlay_frames([frame]*n)); len(reader)                      # palettes and fonts are loaded once
        tracemalloc.start()
        write_video(tmp_path/'out.mp4', p.overlay_frames(x.copy() for x in reader), 25)    # copied, as a decoder's memory is not counted
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most/frame.nbytes
    short,long = peak(40), peak(200)
    assert long<24 and long<short+3, (short, long)

def test_an_hour_of_frames(tmp_path):
    n = 100_000
    p = np.zeros((n, 14), np.float32); p[:,0] = 1; p[50_000:50_100] = [.1, *[0]*11, .9, 0]
    files = VideoPrediction('hour.mp4', tmp_path/'gone.mp4', 30, ['normal', *map(str, range(13))], p, .5).save(tmp_path)
    found = json.loads(files[0].read_text())
    assert [(s['start'], s['end'], s['label']) for s in found['segments']]==[(50_000, 50_100, '11')] and len(found['scores'])==n
    with open(files[1]) as f: assert sum(1 for _ in f)==n+1

def test_needs_no_torch():
    code = "import sys, vadnb.results.video; print(*{'torch', 'transformers', 'matplotlib', 'av'}&set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()==''

def test_a_drawn_street_is_found_where_it_was_drawn(tmp_path):
    scene = street_scene(np.random.default_rng(3), 'Fighting')
    labels = frame_labels(scene)
    video = write_video(tmp_path/'s.mp4', scene.frames(), scene.fps)
    s = smooth(.1+.8*labels, 1)
    p = VideoPrediction('s.mp4', video, scene.fps, ['normal', 'Fighting'], np.stack([1-s, s], 1), .5)
    assert [(x['start'], x['end']) for x in p.segments()]==runs(labels)==[(e.start, e.end) for e in scene.events]
    assert [(x['start'], x['end']) for x in p.most_anomalous()]==runs(labels)
