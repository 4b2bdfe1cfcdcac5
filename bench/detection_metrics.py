"What the figures of temporal detection cost: mAP against a walk over data frames, suppression against a loop per label"
import time, warnings
from statistics import median
import numpy as np
from vadnb.metrics.detection import detection_map, soft_nms

VIDEOS,CLASSES,EVENTS,FOUND = 60, 19, 786, 24_665 # the size of the large golden case
TIOUS = (.3, .4, .5, .6, .7)

def dataset(seed=0):
    "Detections around events and out of nowhere, and the events, by video"
    rng = np.random.default_rng(seed)
    length,truth = rng.uniform(60, 900, VIDEOS), {f'video{v:02}': [] for v in range(VIDEOS)}
    for v in rng.integers(0, VIDEOS, EVENTS):
        start = rng.uniform(0, length[v]-20)
        truth[f'video{v:02}'].append((f'class{rng.integers(0, CLASSES):02}', start, start+rng.lognormal(1.5, .8)))
    found = {v: [] for v in truth}
    for i in range(FOUND):
        v = i%VIDEOS; own = truth[f'video{v:02}']
        if own and rng.random()<.6:
            label,a,b = own[rng.integers(len(own))]
            a,b = np.array([a, b])+rng.normal(0, .3*(b-a), 2)
        else: label,a,b = f'class{rng.integers(0, CLASSES):02}', *(rng.uniform(0, length[v])+np.array([0, 5]))
        found[f'video{v:02}'].append((label, float(a), float(max(a+.1, b)), float(rng.random())))
    return found, truth

def walk(rows, groups):
    "One step per detection, in falling order of score: overlaps with the events of its video, tried from the highest at every threshold"
    used = {v: np.zeros((len(TIOUS), len(g))) for v,g in groups.items()}
    hit = np.zeros((len(TIOUS), len(rows)))
    for i,(video,start,end) in enumerate(rows):
        if video not in groups: continue
        g = groups[video]
        g = g[['start', 'end']].values
        shared = (np.minimum(g[:,1], end)-np.maximum(g[:,0], start)).clip(0)
        iou = shared/np.maximum(g[:,1]-g[:,0]+end-start-shared, 1e-8)
        for t,tiou in enumerate(TIOUS):
            for j in iou.argsort()[::-1]:
                if iou[j]<tiou: break
                if not used[video][t,j]: used[video][t,j] = hit[t,i] = 1; break
    return hit

def precision(hit, events):
    "Interpolated average precision from hits in order"
    p = np.maximum.accumulate((hit.cumsum(1)/np.arange(1, hit.shape[1]+1))[:,::-1], 1)[:,::-1]
    return (p*hit).sum(1)/events

def by_frames(found, truth):
    "Data frames as OpenTAD has them: a row at a time, and the events of its video by group"
    import pandas as pd
    frame = lambda d, names: pd.DataFrame([(v, *r) for v,rows in d.items() for r in rows], columns=['video', 'label', *names])
    f,g = frame(found, ['start', 'end', 'score']), frame(truth, ['start', 'end'])
    ap = []
    for label,own in g.groupby('label'):
        mine = f[f.label==label].sort_values('score', ascending=False).reset_index(drop=True)
        class Groups(dict):
            def __contains__(self, v): return v in known.groups
            def __getitem__(self, v): return known.get_group(v).reset_index()
            def items(self): return ((v, known.get_group(v)) for v in known.groups)
        known = own.groupby('video')
        class Rows:
            def __len__(self): return len(mine)
            def __iter__(self): return ((r['video'], r['start'], r['end']) for _,r in mine.iterrows())
        ap.append(precision(walk(Rows(), Groups()), len(own)))
    return np.mean(ap, 0)

def candidates(seed=0, n=2000, classes=20, seconds=300):
    "Segments of one long video, of all labels"
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, seconds, classes*n).astype(np.float32)
    return (np.stack([start, start+rng.lognormal(1.2, 1, classes*n).astype(np.float32)], 1),
            rng.beta(.5, 4, classes*n).astype(np.float32), np.repeat(np.arange(classes), n))

def by_label(segments, scores, labels, sigma):
    "Gaussian suppression of one label after the other: the best to the front, then one update of all behind it"
    res = []
    for c in np.unique(labels):
        start,end = segments[labels==c].T.copy()
        score,length = scores[labels==c].copy(), end-start+np.float32(1e-6)
        for i in range(len(score)):
            m = i+score[i:].argmax()
            for x in (start, end, score, length): x[i],x[m] = x[m],x[i]
            shared = np.minimum(end[i], end[i+1:])-np.maximum(start[i], start[i+1:])
            np.maximum(shared, 0, out=shared)
            iou = shared/(length[i]+length[i+1:]-shared)
            score[i+1:] *= np.exp(-iou*iou/sigma)
        res.append(score)
    return np.sort(np.concatenate(res))[::-1]

def seconds(f):
    "CPU-seconds, so that other work on the machine counts little, and what came out"
    start = time.process_time(); res = f()
    return time.process_time()-start, res

def rows(rounds=3):
    "Rivals and ours in turns; the slow walk once"
    warnings.simplefilter('ignore')
    found,truth = dataset()
    slow,want = seconds(lambda: by_frames(found, truth))
    times,got = zip(*(seconds(lambda: detection_map(found, truth, TIOUS)) for _ in range(rounds+1)))
    assert np.allclose([got[0][f'map/{t:g}'] for t in TIOUS], want), 'both must find the same'
    yield dict(work=f'mAP, {FOUND} detections at {len(TIOUS)} tIoU, recall and baselines included, against a walk over data frames',
               ratio=median(times[1:])/slow, limit=.01, detail=dict(vadnb_ms=round(median(times[1:])*1e3, 1), walk_s=round(slow, 2)))
    many = {f'{v}-{k}': own for k in range(16) for v,own in found.items()}, {f'{v}-{k}': own for k in range(16) for v,own in truth.items()}
    yield dict(work=f'mAP, {16*FOUND} detections at {len(TIOUS)} tIoU, CPU-seconds', seconds=median(seconds(lambda: detection_map(*many, TIOUS))[0] for _ in range(rounds)), limit=1)
    x = candidates()
    pairs = [(seconds(lambda: soft_nms(*x, sigma=.7)), seconds(lambda: by_label(*x, .7))) for _ in range(rounds)]
    (_,ours),(_,theirs) = pairs[0]
    assert np.allclose(ours[1], theirs, rtol=1e-3, atol=1e-6), 'both must leave the same scores'
    ours,theirs = (median(t for t,_ in p) for p in zip(*pairs))
    yield dict(work='Gaussian soft-NMS, 20 labels of 2000, none pruned, against a loop per label', ratio=ours/theirs, limit=.25, detail=dict(vadnb_ms=round(ours*1e3, 1), loop_ms=round(theirs*1e3, 1), rounds=rounds))

if __name__=='__main__':
    for row in rows(): print(row)
