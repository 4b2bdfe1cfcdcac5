"How often a training step makes the host wait for a GPU, counted on one that is not there: loss and backward pass"
import sys, tempfile
from pathlib import Path
import torch
from vadnb.systems.registry import load_config
from vadnb.train.feed import to_device
from vadnb.worlds.directions import make_ucf_directions
from vadnb.worlds.motions import make_motions
from vadnb.worlds.street import street_world
from vadnb.worlds.textures import texture_world

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tests'))
from pretend_cuda import DEVICE, pretend_cuda

# both banks and every loss; features from images, not from a cache
FGCLIP = '''--loss.background_weight 1 --loss.quiet_weight 1 --bank.regions 16 --bank.clips 16 --bank.warmup 0
    --train.batch_size 4'''.split()
UNIAD = '--data.cache off --train.batch_size 4'.split()
# colours are changed on the device
ADATAD = '--cache.use false --augment.use true --train.batch_size 4 --data.window 64'.split()

# the tower trains; what is still asked is whether a text is padded
ACTIONS = '''--data.train ["UCF-101"] --data.names ["clips"] --data.hold_out 0 --data.test [] --train.batch_size 4'''.split()

def waits(cfg):
    "Waits of the second step, which reads the banks"
    torch.manual_seed(0)
    data = cfg.make_data()
    system = cfg.build(data.facts())
    system.start(True)
    train = data.split('train')
    with pretend_cuda() as device:
        system.to(DEVICE).train()
        for k in (0, 4):
            batch = to_device(data.collate([train[i] for i in range(k, k+4)]), DEVICE)
            device.waits.clear()
            system.loss(batch)['loss'].backward()
            found = device.total
            system.after_step()
    return found

def rows():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        street = street_world(folder/'street', videos=8, valid_videos=4, test_videos=2, size=(48, 64), frames=(32, 36))
        textures = texture_world(folder/'textures', ['dots'], train=16, good=2, defective=2, size=(96, 96))
        motions = make_motions(folder/'motions', videos=8, valid_videos=1, test_videos=1, frames=(150, 160), rounds=(2, 3),
                               rest=(10, 20))
        actions = make_ucf_directions(folder/'actions', groups=3, test_groups=1, clips=1)
        found = [('action_cls', load_config('action_cls_demo', ['--data_root', str(actions.root), *ACTIONS]), 2),
                 ('fgclip', load_config('fgclip_demo', ['--data_root', str(street.root), *FGCLIP]), 8),
                 ('uniad', load_config('uniad_demo', ['--data_root', str(textures.root), *UNIAD]), 0),
                 ('adatad', load_config('adatad_demo', ['--data_root', str(motions.root), *ADATAD]), 0)]
        return [dict(work=f'waits for the GPU in a training step, {name}', count=waits(cfg), limit=most)
                for name,cfg,most in found]
