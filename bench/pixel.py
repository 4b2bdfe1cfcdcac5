"What all metrics of the anomaly maps of one MVTec-sized class cost, image and pixel ones with AUPRO, against scikit-learn's area under one ROC curve of the pixels"
import time
from statistics import median
import numpy as np
from sklearn.metrics import roc_auc_score
from vadnb.metrics.pixel_anomaly import pixel_metrics

IMAGES,GOOD,SIDE,COARSE = 83,20,256,16 # the size of MVTec's bottle; maps are drawn coarse and enlarged, as a detector's are

def dataset(seed=0):
    "Smooth unbounded maps and masks of one to three boxes by name, brighter inside"
    rng = np.random.default_rng(seed)
    at = (np.arange(SIDE)+.5)*(COARSE-1)/SIDE
    low = at.astype(int)
    weight = np.zeros((SIDE, COARSE)); weight[np.arange(SIDE), low] = 1-(at-low); weight[np.arange(SIDE), low+1] += at-low
    maps,masks = {},{}
    for i in range(IMAGES):
        mask = np.zeros((SIDE, SIDE), bool)
        for _ in range(int(rng.integers(1, 4)) if i>=GOOD else 0): y,x = rng.integers(0, SIDE-64, 2); h,w = rng.integers(8, 64, 2); mask[y:y+h, x:x+w] = True
        maps[f'{i:03}'] = (weight@rng.gamma(4., size=(COARSE, COARSE))@weight.T+2*mask).astype(np.float32)
        masks[f'{i:03}'] = mask
    return maps, masks

def timed(f):
    start = time.perf_counter(); f()
    return time.perf_counter()-start

def rows(rounds=5):
    "One row: the median over rounds taken in turns, so that a busy moment hits both"
    maps,masks = dataset()
    s,y = (np.concatenate([v.ravel() for v in d.values()]) for d in (maps, masks))
    pairs = [(timed(lambda: pixel_metrics(maps, masks)), timed(lambda: roc_auc_score(y, s))) for _ in range(rounds+1)][1:] # the first round warms up
    ours,theirs = (median(t) for t in zip(*pairs))
    yield dict(work=f'image and pixel AUROC, AP, F1max and AUPRO of {IMAGES} maps of {SIDE}x{SIDE} against one roc_auc_score of the pixels', ratio=ours/theirs, limit=.6,
               detail=dict(vadnb_ms=round(ours*1e3, 1), sklearn_ms=round(theirs*1e3, 1), pixels=len(s), defective=int(y.sum()), rounds=rounds))

if __name__=='__main__':
    for row in rows(): print(row)
