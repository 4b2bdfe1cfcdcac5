"What it costs to write the report of a run with many classes and many predictions, and how large it is"
import json, tempfile
from pathlib import Path
import numpy as np
from PIL import Image
from vadnb.core import write_json
from vadnb.report.example import made_up_run
from vadnb.report.report import write_report
from vadnb.results.images import ImagePrediction
from vadnb.results.saving import save_results
from vadnb.results.thresholds import Thresholds
from bench._clock import cpu

CLASSES,IMAGES,SIDE = 15,200,128
FIGURES = 'images', 'defective', 'image_auroc', 'image_ap', 'image_f1max', 'pixel_auroc', 'pixel_ap', 'pixel_f1max', 'aupro', 'mad', 'false_alarm_rate'

def of_classes(rng): return {f'class/class_{c:02}/{k}': round(float(rng.random()), 4) for c in range(CLASSES) for k in FIGURES}

def predict(folder, rng):
    "Two hundred images of fifteen classes with their maps, saved as the command line saves them"
    source,found = folder/'images', []
    for k in range(IMAGES):
        name = f'class_{k%CLASSES:02}/{k:03}.png'
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(source/name)
        found.append(ImagePrediction(name, str(source/name), (SIDE, SIDE), rng.random((16, 16), dtype=np.float32), 8, float(rng.random()), Thresholds(.9, .99, .05, 20), cls=f"class_{k%CLASSES:02}", class_by="its folder"))
    for saved in save_results(found, source, folder/'run'/'predictions', pictures='worst'):
        if saved.error: raise saved.error

def make(folder):
    rng,run = np.random.default_rng(0),made_up_run(folder/'run', n=1000)
    rows = [json.loads(line) for line in (run/'log.jsonl').read_text().splitlines()]
    rows = [r | of_classes(rng) if r['kind']=='valid' else r for r in rows]
    (run/'log.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    write_json(run/'eval.json', dict(checkpoint='step-001000', samples=IMAGES, noun='images', metrics=dict(auc=.93, **of_classes(rng))))
    predict(folder, rng)
    return run

def rows():
    with tempfile.TemporaryDirectory() as folder:
        run = make(Path(folder))
        seconds = min(cpu(lambda: write_report(run))[0] for _ in range(3))
        size = (run/'report.html').stat().st_size/1e6
    detail = dict(classes=CLASSES, predictions=IMAGES, megabytes=round(size, 2))
    yield dict(work=f'report of a run with {CLASSES} classes and {IMAGES} predictions', seconds=seconds, limit=5, detail=detail)
    yield dict(work='its size in MB', count=round(size, 2), limit=6, detail=detail)

if __name__=='__main__':
    for row in rows(): print(row)
