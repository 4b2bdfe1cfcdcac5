"Distance IoU of 20,000 pairs of segments, loss and gradient: how much memory each pair needs"
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vadnb.losses.detection import diou_loss

PAIRS = 20_000

class Made(TorchDispatchMode):
    "Adds up the numbers of all tensors that operations make, and notes the largest"
    def __init__(self): super().__init__(); self.all = self.largest = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.all,self.largest = self.all+sum(sizes), max([self.largest, *sizes])
        return made

def numbers(n):
    "What loss and gradient of n pairs make: numbers in all, and in the largest tensor"
    torch.manual_seed(0)
    pred,target = torch.rand(2, n, 2).cumsum(-1)
    pred.requires_grad_()
    with Made() as made: diou_loss(pred, target).sum().backward()
    return made.all, made.largest

def rows():
    (few,_),(many,largest) = numbers(PAIRS//2), numbers(PAIRS)
    size = f'DIoU of {PAIRS:,} pairs, loss and gradient'
    yield dict(work=f'{size}: numbers per pair in the largest tensor', ratio=largest/PAIRS, limit=2.01,
               detail=dict(numbers_per_pair_in_all=round(many/PAIRS, 1)))
    yield dict(work=f'{size}: memory over that of half as many', ratio=many/few, limit=2.01)
