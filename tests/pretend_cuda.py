"""A GPU that is not there: tensors that claim to be on `cuda:0`, compute on the CPU and refuse to meet CPU tensors

It finds tensors and buffers left behind on the CPU, and counts where the host would wait for the device. It cannot find
what kernels of a GPU round differently, races of non-blocking copies, autocast, NCCL or the memory that is needed.
"""
import contextlib, sys
from collections import Counter
from pathlib import Path
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HOST,DEVICE = torch.device('cpu'), torch.device('cuda', 0)
ops = torch.ops.aten
PACKAGE = Path(__file__).resolve().parent.parent/'vadnb'

# what gives the host a number, or a shape that only the device knows
WAITS = {ops._local_scalar_dense: 'item', ops.is_nonzero: 'item', ops.equal: 'item', ops.allclose: 'item',
         ops.nonzero: 'nonzero', ops.masked_select: 'nonzero', ops.argwhere: 'nonzero', ops._unique2: 'unique',
         ops.unique_dim: 'unique', ops.unique_consecutive: 'unique', ops.bincount: 'unique'}
READS = (ops.index,)
WRITES = (ops.index_put, ops.index_put_, ops._index_put_impl_, ops._unsafe_index_put)

def where():
    "The innermost line of the package that is being run; a backward pass has none of its own"
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents: return f'{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}'
        if file.parts[-2:]==('torch', '_tensor.py') and frame.f_code.co_name=='backward': return 'backward'
        frame = frame.f_back
    return 'outside'

class OnDevice(torch.Tensor):
    "Numbers that the device holds; to C++ they are on `meta`, whose autograd asks for no driver"
    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            layout=numbers.layout, device='meta', requires_grad=False)
    def __init__(self, numbers): self.numbers = numbers
    def __repr__(self, **kw): return f'{self.numbers!r} on {DEVICE}'
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        # without the mode, as in a hook or when a device tensor has outlived it
        return Device().run(op, args, kwargs or {})

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    # C++ would make tensors of lists on meta, where their values are lost
    def __getitem__(self, at): return super().__getitem__(lists_as_tensors(at))
    def __setitem__(self, at, value): super().__setitem__(lists_as_tensors(at), value)
    def new_tensor(self, data, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype).to(device or DEVICE).requires_grad_(requires_grad)
    def __deepcopy__(self, memo):
        res = OnDevice(self.numbers.detach().clone())
        if isinstance(self, torch.nn.Parameter): res = torch.nn.Parameter(res, self.requires_grad)
        return memo.setdefault(id(self), res)
    # what tells tensors of one memory from others
    def data_ptr(self): return self.numbers.data_ptr()
    def tolist(self): return self.cpu().tolist()
    def numpy(self, *args, **kw): raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
    def __array__(self, *args, **kw): return self.numpy()

def lists_as_tensors(at):
    "An index with each list of it as a tensor on the CPU"
    if isinstance(at, tuple): return tuple(map(lists_as_tensors, at))
    return torch.tensor(at) if isinstance(at, list) else at

def on_device(x): return isinstance(x, OnDevice)
def on_host(x): return isinstance(x, torch.Tensor) and not on_device(x)
def numbers(x): return x.numbers if on_device(x) else HOST if isinstance(x, torch.device) else x
def claimed(x): return OnDevice(x) if on_host(x) else x
def is_mask(x): return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)

class Device(TorchDispatchMode):
    "Runs operations, compares the devices of what they are given, and counts where the host waits"
    def __init__(self): super().__init__(); self.waits = Counter()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        "One operation on the numbers"
        given = tree_leaves((args, kwargs))
        held = [x for x in given if on_device(x)]
        if held or kwargs.get('device'): self.count(op, args, kwargs)
        # memory that a device could read by itself would need one
        if op.overloadpacket in (ops.pin_memory, ops._pin_memory): return args[0]
        if op is ops.copy_.default:
            # beside `to`, the one operation that may be given both
            numbers(args[0]).copy_(numbers(args[1]))
            return args[0]
        if held and op is not ops._to_copy.default: self.compare(op, given)
        found = op(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        asked = kwargs.get('device')
        if not (torch.device(asked).type in ('cuda', 'meta') if asked is not None else held): return found
        # an operation in place gives back the very tensor that it changed
        own = {id(x.numbers): x for x in held} if op._schema.is_mutable else {}
        return tree_map(lambda x: own.get(id(x), claimed(x)), found)

    def compare(self, op, given):
        "Raise what a GPU raises for a tensor of the host; a number without dimensions, or an index, may be one"
        index = (torch.int64, torch.bool, torch.uint8)
        for x in filter(on_host, given):
            if not x.dim() or op.overloadpacket in (*READS, *WRITES) and x.dtype in index: continue
            raise RuntimeError(f'{op}: expected all tensors to be on the same device, but found at least two devices, '
                               f'cuda:0 and cpu (of shape {tuple(x.shape)})')

    def count(self, op, args, kwargs):
        "Note an operation after which the host would have to wait"
        kind = self.kind_of_wait(op, args, kwargs)
        if kind: self.waits[kind, where()] += 1

    def kind_of_wait(self, op, args, kwargs):
        "What makes the host wait in an operation, or None"
        packet = op.overloadpacket
        if packet in WAITS: return WAITS[packet]
        if packet is ops.repeat_interleave and kwargs.get('output_size') is None: return 'nonzero'
        if packet is ops._to_copy:
            to = torch.device(kwargs.get('device') or args[0].device).type
            if on_device(args[0]): return 'cpu' if to=='cpu' else None
            return None if kwargs.get('non_blocking') else 'upload'
        if packet is ops.copy_:
            if on_device(args[0])==on_device(args[1]): return None
            if on_device(args[1]): return 'cpu'
            return 'upload' if args[1].dim() and not (len(args)>2 and args[2]) else None
        # an index of the host is copied to the device, and the host waits for it
        if packet in (*READS, *WRITES) and any(on_host(x) and x.dim() for x in args[1]): return 'upload'
        if packet in READS: return 'mask' if any(map(is_mask, args[1])) else None
        if packet in WRITES and any(map(is_mask, args[1])):
            # one value under a mask is filled in without counting its places
            accumulate = args[3] if len(args)>3 else kwargs.get('accumulate', False)
            return 'mask' if args[2].numel()!=1 or accumulate else None

    def listed(self):
        "Waits by place, the most frequent first, a line each"
        return '\n'.join(f'{n:4} {kind:8} {at}' for (kind, at),n in self.waits.most_common())

    @property
    def total(self): return sum(self.waits.values())

@contextlib.contextmanager
def pretend_cuda():
    "Inside, `cuda:0` is there; gives the `Device`, whose `waits` say where the host would have waited for it"
    own = dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
               set_device=lambda device: None, _lazy_init=lambda: None, get_rng_state_all=lambda: [],
               manual_seed=lambda seed: None, manual_seed_all=lambda seed: None,
               max_memory_allocated=lambda device=None: 0, synchronize=lambda device=None: None,
               is_current_stream_capturing=lambda: False)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    if not torch.cuda.is_available(): torch._C._ensureCUDADeviceGuardSet()
    with pytest.MonkeyPatch.context() as patched:
        for name,f in own.items(): patched.setattr(torch.cuda, name, f)
        # a parameter cannot take over the numbers of another kind of tensor; swapped, it is the same object elsewhere
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with Device() as device: yield device
        finally: torch.__future__.set_swap_module_params_on_conversion(swapped)
