"""Finds calls that would make the host wait for a GPU, on a machine without one.

The device is ``meta``. Reading its values (``float``, ``if``, ``nonzero``, ``tolist``, ``.cpu()``) is an error anyway; the
mode here also records copies from the CPU that wait: a plain ``.to``, indexing by indices on the CPU or in a list,
``torch.tensor`` with a device. It misses the waits of a GPU's own kernels and optimizers, which PyTorch's check finds on one
(``test_an_update_never_waits_for_the_gpu`` of csrc_triton/test_training.py).
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_SCALARS_COPIED = (torch.ops.aten.where.self,)
"""Take a number in a tensor on the CPU by a copy; others as an argument."""
_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


@contextmanager
def host_waits():
    """Collects ``file: line of code`` of all copies inside that wait."""
    found: list[str] = []
    with _Copies(found), _Makers(found):
        yield found


class _Copies(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = function(*args, **kwargs)
        if function in _COPIES:
            non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            waits = result.device == DEVICE and tensors[-1].device != DEVICE and not non_blocking
        else:
            waits = len({tensor.device for tensor in tensors if tensor.ndim or function in _SCALARS_COPIED}) > 1
        if waits:
            self.found.append(f"{_caller()} ({function})")
        return result


class _Makers(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _MAKERS:
            waits = result.device == DEVICE and not (isinstance(args[0], torch.Tensor) and args[0] is result)
        else:
            waits = function in _INDEXING and args[0].device == DEVICE and _has_list(args[1])
        if waits:
            self.found.append(f"{_caller()} ({function.__name__})")
        return result


def _has_list(index) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


def _caller() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}: {frames[-1].line}"
