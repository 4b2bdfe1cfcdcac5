"What the metrics of a whole test set of anomaly maps cost, 15 classes of them, beside one sort of all pixels and beside binning"
import json, resource, subprocess, sys, warnings
from pathlib import Path
import numpy as np
from bench._clock import cpu
from vadnb.metrics.anomaly_maps import component_runs
from vadnb.metrics.pixel_anomaly import pixel_metrics
from vadnb.metrics.pixel_stream import StreamingPixelMetrics

IMAGES,SIDE,COARSE,CLASSES,BINS = 1725,224,14,15,1000 # the size of MVTec's test set; maps are drawn coarse and enlarged

def dataset(seed=0):
    "Maps, masks and classes by name; three images of four have one to three boxes, brighter inside"
    rng = np.random.default_rng(seed)
    at = (np.arange(SIDE)+.5)*(COARSE-1)/SIDE
    low = at.astype(int)
    weight = np.zeros((SIDE, COARSE))
    weight[np.arange(SIDE), low] = 1-(at-low)
    weight[np.arange(SIDE), low+1] += at-low
    maps,masks = {}, {}
    for i in range(IMAGES):
        mask = np.zeros((SIDE, SIDE), bool)
        for _ in range(int(rng.integers(1, 4)) if i%4 else 0):
            (y,x),(h,w) = rng.integers(0, SIDE-64, 2), rng.integers(8, 64, 2)
            mask[y:y+h, x:x+w] = True
        maps[f'{i:04}'] = (weight@rng.gamma(4., size=(COARSE, COARSE))@weight.T+2*mask).astype(np.float32)
        masks[f'{i:04}'] = mask
    return maps, masks, {name: str(k%CLASSES) for k,name in enumerate(maps)}

def one_sort(maps, masks, classes): np.argsort(np.concatenate([m.ravel() for m in maps.values()]))
def exact(maps, masks, classes): return pixel_metrics(maps, masks, None, classes)['pooled/aupro']

def streamed(maps, masks, classes):
    res = StreamingPixelMetrics()
    for k in maps: res.add(k, maps[k], masks[k], None, classes[k])
    return res.compute()['pooled/aupro']

def binned(maps, masks, classes):
    "As libraries for a GPU do it: the range is looked for, then every map is counted in as many bins for ordinary pixels and for each component"
    low,high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
    normal,overlap,components = np.zeros(BINS), np.zeros(BINS), 0
    for k,m in maps.items():
        at,mask = ((m-low)*((BINS-1)/(high-low))).astype(np.int32), masks[k]
        normal += np.bincount(at[~mask], minlength=BINS)
        if not mask.any(): continue
        tree,length,n = component_runs(mask)
        tree = np.repeat(tree, length)
        overlap += np.bincount(at[mask], weights=1/np.bincount(tree)[tree], minlength=BINS)
        components += n
    rate,pro = (np.cumsum(h[::-1])/h.sum() for h in (normal, overlap))
    return float(np.trapezoid(np.append(pro[rate<=.3], np.interp(.3, rate, pro)), np.append(rate[rate<=.3], .3))/.3)

WAYS = dict(sort=one_sort, exact=exact, streamed=streamed, binned=binned)

def measured(way):
    "CPU-seconds, GiB added at most and AUPRO, in a process of its own, since the peak of a process never falls"
    run = subprocess.run([sys.executable, '-m', 'bench.pixel_classes', way], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    if run.returncode: raise RuntimeError(f'{way}: {run.stderr.strip().splitlines()[-1]}')
    return json.loads(run.stdout.splitlines()[-1])

def rows():
    found = {way: measured(way) for way in WAYS}
    seconds,gib,aupro = ({k: v[i] for k,v in found.items()} for i in range(3))
    detail = {f'{k}_cpu_s': round(v, 2) for k,v in seconds.items()} | dict(apart=abs(aupro['streamed']-aupro['exact']), binned_apart=abs(aupro['binned']-aupro['exact']))
    size = f'{IMAGES:,} maps of {SIDE}x{SIDE} in {CLASSES} classes'
    if detail['apart']>1e-6: raise AssertionError(f"AUPRO of streamed maps is {detail['apart']:.1e} away")
    yield dict(work=f'exact metrics of {size} vs one argsort of all pixels', ratio=seconds['exact']/seconds['sort'], limit=5, detail=detail)
    yield dict(work='the same: GiB added beside the maps', ratio=gib['exact'], limit=1.5, detail={f'{k}_gib': round(v, 2) for k,v in gib.items()})
    yield dict(work='the same, one map at a time, AUPRO within 1e-6, vs one argsort', ratio=seconds['streamed']/seconds['sort'], limit=3, detail=detail)
    yield dict(work=f'the same, one map at a time, vs {BINS:,} bins of equal width, pooled AUPRO alone', ratio=seconds['streamed']/seconds['binned'], limit=8, detail=detail)

if __name__=='__main__':
    given,held = dataset(), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    before = held()
    warnings.simplefilter('ignore')
    seconds,value = cpu(lambda: WAYS[sys.argv[1]](*given))
    print(json.dumps([seconds, held()-before, value]))
