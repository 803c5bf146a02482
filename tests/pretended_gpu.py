"""A pretended GPU: real numbers on a device that is not the CPU, where there is no GPU.

Every tensor on it wraps one of the CPU and says `is_cuda`; its device is PyTorch's unused 'lazy',
since autograd would ask a driver about 'cuda'. It refuses what CUDA refuses: operations between
devices and, while a graph is captured, copies from or to the host and looks at a value. It counts
the times that the host would wait for the device. `torch.cuda.graph` notes the operations, and a
replay does them again at the same addresses. The package's own backwards run in an empty context,
as on the thread that autograd keeps for a device. What it cannot see: kernels, streams, memory.
"""

import collections
import contextlib
import contextvars
import importlib
import os
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import fewshotmeta
from fewshotmeta.engine import capture, layers, lean
from fewshotmeta.learners import modules

aten, GPU = torch.ops.aten, 'lazy'
PACKAGE = os.path.dirname(fewshotmeta.__file__) + os.sep
MADE_BY = layers._Conv, layers._ConvToInput, layers._ConvToWeight, layers._Norm
MADE_BY += layers._NormBackward, layers._MaxPool, layers._MaxPoolBackward
MADE_BY += lean._Recomputed, lean._AtOnce  # functions with a backward in Python


class Machine:
    "What the pretended GPU is doing."

    captured = None  # a list of operations while a graph is captured
    counts = False  # whether waits are counted
    waits = collections.Counter()  # by kind and line of the package
    launches = 0  # operations that Python starts one by one: no recording, no view


def line_at_work():
    "The innermost line of the package that is at work."
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if not frame:
        return 'outside of the package'
    code = frame.f_code
    return f'{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}'


def wait(kind):
    "The host waits for the GPU: counted, and an error while a graph is captured."
    if Machine.captured is not None:
        said = 'CUDA error: operation not permitted when stream is capturing'
        raise RuntimeError(f'{said} ({kind} at {line_at_work()})')
    if Machine.counts:
        Machine.waits[f'{kind} at {line_at_work()}'] += 1


# ---- tensors
class OnGPU(Tensor):
    "A tensor of the pretended GPU."

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner):
        facts = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        facts |= dict(dtype=inner.dtype, device=GPU)
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **facts)
        made.inner = inner
        return made

    def __repr__(self):
        return f'OnGPU{tuple(self.shape)}'

    def tolist(self):
        wait('a look at values')
        return self.inner.tolist()

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(GPU)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    "Catches tensors that are made on the GPU, or brought there."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def inner(tree):
    return tree_map_only(OnGPU, lambda t: t.inner, tree)


def wrapped(tree):
    return tree_map_only(Tensor, lambda t: t if isinstance(t, OnGPU) else OnGPU(t), tree)


