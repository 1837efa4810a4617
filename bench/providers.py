"""A provider: a way to compute a case, built once per case and then called again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
"""Computes the case once; its outputs are named as those of the truth in fp64."""
Builder = Callable[..., Call]
"""Takes the inputs of a case and prepares everything that does not need both weights and samples."""
BASE = "base"
"""The provider that leaves the adapters out: the time that no other can beat. Its result is another one, so that the gate
does not apply to it."""
OURS = "ours"
"""clora's op as it dispatches; `ours_<design>` is forced to a design."""


class Unavailable(Exception):
    """A provider does not exist on this machine; the message is the reason."""


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
    """Raises Unavailable where a tensor is not on a GPU, for providers that run only there."""
    if tensor.device.type != "cuda":
        raise Unavailable(f"needs a GPU, the tensors are on {tensor.device}")


def compiled(function: Callable) -> Callable:
    """`torch.compile` of a function for the one shape that it is called with."""
    return torch.compile(function, dynamic=False)


def is_ours(provider: str) -> bool:
    return provider.partition("_")[0] == OURS


def peft_model(
    module: nn.Module, layers: Sequence[str], factors: Mapping[str, tuple[Tensor, Tensor]], trains: bool = False
) -> nn.Module:
    """PEFT's model around a module, on the tensors of a case: nothing is copied.

    Args:
        layers: names of the linear layers, wherever in the module.
        factors: lora_A `[E, R, K]` and lora_B `[E, N, R]` of each layer by its full name; the adapters are "a0", "a1", ...,
            the first active, all of scale 1.
    """
    peft = need("peft")
    num_adapters, rank, _ = next(iter(factors.values()))[0].shape
    # PEFT scales by alpha / rank, here 1.
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    model = peft.get_peft_model(module, config, adapter_name="a0", autocast_adapter_dtype=False)
    for e in range(1, num_adapters):
        model.add_adapter(f"a{e}", config)
    for name, (a, b) in factors.items():
        layer = module.get_submodule(name)
        for e in range(num_adapters):
            layer.lora_A[f"a{e}"].weight = nn.Parameter(a[e].detach(), requires_grad=trains)
            layer.lora_B[f"a{e}"].weight = nn.Parameter(b[e].detach(), requires_grad=trains)
    return model
