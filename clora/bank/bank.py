"""The bank: student, critic and teachers as slots of low-rank deltas on one frozen transformer.

Which sample uses which slot is a value, the `RoutedPass` that `AdapterBank.route` opens; nothing is switched, copied or
merged between passes. See docs/method.md section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from clora.bank.pages import Pages, host_factors
from clora.bank.routing import RoutedPass, is_plain, shared_inputs
from clora.bank.slots import (
    Factors,
    Slots,
    Stack,
    bytes_of,
    copied_state,
    empty_stack,
    factors_of,
    fill,
    index_of,
    module_ranks,
    ranks_of,
    slot_dtype,
    squared_norm,
    stacked,
    strengths_of,
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
        bank = self._bank[0]
        running = bank.running
        if running is None:
            raise CloraError(
                "the transformer has an adapter bank attached: run it inside bank.route(...), or detach the bank"
            )
        if bank.observer is not None:
            bank.observer(self.module, x)
        return running.output(self.module, x)


class AdapterBank:
    """Low-rank slots attached to a transformer's linear layers, which `detach` restores.

    ::

        with AdapterBank(transformer, {"snow": snow, "ink": ink}) as bank:
            with bank.route(bank.slots(), [1, 0, -1]):  # ink, snow, only the base
                ...  # a pass of the transformer on a batch of three samples

    Args:
        transformer: the linear layers that the states name are wrapped in place.
        states: slot name to LoRA. Ranks and modules may differ: LoRAs of the same modules and nearly the same ranks share
            a stack (`stacked`), in which shorter ranks are padded with zeros, in 16 bits to a multiple of 8 (`slot_rank`).
        dtype: of the slots; None for the transformer's compute dtype.
        pages: None gives every LoRA a slot. With a number, LoRAs after the first ``fixed`` stay on the host. They take
            turns in this number of slots on the device, each as large as the largest of them; see `placed`.
        fixed: the number of LoRAs at the start that keep their slot, which `write` may change. They share no stack with the
            others, with pages and without: a batch is then computed in the same parts.

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
        loras = [ranks_of(state) for state in states.values()]
        ranks = module_ranks(loras)
        linear = linear_shapes(transformer)
        for module in sorted(set(ranks) - set(linear)):
            raise CloraError(f"the transformer has no linear layer {module!r}{nearest(module, linear)}")
        self.transformer = transformer
        self.names = tuple(states)
        self.dtype = dtype or slot_dtype(transformer)
        self.running: RoutedPass | None = None
        self.observer: Callable[[str, Tensor], None] | None = None
        self._ranks = dict(zip(self.names, loras, strict=True))
        self._layers: dict[str, nn.Linear] = {module: transformer.get_submodule(module) for module in ranks}
        self._groups = shared_inputs({module: layer.in_features for module, layer in self._layers.items()})
        self._fixed = fixed
        self._resident = len(states) if pages is None else fixed
        paged = range(self._resident, len(states))
        pool = empty_stack(self._layers, module_ranks([loras[i] for i in paged]), pages or 0, self.dtype)
        stacks: list[Stack] = []
        places: dict[int, tuple[int, int]] = {}
        # Each stack of LoRAs that stay on the device is memory of its own. To paged ones the pages look like a stack of
        # their layers and ranks, so that nothing is multiplied that they do not have.
        self._paged_in: dict[int, int] = {}
        self._paged_strengths: dict[int, dict[str, float]] = {}
        for members in stacked(loras, fixed):
            ranks = module_ranks([loras[i] for i in members])
            if members[0] < self._resident:
                places |= {lora: (len(stacks), row) for row, lora in enumerate(members)}
                stacks.append(empty_stack(self._layers, ranks, len(members), self.dtype))
            else:
                self._paged_in |= dict.fromkeys(members, len(stacks))
                stacks.append(pool.cut(ranks))
        self._all = Slots(self.names, tuple(stacks), places)
        for name in self.names[: self._resident]:
            fill(self._all.slot(name), factors_of(states[name]))
        self._device = pool.scale.device
        on_host = [
            host_factors(factors_of(states[self.names[i]]), self.dtype, self._device.type == "cuda") for i in paged
        ]
        self._pages = Pages([stacks[self._paged_in[i]] for i in paged], on_host, pages or 0, self._device)
        if self.dtype.itemsize == 2:
            self._measure_strengths()
        own = [stack for i, stack in enumerate(stacks) if i not in self._paged_in.values()]
        self._bytes = BankBytes(sum(bytes_of(stack.factors) for stack in [*own, pool]), sum(map(bytes_of, on_host)))

        for module, layer in self._layers.items():
            transformer.set_submodule(module, RoutedLinear(layer, module, self))
        self._is_attached = True

    def _measure_strengths(self) -> None:
        """Gives the stacks the strengths of the LoRAs that stay as they are; those of paged ones wait for their page."""
        constant = {stack for lora, (stack, _) in self._all.places.items() if lora >= self._fixed}
        # Once for all LoRAs: a transformer is large. Fake weights, of which passes are only counted, have no norm.
        norms = {
            module: layer.weight.float().norm()
            for module, layer in self._layers.items()
            if is_plain(layer, self.dtype) and not isinstance(layer.weight, FakeTensor)
        }
        stacks = [
            replace(stack, strengths=strengths_of(norms, stack)) if i in constant else stack
            for i, stack in enumerate(self._all.stacks)
        ]
        self._all = replace(self._all, stacks=tuple(stacks))
        for lora, factors in enumerate(self._pages.loras, self._resident):
            single = Stack({module: (a[None], b[None]) for module, (a, b) in factors.items()}, torch.ones(1))
            self._paged_strengths[lora] = {module: own for module, (own,) in strengths_of(norms, single).items()}

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def slots(self, names: Sequence[str] | None = None, trainable: bool = False) -> Slots:
        """Returns a range of neighbouring slots (default: all), views that take gradients or not.

        Raises:
            CloraError: a name is unknown, or the names are not neighbours in the bank's order.
            ValueError: slots of 16 bits were to be trained, or LoRAs that share pages were asked for.
        """
        if trainable and self.dtype.itemsize < 4:
            raise ValueError(f"slots of {self.dtype} cannot be trained: build the bank with dtype=torch.float32")
        names = tuple(self.names[: self._resident] if names is None else names)
        first = index_of(names[0], self.names)
        if self.names[first : first + len(names)] != names:
            raise CloraError(f"expected neighbouring slots of {list(self.names)}, found {list(names)}")
        if first + len(names) > self._resident:
            raise ValueError(f"expected LoRAs with slots of their own, found {list(names)}: see `placed`")
        # Views, not copies: the steps of an optimizer change the slots themselves. A stack's rows are in the bank's
        # order, so that neighbouring slots are neighbours there too.
        rows: dict[int, list[int]] = {}
        places = {}
        for slot in range(len(names)):
            stack, row = self._all.places[first + slot]
            rows.setdefault(stack, []).append(row)
            places[slot] = (list(rows).index(stack), len(rows[stack]) - 1)
        stacks = tuple(self._all.stacks[i].rows(slice(own[0], own[-1] + 1)) for i, own in rows.items())
        slots = Slots(names, stacks, places)
        for factor in slots.parameters():
            factor.requires_grad_(trainable)
        return slots

    def trained(self, name: str, state: LoRAState) -> Slots:
        """Returns a LoRA that takes gradients, in fp32 on storage of its own: the kernels round it as they read it.

        Raises:
            CloraError: it has a module that none of the bank's LoRAs has.
        """
        for module in state.modules:
            index_of(module, tuple(self._layers), "module")
        stack = empty_stack(self._layers, ranks_of(state), 1, torch.float32)
        fill(stack.row(0), factors_of(state))
        slots = Slots((name,), (stack,), {0: (0, 0)})
        for factor in slots.parameters():
            factor.requires_grad_()
        return slots

    def write(self, name: str, slots: Slots) -> None:
        """Sets a slot to that of the same name in ``slots``, rounded to the bank's dtype; ranks must not be higher.

        Raises:
            CloraError: the bank has no such LoRA.
            ValueError: it is none of the first ``fixed``. The strength that the others are merged by in 16 bits is measured
                once.
        """
        if index_of(name, self.names) >= self._fixed:
            raise ValueError(f"expected one of the first fixed={self._fixed} LoRAs, which may change, found {name!r}")
        fill(self._all.slot(name), slots.slot(name))

    @contextmanager
    def route(self, slots: Slots, adapter_ids: Tensor | Sequence[int]) -> Iterator[None]:
        """Inside, sample b of the transformer runs on slot ``adapter_ids[b]`` of ``slots``; -1 is only the base.

        Args:
            slots: from `slots`, `trained` or `placed`.
            adapter_ids: ``[B]``, on the CPU: which samples share a LoRA is decided there. A tensor elsewhere is read,
                which makes the host wait.

        Raises:
            CloraError: a routed pass is running on this bank, or the bank is detached.
        """
        if not self._is_attached:
            raise CloraError("the bank is detached, so that a pass would have only the base; attach the LoRAs again")
        if self.running is not None:
            raise CloraError("a routed pass is already running on this bank; end it before the next bank.route(...)")
        ids = adapter_ids.tolist() if isinstance(adapter_ids, Tensor) else adapter_ids
        with self.resumed(RoutedPass.of(slots, ids, self._layers, self._groups, self._device)):
            yield

    @contextmanager
    def resumed(self, routed: RoutedPass) -> Iterator[None]:
        """Inside, the transformer runs as in another pass."""
        before, self.running = self.running, replace(routed, waiting={})
        try:
            yield
        finally:
            self.running = before

    @contextmanager
    def observed(self, observer: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, ``observer(module, x)`` is called with the input ``[B, ..., K]`` of every layer of a pass, before its output.

        Unlike torch's hooks it leaves the layers plain, so that a pass computes what it does without. Passes inside must be
        neither compiled nor recorded as CUDA graphs: these would call it only once.
        """
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    @contextmanager
    def placed(self, ids: Tensor) -> Iterator[Slots]:
        """Yields slots that count as ``names`` does and have the LoRAs ``ids``, which no other takes until the block ends.

        `chunks` splits batches that need too many.

        Args:
            ids: on the CPU, index into ``names`` or -1 for only the base.
        """
        with self._pages.held(self._paged(ids)) as page_of:
            loras = {page_lora + self._resident: page for page_lora, page in page_of.items()}
            pages = {lora: (self._paged_in[lora], page) for lora, page in loras.items()}
            yield replace(self._all, stacks=self._stacks_with(pages), places={**self._all.places, **pages})

    def _stacks_with(self, pages: Mapping[int, tuple[int, int]]) -> tuple[Stack, ...]:
        """Returns the stacks, those of pages with the strengths of the LoRAs that are in them now.

        Args:
            pages: stack and page by LoRA.
        """
        if not self._paged_strengths:
            return self._all.stacks
        stacks = list(self._all.stacks)
        for i in {stack for stack, _ in pages.values()}:
            inside = {page: self._paged_strengths[lora] for lora, (stack, page) in pages.items() if stack == i}
            strengths = {}
            for module in stacks[i].factors:
                strengths[module] = tuple(inside.get(page, {}).get(module, 0.0) for page in range(self._pages.count))
            stacks[i] = replace(stacks[i], strengths=strengths)
        return tuple(stacks)

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

    def state(self, name: str) -> LoRAState:
        """Copies one LoRA as it is stored, in its own layers and ranks."""
        return copied_state(self._stored(name))

    def squared_norms(self) -> dict[str, float]:
        """Returns the sum of the squares of each LoRA's factors as they are stored."""
        return {name: squared_norm(self._stored(name)) for name in self.names}

    def _stored(self, name: str) -> Mapping[str, Factors]:
        """Returns a LoRA's slot without the padding, or its copy on the host."""
        i = index_of(name, self.names)
        if i >= self._resident:
            return self._pages.loras[i - self._resident]
        slot = self._all.slot(name)
        return {m: (slot[m][0][:rank], slot[m][1][:, :rank]) for m, rank in self._ranks[name].items()}

    def bytes(self) -> BankBytes:
        """Returns the memory of all factors."""
        return self._bytes

    def detach(self) -> None:
        """Restores the transformer's own layers exactly; nothing can be routed any more."""
        for module, layer in self._layers.items():
            self.transformer.set_submodule(module, layer)
        self._is_attached = False
