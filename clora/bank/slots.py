"""Slots: LoRAs of one dtype in stacks, each of nearly equal ranks, as a routed pass multiplies with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from clora.devices import copies_later
from clora.errors import CloraError, nearest
from clora.lora.state import LoRAModule, LoRAState

Factors = tuple[Tensor, Tensor]
"""``(lora_A, lora_B)`` of a layer with K inputs and N outputs: ``[R, K], [N, R]``, or of E slots ``[E, R, K], [E, N, R]``."""
SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RANK_STEP = 16
"""Ranks that are equal when rounded up to this share a stack: the kernels multiply with blocks of 16 ranks or more."""
ALIGNED_RANKS = 8
"""Slots of 16 bits have multiples of it, rows of 16 bytes: the kernels' hardware copies (TMA) need them."""


@dataclass(frozen=True, eq=False)
class Stack:
    """LoRAs of the same layers and nearly the same ranks side by side: shorter ranks are padded with zeros.

    Attributes:
        factors: per module ``(lora_A [E, R, K], lora_B [E, N, R])``; a module without an entry has only the base.
        scale: ones ``[E]``; the states' own scales are in their factors.
        strengths: per module the size of each LoRA's change against the weight's (`strengths_of`). Without an entry it is
            not known, or changes, and nothing is merged in 16 bits.
    """

    factors: Mapping[str, Factors]
    scale: Tensor
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def row(self, row: int) -> dict[str, Factors]:
        """Returns the factors of one LoRA, ``(A [R, K], B [N, R])``, as views."""
        return {module: (a[row], b[row]) for module, (a, b) in self.factors.items()}

    def cut(self, ranks: Mapping[str, int]) -> Stack:
        """Returns views of these layers' first ranks, as many as a slot has for them (`slot_rank`)."""
        factors = {}
        for module, rank in ranks.items():
            a, b = self.factors[module]
            rank = slot_rank(rank, a.dtype)
            factors[module] = (a[:, :rank], b[:, :, :rank])
        return Stack(factors, self.scale)

    def rows(self, rows: slice | list[int]) -> Stack:
        """Returns some of the LoRAs: views for a slice, copies for a list."""
        factors = {module: (a[rows], b[rows]) for module, (a, b) in self.factors.items()}
        numbers = range(len(self.scale))[rows] if isinstance(rows, slice) else rows
        strengths = {module: tuple(own[i] for i in numbers) for module, own in self.strengths.items()}
        return Stack(factors, self.scale[rows], strengths)


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots as a routed pass counts them: each is a row of a stack.

    A LoRA costs products of its own rank and in its own layers only, whatever other LoRAs a bank holds.

    Attributes:
        names: the slots, in order.
        stacks: their factors.
        places: stack and row of each slot; without those of LoRAs that are not on the device.
    """

    names: tuple[str, ...]
    stacks: tuple[Stack, ...]
    places: Mapping[int, tuple[int, int]]

    def parameters(self) -> list[Tensor]:
        """Returns the factors as a flat list, for an optimizer."""
        return [factor for stack in self.stacks for factor in chain.from_iterable(stack.factors.values())]

    def slot(self, name: str) -> dict[str, Factors]:
        """Returns the factors of one slot, ``(A [R, K], B [N, R])``, as views."""
        stack, row = self.places[index_of(name, self.names)]
        return self.stacks[stack].row(row)

    def state(self, name: str) -> LoRAState:
        """Copies one slot as a LoRA, of the slot's rank: in 16 bits the next multiple of 8."""
        return copied_state(self.slot(name))


