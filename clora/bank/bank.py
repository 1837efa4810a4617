"""The bank: student, critic and teachers as slots of one stack of low-rank deltas on one frozen transformer.

Which sample uses which slot is a value, the `RoutedPass` that `AdapterBank.route` opens; nothing is switched, copied or
merged between passes. See docs/method.md section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clora.bank.pages import Pages, host_factors, module_ranks
from clora.bank.routing import RoutedPass, shared_inputs
from clora.bank.slots import (
    Factors,
    Slots,
    bytes_of,
    copied_state,
    empty_slots,
    factors_of,
    fill,
    index_of,
    ranks_of,
    slot_dtype,
    squared_norm,
)
from clora.errors import CloraError, nearest
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState


class BankBytes(NamedTuple):
    """Memory of a bank's factors, on the transformer's device and, for paged ones, on the host."""

    device: int
    host: int


class RoutedLinear(nn.Module):
    """Stands in for a frozen linear layer: computes it with the slots that the running pass routes its samples to."""

    routed_layer = True  # by which `clora.lora.layers.transformer_of` finds it

    def __init__(self, base: nn.Linear, module: str, bank: AdapterBank):
        super().__init__()
        self.base = base
        self.module = module
        # In a list, so that torch does not take the bank's transformer for a submodule of this layer.
        self._bank = [bank]

    @property
    def weight(self) -> Tensor:
        """The base's: Z-Image casts a layer's input to the dtype of its weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's: diffusers reads it where it fuses projections."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        running = self._bank[0].running
        if running is None:
            raise CloraError(
                "the transformer has an adapter bank attached: run it inside bank.route(...), or detach the bank"
            )
        return running.output(self.module, x)


