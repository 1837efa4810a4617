"""Makes PyTorch operators of functions that launch Triton kernels, compiled or in Triton's interpreter."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: then its kernels run in NumPy, on CPU tensors too."""

# Before 2.13 PyTorch's own refuses interpreted kernels, which need no wrapping: they are never traced.
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton


def kernel_op(name: str, launch: Callable, fake: Callable) -> torch.library.CustomOpDef:
    """Registers `launch` as the operator `name`.

    Compiled kernels are visible to `torch.compile` (`triton_op`). The interpreter takes only real tensors, so that
    there the operator is opaque to tracing (`custom_op`); everything else about it is the same.

    Args:
        name: `"clora::<op>"`.
        launch: allocates its outputs, mutates no input and launches through `wrap_triton` of this module; fully
            annotated, since the operator's schema is read from it.
        fake: `launch` for tensors without data: outputs of the right shape and dtype.
    """
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    op = make(name, launch, mutates_args=())
    op.register_fake(fake)
    return op


def is_traced(x: Tensor) -> bool:
    """Whether someone watches the operators: torch.compile, fake tensors, selective checkpointing, a profiler of flops.

    Where nobody does, launching without the operator saves most of the host's time of a call.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, Parameter)
