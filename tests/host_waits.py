"""Finds what would make the host wait for a GPU, on a machine without one.

The device is ``meta``. Reading its values (``float``, ``if``, ``nonzero``, ``tolist``, ``.cpu()``) is an error anyway; the
mode here also records copies from the CPU that wait: a plain ``.to``, indexing by indices on the CPU, ``torch.tensor``
with a device.
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
_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


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
        else:  # a number on the CPU is an argument, not a copy
            mixed = {tensor.device for tensor in tensors if tensor.ndim}
            waits = len(mixed) > 1
        if waits:
            self.found.append(f"{_caller()} ({function})")
        return result


class _Makers(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _MAKERS and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            self.found.append(f"{_caller()} ({function.__name__})")
        return function(*args, **kwargs)


def _caller() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}: {frames[-1].line}"
