"""Slots: LoRAs of one dtype side by side, as a routed pass multiplies with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from clora.devices import copies_later
from clora.errors import CloraError, nearest
from clora.lora.state import LoRAModule, LoRAState

Factors = tuple[Tensor, Tensor]
"""``(lora_A, lora_B)`` of a layer with K inputs and N outputs: ``[R, K], [N, R]``, or of E slots ``[E, R, K], [E, N, R]``."""
SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of one dtype, as the factors that a pass multiplies with.

    Attributes:
        names: the slots, in order.
        factors: per module ``(lora_A [E, R, K], lora_B [E, N, R])``; a module without an entry has only the base.
        scale: ones ``[E]``; the states' own scales are in their factors.
    """

    names: tuple[str, ...]
    factors: Mapping[str, Factors]
    scale: Tensor

    def parameters(self) -> list[Tensor]:
        """Returns the factors as a flat list, for an optimizer."""
        return list(chain.from_iterable(self.factors.values()))

    def slot(self, name: str) -> dict[str, Factors]:
        """Returns the factors of one slot, ``(A [R, K], B [N, R])``, as views."""
        i = index_of(name, self.names)
        return {module: (a[i], b[i]) for module, (a, b) in self.factors.items()}

    def state(self, name: str) -> LoRAState:
        """Copies one slot as a LoRA."""
        return copied_state(self.slot(name))


def slot_dtype(transformer: nn.Module) -> torch.dtype:
    """Returns the transformer's compute dtype; float32 if a slot cannot have it."""
    dtype = getattr(transformer, "dtype", None) or next(transformer.parameters()).dtype
    return dtype if dtype in SLOT_DTYPES else torch.float32


def empty_slots(
    layers: Mapping[str, nn.Linear], ranks: Mapping[str, int], names: tuple[str, ...], dtype: torch.dtype
) -> Slots:
    """Makes slots of zeros, on the device of each layer."""
    factors = {}
    for module, layer in layers.items():
        rank = ranks[module]
        device = _device(layer)
        a = torch.zeros(len(names), rank, layer.in_features, dtype=dtype, device=device)
        b = torch.zeros(len(names), layer.out_features, rank, dtype=dtype, device=device)
        factors[module] = (a, b)
    return Slots(names, factors, torch.ones(len(names), device=_device(next(iter(layers.values())))))


def _device(layer: nn.Linear) -> torch.device:
    """Returns the device that a layer computes on; accelerate's hooks have it for weights that are elsewhere between calls."""
    hook = getattr(layer, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or layer.weight.device)


def factors_of(state: LoRAState) -> dict[str, Factors]:
    """Returns each module's ``(lora_A [R, K], lora_B [N, R])``."""
    return {module: (lora.lora_A, lora.lora_B) for module, lora in state.modules.items()}


def ranks_of(state: LoRAState) -> dict[str, int]:
    """Returns each module's rank."""
    return {module: lora.rank for module, lora in state.modules.items()}


def bytes_of(factors: Mapping[str, Factors]) -> int:
    """Returns the memory of factors."""
    return sum(a.nbytes + b.nbytes for a, b in factors.values())


def copied_state(factors: Mapping[str, Factors], rank: int | None = None) -> LoRAState:
    """Makes a LoRA of copies of these factors, cut to ``rank``."""
    return LoRAState(
        {m: LoRAModule(a[:rank].detach().clone(), b[:, :rank].detach().clone()) for m, (a, b) in factors.items()}
    )


@torch.no_grad()
def squared_norm(lora: Mapping[str, Factors]) -> float:
    """Returns the sum of the squares of all factors."""
    norms = [torch.linalg.vector_norm(f, dtype=torch.float64) for f in chain.from_iterable(lora.values())]
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
        # Zeros in the ranks beyond its own: B A has no part of them, and nothing of the slot's last LoRA is left.
        a[rank:].zero_()
        b[:, rank:].zero_()


def index_of(name: str, names: tuple[str, ...], what: str = "adapter") -> int:
    """Returns the index of a name. Raises CloraError, with the nearest names, if the bank does not have it."""
    if name not in names:
        raise CloraError(f"unknown {what} {name!r}; the bank has {list(names)}{nearest(name, names)}")
    return names.index(name)