class AdapterBank:
    """Low-rank slots attached to a transformer's linear layers, which `detach` restores.

    ::

        with AdapterBank(transformer, {"snow": snow, "ink": ink}) as bank:
            with bank.route(bank.slots(), torch.tensor([1, 0, -1])):  # ink, snow, only the base
                ...  # a pass of the transformer on a batch of three samples

    Args:
        transformer: the linear layers that the states name are wrapped in place.
        states: slot name to LoRA. Ranks and modules may differ: shorter ranks are padded with zeros and a module that
            a LoRA lacks is zero there, so nothing of another slot can leak.
        dtype: of the slots; None for the transformer's compute dtype.
        pages: None gives every LoRA a slot. With a number, LoRAs after the first ``fixed`` stay on the host. They take
            turns in this number of slots on the device, after the slots of the fixed ones; see `placed`.
        fixed: with pages, the number of LoRAs that keep their slot.

    Raises:
        CloraError: no state is given, or one names a linear layer that the transformer does not have.
    """

    def __init__(
        self,
        transformer: nn.Module,
        states: Mapping[str, LoRAState],
        *,
        dtype: torch.dtype | None = None,
        pages: int | None = None,
        fixed: int = 0,
    ):
        if not states:
            raise CloraError("expected at least one LoRA for the bank, found none")
        ranks = module_ranks([ranks_of(state) for state in states.values()])
        linear = linear_shapes(transformer)
        for module in sorted(set(ranks) - set(linear)):
            raise CloraError(f"the transformer has no linear layer {module!r}{nearest(module, linear)}")
        self.transformer = transformer
        self.names = tuple(states)
        self.dtype = dtype or slot_dtype(transformer)
        self.running: RoutedPass | None = None
        self._layers: dict[str, nn.Linear] = {module: transformer.get_submodule(module) for module in ranks}
        self._groups = shared_inputs({module: layer.in_features for module, layer in self._layers.items()})

        # One stack: a slot for each LoRA that stays on the device, then the pages, in which the others take turns.
        resident = self.names if pages is None else self.names[:fixed]
        self._resident = len(resident)
        names = (*resident, *(f"page {i}" for i in range(pages or 0)))
        self._all = empty_slots(self._layers, ranks, names, self.dtype)
        for name in resident:
            fill(self._all.slot(name), factors_of(states[name]))
        page_stacks = {m: (a[self._resident :], b[self._resident :]) for m, (a, b) in self._all.factors.items()}
        pinned = self._all.scale.is_cuda
        on_host = [host_factors(factors_of(states[n]), self.dtype, pinned) for n in self.names[self._resident :]]
        self._pages = Pages(page_stacks, on_host)

        for module, layer in self._layers.items():
            transformer.set_submodule(module, RoutedLinear(layer, module, self))

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def slots(self, names: Sequence[str] | None = None, rank: int | None = None, trainable: bool = False) -> Slots:
        """Returns a range of neighbouring slots (default: all), views cut to ``rank`` that take gradients or not.

        Raises:
            CloraError: a name is unknown, or the names are not neighbours in the bank's order.
            ValueError: slots of 16 bits were to be trained.
        """
        if trainable and self.dtype.itemsize < 4:
            raise ValueError(f"slots of {self.dtype} cannot be trained: build the bank with dtype=torch.float32")
        names = tuple(self._all.names if names is None else names)
        first = index_of(names[0], self._all.names)
        if self._all.names[first : first + len(names)] != names:
            raise CloraError(f"expected neighbouring slots of {list(self._all.names)}, found {list(names)}")
        # Views, not copies: the steps of an optimizer change the slots themselves.
        rows = slice(first, first + len(names))
        factors = {
            module: (a[rows, :rank].requires_grad_(trainable), b[rows, :, :rank].requires_grad_(trainable))
            for module, (a, b) in self._all.factors.items()
        }
        return Slots(names, factors, self._all.scale[rows])

    def trained(self, name: str, state: LoRAState) -> Slots:
        """Returns a LoRA that takes gradients, in fp32 on storage of its own: the kernels round it as they read it.

        Raises:
            CloraError: it has a module that none of the bank's LoRAs has.
        """
        for module in state.modules:
            index_of(module, tuple(self._layers), "module")
        layers = {module: self._layers[module] for module in state.modules}
        slots = empty_slots(layers, ranks_of(state), (name,), torch.float32)
        fill(slots.slot(name), factors_of(state))
        for factor in slots.parameters():
            factor.requires_grad_()
        return slots

    def write(self, name: str, slots: Slots) -> None:
        """Sets a slot to that of the same name in ``slots``, rounded to the bank's dtype; ranks must not be higher."""
        fill(self._all.slot(name), slots.slot(name))

    @contextmanager
    def route(self, slots: Slots, adapter_ids: Tensor) -> Iterator[None]:
        """Inside, sample b of the transformer runs on slot ``adapter_ids[b]`` of ``slots``; -1 is only the base."""
        if self.running is not None:
            raise CloraError("a routed pass is already running on this bank; end it before the next bank.route(...)")
        self.running = RoutedPass(slots, adapter_ids, self._layers, self._groups, slots.scale)
        try:
            yield
        finally:
            self.running = None

    @contextmanager
    def placed(self, ids: Tensor) -> Iterator[Tensor]:
        """Yields each LoRA's slot number ``[B]``; no other LoRA takes these slots until the block ends.

        `chunks` splits batches that need too many.

        Args:
            ids: on the CPU, index into ``names`` or -1 for only the base.
        """
        with self._pages.held(self._paged(ids)) as page_of:
            # LoRAs and slots have the same numbers up to the first page; from there on, pages count from zero.
            slot_of = {lora + self._resident: page + self._resident for lora, page in page_of.items()}
            yield torch.tensor([slot_of.get(i, i) for i in ids.tolist()], dtype=ids.dtype)

    def fetch(self, ids: Tensor) -> None:
        """Begins to copy the LoRAs ``ids`` (as in `placed`) to the device, as far as there are pages to spare."""
        self._pages.fetch(self._paged(ids))

    def chunks(self, ids: Tensor, limit: int) -> list[slice]:
        """Splits rows so that each part has at most ``limit``, and no more LoRAs than there are pages for."""
        # Greedy: a part ends where one more row would be one too many, or would need one more page than there are.
        starts = [0]
        for row in range(1, len(ids)):
            part = ids[starts[-1] : row + 1]
            if len(part) > limit or len(self._paged(part)) > self._pages.count:
                starts.append(row)
        return [slice(start, end) for start, end in pairwise([*starts, len(ids)])]

    def _paged(self, ids: Tensor) -> list[int]:
        """Returns the distinct paged LoRAs among ``ids``, as `Pages` counts them."""
        return [i - self._resident for i in dict.fromkeys(ids.tolist()) if i >= self._resident]

    def state(self, name: str, rank: int | None = None) -> LoRAState:
        """Copies one LoRA as it is stored, its factors cut to ``rank``."""
        return copied_state(self._stored(name), rank)

    def squared_norms(self) -> dict[str, float]:
        """Returns the sum of the squares of each LoRA's factors as they are stored."""
        return {name: squared_norm(self._stored(name)) for name in self.names}

    def _stored(self, name: str) -> Mapping[str, Factors]:
        """Returns a LoRA's slot, or its copy on the host."""
        i = index_of(name, self.names)
        return self._all.slot(name) if i < self._resident else self._pages.loras[i - self._resident]

    def bytes(self) -> BankBytes:
        """Returns the memory of all factors."""
        return BankBytes(bytes_of(self._all.factors), sum(bytes_of(lora) for lora in self._pages.loras))

    def detach(self) -> None:
        """Restores the transformer's own layers exactly."""
        for module, layer in self._layers.items():
            self.transformer.set_submodule(module, layer)
