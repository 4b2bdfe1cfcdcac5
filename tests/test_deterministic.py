"`train.deterministic` on a GPU: no operation of a training step or of a pass over a split is among those that torch refuses there"
import warnings
import numpy as np, pytest, torch
import test_adatad as adatad_tests
from test_pretend_cuda import same_sums, subject, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from vadnb.losses.contrastive import hard_negative
from vadnb.train.feed import look_through

# what `torch.use_deterministic_algorithms` documents to raise on CUDA, by the operation that raises
REFUSED = '''avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward
    adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward max_pool3d_with_indices_backward
    max_unpool2d max_unpool3d upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward
    upsample_trilinear3d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward reflection_pad1d_backward
    reflection_pad2d_backward reflection_pad3d_backward nll_loss_forward nll_loss2d_forward _ctc_loss_backward _embedding_bag
    put put_ histc scatter_reduce scatter_reduce_ grid_sampler_2d_backward grid_sampler_3d_backward'''.split()

class Operations(TorchDispatchMode):
    "Notes what is run, forwards and backwards"
    def __init__(self):
        super().__init__()
        self.refused,self.seen = set(),set()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        self.seen.add(name)
        weighted = name=='bincount' and (len(args)>1 and args[1] is not None or kwargs.get('weights') is not None)
        indexed = name in ('median', 'nanmedian') and op._overloadname!='default'
        if name in REFUSED or weighted or indexed or name.endswith('_roi_align_backward'): self.refused.add(name)
        return op(*args, **kwargs)

def test_the_names_are_those_of_torch():
    assert not [n for n in REFUSED if not hasattr(torch.ops.aten, n)]

@pytest.mark.parametrize('mode,shape,size', [('linear', (1, 2, 5), 9), ('bicubic', (1, 2, 5, 5), (7, 3)), ('bilinear', (1, 2, 5, 5), (7, 3))])
def test_a_resize_with_a_gradient_is_seen(mode, shape, size):
    x = torch.rand(shape, requires_grad=True)
    with Operations() as found: torch.nn.functional.interpolate(x, size=size, mode=mode).sum().backward()
    assert len(found.refused)==1

def test_a_step_and_a_pass_of_fgclip_and_uniad(subject):
    "fgclip with frames of another size than its positions were made for, and every loss"
    system,batches,fed = subject.build('cpu')
    with Operations() as found:
        for batch in batches:
            train_step(system, batch, 'cpu')
            system.after_step()
        with torch.no_grad(): look_through(system.eval(), fed, 'valid', system.cfg.train, torch.device('cpu'))
    assert not found.refused and {'mm', 'sum'} & found.seen

def test_hard_negatives_of_fgclip():
    "Cross entropy by torch's loss is on the list, whatever its shape"
    region,texts = torch.randn(3, 8, requires_grad=True),torch.randn(3, 4, 8, requires_grad=True)
    with Operations() as found: hard_negative(region, texts, torch.tensor(1.)).backward()
    with Operations() as torchs: torch.nn.functional.cross_entropy(region, torch.tensor([0, 1, 2])).backward()
    assert not found.refused and torchs.refused=={'nll_loss_forward'}

world = adatad_tests.world

@pytest.mark.parametrize('more', [(), ('--detector.abs_position', 'true', '--detector.max_seq_len', 40, '--detector.attention', '[9]', '--loss.reg_weight', 0),
                                  ('--data.size', '[24,40]', '--model.patch_size', '8', '--data.short_side', 40, '--model.frozen', 'true', '--train.gradient_checkpointing', 'true')])
def test_a_step_and_a_pass_of_adatad(world, tmp_path, more):
    "One position per frame and a tubelet of two, so that features are stretched in time"
    cfg = adatad_tests.config(world, tmp_path, 'bits', '--augment.use', 'true', '--augment.operations', 9, *map(str, more))
    data = cfg.make_data()
    system = cfg.build(data.facts())
    train = data.split('train')
    batch = data.collate([train.draw(i, np.random.default_rng(i)) for i in range(2)])
    if cfg.train.gradient_checkpointing: system.gradient_checkpointing()
    with warnings.catch_warnings(), Operations() as found:
        warnings.simplefilter('ignore')
        system.train().loss(batch)['loss'].backward()
        with torch.no_grad(): look_through(system.eval(), data, 'valid', cfg.train, torch.device('cpu'))
    assert not found.refused and 'max_pool2d_with_indices_backward' in found.seen
