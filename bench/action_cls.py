"An epoch whose visual tokens are kept against one that decodes clips and makes them; same losses"
import tempfile, time
from dataclasses import replace
from pathlib import Path
import torch
from vadnb.systems.action_cls.config import CacheConfig
from vadnb.systems.registry import load_config
from vadnb.train.optim import make_optimizer
from vadnb.worlds.directions import make_ucf_directions

WORDS = '''--data.train ["ucf/UCF-101"] --data.names ["clips"] --data.hold_out 0 --data.test [] --data.keep_gb 0 --model.vision false --model.merger false
    --train.batch_size 16 --train.progress false'''.split()

def epoch(cfg):
    "CPU-seconds of the second epoch, and the losses of both"
    torch.manual_seed(0)
    data = cfg.make_data()
    system = cfg.build(data.facts()).train()
    fed = system.feed(data, True)
    train,optimizer,losses = fed.split('train'), make_optimizer(cfg.optim, system.groups()), []
    for _ in range(2):
        start = time.process_time()
        for k in range(0, len(train), 16):
            loss = system.loss(fed.collate([train.draw(i, None) for i in range(k, min(k+16, len(train)))]))['loss']
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            losses.append(loss.item())
    return time.process_time()-start, losses

def rows():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_ucf_directions(Path(folder)/'ucf', groups=12, test_groups=1, clips=4)
        cfg = load_config('action_cls_demo', ['--data_root', folder, '--runs', folder, *WORDS])
        spent,curves = {}, {}
        for _ in range(2):
            for where in ('memory', 'off'):
                seconds,curves[where] = epoch(replace(cfg, cache=CacheConfig(where=where)))
                spent[where] = min(seconds, spent.get(where, seconds))
    if curves['memory']!=curves['off']:
        raise RuntimeError('kept visual tokens give another curve')
    yield dict(work='epoch with kept visual tokens vs without, tiny model', ratio=spent['memory']/spent['off'], limit=.6,
               detail={k: round(v, 2) for k,v in spent.items()})
