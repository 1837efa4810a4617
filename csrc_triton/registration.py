"""Registers functions that launch Triton kernels, compiled or interpreted, as PyTorch operators."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Triton was imported with TRITON_INTERPRET=1: its kernels run in NumPy, on CPU tensors too."""

# Before 2.13 PyTorch's wrapper refuses interpreted kernels, which need none: they are never traced.
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton


def kernel_op(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorator that registers a function as the operator `name` (`"clora::<op>"`).

    Compiled kernels are visible to `torch.compile` (`triton_op`). The interpreter takes only real tensors, so that its
    operator is opaque to tracing (`custom_op`); everything else about it is the same.

    The function allocates its outputs, mutates no input and launches through `wrap_triton` of this module. It is fully
    annotated: the operator's schema is read from it.
    """
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(name, mutates_args=())


def is_traced(x: Tensor) -> bool:
    """Detects observers of operators: torch.compile, fake tensors, selective checkpointing, a profiler of flops.

    Without one, launching without the operator saves most of the host's time of a call.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, Parameter)
