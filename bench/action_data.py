"Action classification's data: annotation to conversations, frames to patches, each against what others do in the same work"
import json, tempfile
from pathlib import Path
import numpy as np
import torch
from bench._clock import cpu
from vadnb.data.action_files import entries_json
from vadnb.data.actions import ssv2_entries
from vadnb.data.patches import patchify

def best(works, repeats):
    "Least CPU-seconds of each work, in turn so that all have the same neighbours"
    return [min(t) for t in zip(*[[cpu(w)[0] for w in works] for _ in range(repeats)])]

def conversion(folder, rows=24777):
    "An annotation of Something-Something's size to a data set on disk, against reading it and writing what comes out"
    names = [f'Doing something with [something] in the way number {k} of many' for k in range(174)]
    labels,source,target = folder/'labels.json',folder/'validation.json',folder/'out.json'
    labels.write_text(json.dumps({n.replace('[', '').replace(']', ''): str(k) for k,n in enumerate(names)}))
    source.write_text(json.dumps([dict(id=str(k), label=f'doing cube number {k}', template=names[k*7%174], placeholders=['cube'])
                                  for k in range(rows)], indent=1))
    entries = ssv2_entries(source, labels, '/videos')
    def convert(): target.write_text(entries_json(ssv2_entries(source, labels, '/videos')))
    def plain():
        json.loads(source.read_text())
        target.write_text(json.dumps(entries, ensure_ascii=False))
    def indented():
        json.loads(source.read_text())
        target.write_text(json.dumps(entries, ensure_ascii=False, indent=2))
    ours,theirs = best([convert, plain], 5)
    pretty,text = cpu(indented)[0],target.read_text()
    convert()
    if target.read_text()!=text: raise AssertionError('the converter writes another text than json')
    yield dict(work=f'conversion of {rows:,} SSv2 rows vs json load + dump without indent', ratio=ours/theirs, limit=1.5,
               detail=dict(convert_cpu_s=round(ours, 3), json_cpu_s=round(theirs, 3), json_with_indent_cpu_s=round(pretty, 3)))

def patches():
    "16 frames of 240x320 resized and in patches, against the processor of transformers"
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    frames = np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    for pixels in (16384, 65536):
        processor = Qwen2VLVideoProcessor(size=dict(shortest_edge=3136, longest_edge=pixels), do_sample_frames=False, cap_pixels_per_frame=False)
        def theirs(): return processor([video], return_tensors='pt')
        def ours(): return patchify(frames, max_pixels=pixels)
        (rows,grid),out = ours(),theirs()
        if grid.tolist()!=out['video_grid_thw'][0].tolist() or (rows-out['pixel_values_videos']).abs().max()>1e-5:
            raise AssertionError('the patches are not those of the processor')
        a,b = best([ours, theirs], 15)
        yield dict(work=f'resize + patches of 16 frames 240x320 at {pixels:,} pixels vs transformers', ratio=a/b, limit=1.,
                   detail=dict(ours_ms=round(1e3*a, 2), processor_ms=round(1e3*b, 2)))

def rows():
    with tempfile.TemporaryDirectory() as folder: yield from conversion(Path(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield from patches()
    finally: torch.set_num_threads(threads)

if __name__=='__main__':
    for row in rows(): print(row)