def tensors(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def pinned(tensor):
    "What `pin_memory` returns."
    copy = tensor.clone()
    copy.is_pinned_ = True
    return copy


# ---- operations
LOOKS = aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default
SIZED = aten.nonzero.default, aten.masked_select.default  # by values
INDEXED = aten.index.Tensor, aten.index_put_.default, aten.index_put.default
MAY_MIX = aten.copy_.default, aten._to_copy.default, *INDEXED


def run(func, args, kwargs):
    "Do an operation: on the CPU alone, on the GPU, or between them."
    given = tensors((args, kwargs))
    there = [t for t in given if isinstance(t, OnGPU)]
    here = [t for t in given if not isinstance(t, OnGPU)]
    wish = kwargs.get('device')
    device = wish and torch.device(wish).type
    on_cpu = {**inner(kwargs), **({'device': torch.device('cpu')} if wish else {})}
    if func is aten._to_copy.default:
        return moved(func, args, on_cpu, there, device or (GPU if there else 'cpu'))
    check_allowed(func, args, there, here)
    out = func(*inner(args), **on_cpu)
    return noted(func, args, on_cpu, out) if there or device == GPU else out


def moved(func, args, kwargs, there, to):
    "A copy to a device, or of another type."
    out = func(*inner(args), **kwargs)
    if there and to == GPU:
        return noted(func, args, kwargs, out)
    if there:
        wait('a copy to the host')
        return out
    if to != GPU:
        return out
    queued = kwargs.get('non_blocking') and getattr(args[0], 'is_pinned_', False)
    if not queued:
        wait('a copy from the host')
    return OnGPU(out)


def check_allowed(func, args, there, here):
    "Refuse what mixes devices, and note what waits."
    if not there:
        return
    if func not in MAY_MIX and any(t.dim() for t in here):
        shapes = [tuple(t.shape) for t in here]
        raise RuntimeError(f'{func} at {line_at_work()}: {shapes} on the CPU, others on the GPU')
    if func is aten.copy_.default and here:
        wait('a copy between devices')
    if func in LOOKS:
        wait('a look at a value')
    indices = tensors(args[1]) if func in INDEXED else []
    if any(not isinstance(t, OnGPU) for t in indices):
        wait('an index of the host')
    if func in SIZED or any(t.dtype == torch.bool for t in indices):
        wait('a size that values decide')


def noted(func, args, kwargs, out):
    "Wrap the results; while a graph is captured, note how they are made again."
    if out is not None and not isinstance(out, Tensor | tuple | list):
        return out
    args_on_cpu = inner(args)
    if Machine.captured is not None:
        note(func, args_on_cpu, kwargs, out)
    else:
        old = {place(t) for t in tensors(args_on_cpu)}
        makes = any(place(t) not in old for t in tensors(out))
        Machine.launches += makes or func._schema.is_mutable
    if func._schema.is_mutable and isinstance(out, Tensor):
        return args[0]
    return wrapped(out)


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def note(func, args, kwargs, out):
    "Add to the graph: an operation in place is done again, a new result is written where it lay."
    if func._schema.is_mutable:
        Machine.captured.append(lambda: func(*args, **kwargs))
        return
    old = {place(t) for t in tensors((args, kwargs))}
    kept = tensors(out)
    fresh = [place(t) not in old for t in kept]

    def again():
        for mine, new, is_fresh in zip(kept, tensors(func(*args, **kwargs)), fresh):
            if is_fresh:
                mine.copy_(new)

    if any(fresh):
        Machine.captured.append(again)


# ---- torch.cuda
class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def __init__(self):
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for operation in self.operations:
                operation()


@contextlib.contextmanager
def captured(graph, pool=None):
    Machine.captured = graph.operations
    try:
        yield
    finally:
        Machine.captured = None


CUDA = dict(Stream=Stream, current_stream=Stream, CUDAGraph=Graph, graph=captured)
CUDA |= dict(stream=contextlib.nullcontext, graph_pool_handle=type(None))
MADE_ANEW = 'get_overwrite_module_params_on_conversion'
FUSED = '_get_fused_kernels_supported_devices'


def elsewhere(make):
    "`torch.tensor` and such, which can make a tensor on the GPU."

    def made(data, *args, device=None, **kwargs):
        if device is not None and torch.device(device).type == GPU:
            return make(data, *args, **kwargs).to(GPU)
        return make(data, *args, **kwargs, **({} if device is None else dict(device=device)))

    return made


def in_no_context(backward):
    "A backward as on the thread of a device, which knows no active plan."
    return staticmethod(lambda ctx, *grads: contextvars.Context().run(backward, ctx, *grads))


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    "Within, `device=GPU` is a GPU."
    with monkeypatch.context() as patch:
        for name, value in CUDA.items():
            patch.setattr(torch.cuda, name, value)
        for name in ('tensor', 'as_tensor'):
            patch.setattr(torch, name, elsewhere(getattr(torch, name)))
        patch.setattr(Tensor, 'pin_memory', pinned)
        patch.setattr(torch.__future__, MADE_ANEW, lambda: True)
        patch.setattr(modules, '_disable_current_modes', contextlib.nullcontext)  # of `Factories`
        patch.setattr(capture.Recorded, '_traced', lambda self, f, how: f)
        for name in ('utils._foreach_utils', 'optim.adam', 'optim.optimizer'):
            module = importlib.import_module(f'torch.{name}')
            if hasattr(module, FUSED):
                patch.setattr(module, FUSED, lambda: ['cuda', GPU])
        for made_by in MADE_BY:
            patch.setattr(made_by, 'backward', in_no_context(made_by.backward))
        with Factories():
            yield
