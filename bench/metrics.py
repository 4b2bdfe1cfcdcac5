"What the frame metrics of a whole test set cost: all of them from one sort, against scikit-learn's area under one ROC curve"
import time
from statistics import median
import numpy as np
from sklearn.metrics import roc_auc_score
from vadnb.metrics.video_anomaly import frame_metrics

VIDEOS,ANOMALOUS,FRAMES,CLASSES,SNIPPET = 290,140,1_111_808,13,16 # the size of the UCF-Crime test set

def dataset(seed=0):
    "Scores, truth and classes by name, with lengths as uneven as the real ones; one event of a fifth of its video"
    rng = np.random.default_rng(seed)
    share = rng.lognormal(sigma=1.2, size=VIDEOS)
    lengths = np.maximum(144, (share*FRAMES/share.sum()).astype(int))
    lengths[np.argmax(lengths)] += FRAMES-lengths.sum()
    scores,truth,classes = {}, {}, {}
    for v,n in enumerate(lengths):
        name,y = f'video{v:03}', np.zeros(n, bool)
        if v<ANOMALOUS: start = int(rng.integers(0, n-n//5)); y[start:start+n//5] = True; classes[name] = f'class{v%CLASSES:02}'
        fine = rng.random(n, np.float32)+.3*y.astype(np.float32)
        scores[name],truth[name] = fine,y
    return scores, truth, classes

def timed(f):
    start = time.perf_counter(); f()
    return time.perf_counter()-start

def rows(rounds=7):
    "One row per kind of scores: the median over rounds taken in turns, so that a busy moment hits both"
    fine,truth,classes = dataset()
    y = np.concatenate([*truth.values()])
    for kind,scores in (('one score per frame', fine), ('scores of 16 frames', {k: np.repeat(s[::SNIPPET], SNIPPET)[:len(s)] for k,s in fine.items()})):
        s = np.concatenate([*scores.values()])
        pairs = [(timed(lambda: frame_metrics(scores, truth, classes=classes)), timed(lambda: roc_auc_score(y, s))) for _ in range(rounds+1)][1:] # the first round warms up
        ours,theirs = (median(t) for t in zip(*pairs))
        yield dict(work=f'all frame metrics and {CLASSES} classes, {VIDEOS} videos, {kind}, against one roc_auc_score', ratio=ours/theirs, limit=2,
                   detail=dict(vadnb_ms=round(ours*1e3, 1), sklearn_ms=round(theirs*1e3, 1), frames=len(s), rounds=rounds))

if __name__=='__main__':
    for row in rows(): print(row)