def module_ranks(loras: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Returns the highest rank of each module, from the module's rank in every LoRA (`ranks_of`)."""
    ranks: dict[str, int] = {}
    for lora in loras:
        for module, rank in lora.items():
            ranks[module] = max(rank, ranks.get(module, 0))
    return ranks


def stacked(loras: Sequence[Mapping[str, int]], fixed: int = 0) -> list[list[int]]:
    """Groups LoRAs of the same layers and nearly the same ranks (`RANK_STEP`).

    Args:
        loras: the module's rank in every LoRA (`ranks_of`).
        fixed: LoRAs at the start that share no stack with the others.

    Returns:
        The numbers of each stack's LoRAs.
    """
    stacks: dict[object, list[int]] = {}
    for i, ranks in enumerate(loras):
        rounded = {module: -(-rank // RANK_STEP) for module, rank in ranks.items()}
        stacks.setdefault((i < fixed, frozenset(rounded.items())), []).append(i)
    return list(stacks.values())


def slot_rank(rank: int, dtype: torch.dtype) -> int:
    """Returns the ranks of a slot for LoRAs of this rank; those beyond it are zeros."""
    return -(-rank // ALIGNED_RANKS) * ALIGNED_RANKS if dtype.itemsize == 2 else rank


def slot_dtype(transformer: nn.Module) -> torch.dtype:
    """Returns the transformer's compute dtype; float32 if a slot cannot have it."""
    dtype = getattr(transformer, "dtype", None) or next(transformer.parameters()).dtype
    return dtype if dtype in SLOT_DTYPES else torch.float32


def empty_stack(layers: Mapping[str, nn.Linear], ranks: Mapping[str, int], count: int, dtype: torch.dtype) -> Stack:
    """Makes a stack of ``count`` LoRAs of zeros, on the device of each layer.

    Args:
        layers: of the transformer.
        ranks: the LoRAs' highest in each layer that the stack changes; `slot_rank` rounds them.
        count: LoRAs.
        dtype: of the factors.
    """
    factors = {}
    for module, rank in ranks.items():
        layer = layers[module]
        device = _device(layer)
        rank = slot_rank(rank, dtype)
        a = torch.zeros(count, rank, layer.in_features, dtype=dtype, device=device)
        b = torch.zeros(count, layer.out_features, rank, dtype=dtype, device=device)
        factors[module] = (a, b)
    return Stack(factors, torch.ones(count, device=_device(next(iter(layers.values())))))


def _device(layer: nn.Linear) -> torch.device:
    """Returns the device that a layer computes on; accelerate's hooks have it for weights that are elsewhere between calls."""
    hook = getattr(layer, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or layer.weight.device)


def strengths_of(norms: Mapping[str, Tensor], stack: Stack) -> dict[str, tuple[float, ...]]:
    """Returns ``|B A| / |W|``, Frobenius norms, of each LoRA of a stack in each of the layers whose ``|W|`` is given."""
    found = {}
    for module in stack.factors.keys() & norms.keys():
        a, b = (factor.to(norms[module].device).float() for factor in stack.factors[module])
        # |B A|^2 is the trace of (B^T B)(A A^T), of R x R matrices.
        squares = (b.mT @ b * (a @ a.mT)).sum((1, 2)).clamp(min=0)
        found[module] = tuple((squares.sqrt() / norms[module]).tolist())
    return found


def factors_of(state: LoRAState) -> dict[str, Factors]:
    """Returns each module's ``(lora_A [R, K], lora_B [N, R])``."""
    return {module: (lora.lora_A, lora.lora_B) for module, lora in state.modules.items()}


def ranks_of(state: LoRAState) -> dict[str, int]:
    """Returns each module's rank."""
    return {module: lora.rank for module, lora in state.modules.items()}


def bytes_of(factors: Mapping[str, Factors]) -> int:
    """Returns the memory of factors."""
    return sum(a.nbytes + b.nbytes for a, b in factors.values())


def copied_state(factors: Mapping[str, Factors]) -> LoRAState:
    """Makes a LoRA of copies of these factors."""
    return LoRAState({m: LoRAModule(a.detach().clone(), b.detach().clone()) for m, (a, b) in factors.items()})


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
