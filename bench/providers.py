"""A provider: a way to compute a case, built once per case and then called again and again."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
"""Computes the case once; its outputs are named as those of the truth in fp64."""
Builder = Callable[..., Call]
"""From the inputs of a case; what can be prepared before the weights meet the samples is prepared here."""
BASE = "base"
"""The provider that leaves the adapters out: the time that no other can beat. It computes something else, so that the
gate does not apply to it."""
OURS = "ours"
"""clora's op as it dispatches; `ours_<design>` names what it was forced to."""


class Unavailable(Exception):
    """A provider does not exist on this machine; the message says why."""


def need(module: str) -> ModuleType:
    """An imported module.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} cannot be imported: {error}") from error


def need_gpu(tensor: Tensor) -> None:
    """Raises Unavailable where a tensor is not on a GPU, for what runs there alone."""
    if tensor.device.type != "cuda":
        raise Unavailable(f"needs a GPU, the tensors are on {tensor.device}")


def compiled(function: Callable) -> Callable:
    """`torch.compile` of a function for the one shape that it is called with."""
    return torch.compile(function, dynamic=False)


def is_ours(provider: str) -> bool:
    return provider.partition("_")[0] == OURS
