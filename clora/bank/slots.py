"""Slots: LoRAs of one dtype side by side, as a routed pass multiplies with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clora.devices import copies_later
from clora.errors import CloraError, nearest
from clora.lora.state import LoRAModule, LoRAState

Factors = tuple[Tensor, Tensor]
SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of one dtype, as the factors that a pass multiplies with.

    Attributes:
        names: the slots, in order.
        factors: per module ``(lora_A [E, R, K], lora_B [E, N, R])``; a module that is not there is the base alone.
        scale: ones ``[E]``; the states' own scales are in their factors.
    """

    names: tuple[str, ...]
    factors: Mapping[str, Factors]
    scale: Tensor

    def parameters(self) -> list[Tensor]:
        """The factors as a flat list, for an optimizer."""
        return [factor for pair in self.factors.values() for factor in pair]

    def slot(self, name: str) -> dict[str, Factors]:
        """One slot's factors ``(A [R, K], B [N, R])``, views."""
        i = index_of(name, self.names)
        return {module: (a[i], b[i]) for module, (a, b) in self.factors.items()}

    def state(self, name: str, rank: int | None = None) -> LoRAState:
        """A copy of one slot as a LoRA, its factors cut to ``rank``."""
        return copied_state(self.slot(name), rank)


def slot_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype of a transformer's arithmetic as far as it says it, else float32."""
    dtype = getattr(transformer, "dtype", None) or next(transformer.parameters()).dtype
    return dtype if dtype in SLOT_DTYPES else torch.float32


def empty_slots(
    layers: Mapping[str, nn.Linear], ranks: Mapping[str, int], names: tuple[str, ...], dtype: torch.dtype
) -> Slots:
    """Zeros on each layer's device."""

    def zeros(*size: int, layer: nn.Linear) -> Tensor:
        return torch.zeros(len(names), *size, dtype=dtype, device=_device(layer))

    factors = {
        module: (
            zeros(ranks[module], layer.in_features, layer=layer),
            zeros(layer.out_features, ranks[module], layer=layer),
        )
        for module, layer in layers.items()
    }
    return Slots(names, factors, torch.ones(len(names), device=_device(next(iter(layers.values())))))


def _device(layer: nn.Linear) -> torch.device:
    """Where a layer computes: accelerate's hooks say it, whose weights are elsewhere between calls."""
    hook = getattr(layer, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or layer.weight.device)


def factors_of(state: LoRAState) -> dict[str, Factors]:
    return {module: (lora.lora_A, lora.lora_B) for module, lora in state.modules.items()}


def copied_state(factors: Mapping[str, Factors], rank: int | None) -> LoRAState:
    """Copies, cut to ``rank``."""
    return LoRAState(
        {m: LoRAModule(a[:rank].detach().clone(), b[:, :rank].detach().clone()) for m, (a, b) in factors.items()}
    )


@torch.no_grad()
def squared_norm(lora: Mapping[str, Factors]) -> float:
    norms = [torch.linalg.vector_norm(f, dtype=torch.float64) for pair in lora.values() for f in pair]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


@torch.no_grad()
def fill(slot: Mapping[str, Factors], lora: Mapping[str, Factors]) -> None:
    """Writes a LoRA over a slot ``(A [R, K], B [N, R])`` per module; ranks and modules that it lacks become zero."""
    for module, (a, b) in slot.items():
        if module not in lora:
            a.zero_()
            b.zero_()
            continue
        own_a, own_b = lora[module]
        rank, later = len(own_a), copies_later(a.device)
        a[:rank].copy_(own_a, non_blocking=later)
        b[:, :rank].copy_(own_b, non_blocking=later)
        a[rank:].zero_()
        b[:, rank:].zero_()


def index_of(name: str, names: tuple[str, ...], what: str = "adapter") -> int:
    if name not in names:
        raise CloraError(f"unknown {what} {name!r}; the bank has {list(names)}{nearest(name, names)}")
    return names.index(name)
