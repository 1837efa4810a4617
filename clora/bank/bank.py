"""The bank: student, critic and teachers as slots of one stack of low-rank deltas on one frozen transformer.

Which sample uses which slot is a value, `Routing`, that a pass carries through `AdapterBank.route`; nothing is
switched, copied or merged between passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clora.bank.pages import Pages, host_factors, module_ranks
from clora.bank.slots import Slots, copied_state, empty_slots, factors_of, fill, index_of, slot_dtype, squared_norm
from clora.errors import CloraError, nearest
from clora.lora.state import LoRAState
from clora.ops import multi_lora_add, multi_lora_linears

SHARED_INPUTS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)
"""Names of layers of one parent that read the same tensor, in the order in which transformers call them."""


class BankBytes(NamedTuple):
    """Memory of a bank's factors, on the transformer's device and, for paged ones, on the host."""

    device: int
    host: int


@dataclass(frozen=True, eq=False)
class Routing:
    """One pass: which slot each sample of its batch uses, and the outputs that wait in it.

    Attributes:
        slots: what the ids count.
        adapter_ids: ``[B]``, -1 is the base alone.
        waiting: by group of modules, the input of its last call and the outputs that were not yet asked for, by module.
    """

    slots: Slots
    adapter_ids: Tensor
    waiting: dict[tuple[str, ...], tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)


class AdapterBank:
    """Low-rank slots attached to a transformer's linear layers, which `detach` restores.

    ::

        with AdapterBank(transformer, {"snow": snow, "ink": ink}) as bank:
            with bank.route(bank.slots(), torch.tensor([1, 0, -1])):  # ink, snow, the base alone
                ...  # a pass of the transformer on a batch of three samples

    Args:
        transformer: the linear layers that the states name are wrapped in place.
        states: slot name to LoRA. Ranks and modules may differ: shorter ranks are padded with zeros and a module that
            a LoRA lacks is zero there, so nothing of another slot can leak.
        dtype: of the slots; None for the transformer's own (of its arithmetic, where its weights are quantised).
        pages: None gives every LoRA a slot. A number keeps those after the first ``fixed`` on the host, and so many
            slots for them on the device, after the fixed ones'; see `placed`.
        fixed: with pages, the number of LoRAs that keep their slot.

    Raises:
        CloraError: no state given, or a state names a module that the transformer does not have.
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
        ranks = module_ranks([{m: lora.rank for m, lora in state.modules.items()} for state in states.values()])
        _check_modules(transformer, list(ranks))
        self.transformer = transformer
        self.names = tuple(states)
        self.dtype = dtype or slot_dtype(transformer)
        self.routing: Routing | None = None
        layers = {module: transformer.get_submodule(module) for module in ranks}
        self._layers = {module: RoutedLinear(layer, module, self) for module, layer in layers.items()}
        resident = self.names if pages is None else self.names[:fixed]
        self._resident = len(resident)
        self._all = empty_slots(layers, ranks, (*resident, *(f"page {i}" for i in range(pages or 0))), self.dtype)
        for name in resident:
            fill(self._all.slot(name), factors_of(states[name]))
        self._pages = None if pages is None else self._paged([states[name] for name in self.names[fixed:]])
        for module, routed in self._layers.items():
            _replace(transformer, module, routed)
        self._groups = _groups({module: layer.in_features for module, layer in layers.items()})

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def slots(self, names: Sequence[str] | None = None, rank: int | None = None, trainable: bool = False) -> Slots:
        """A range of neighbouring slots (default: all), views cut to ``rank`` and set to take gradients or not.

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
        rows = slice(first, first + len(names))
        factors = {
            module: (a[rows, :rank].requires_grad_(trainable), b[rows, :, :rank].requires_grad_(trainable))
            for module, (a, b) in self._all.factors.items()
        }
        return Slots(names, factors, self._all.scale[rows])

    def trained(self, name: str, state: LoRAState) -> Slots:
        """A LoRA that takes gradients, in fp32 on storage of its own: the kernels round it as they read it.

        Raises:
            CloraError: it has a module that none of the bank's LoRAs has.
        """
        for module in state.modules:
            index_of(module, tuple(self._layers), "module")
        layers = {module: self._layers[module].base for module in state.modules}
        ranks = {module: lora.rank for module, lora in state.modules.items()}
        slots = empty_slots(layers, ranks, (name,), torch.float32)
        fill(slots.slot(name), factors_of(state))
        for factor in slots.parameters():
            factor.requires_grad_()
        return slots

    def write(self, name: str, slots: Slots) -> None:
        """Sets a slot to that of the same name in ``slots``, rounded to the bank's dtype; ranks must not be higher."""
        fill(self._all.slot(name), slots.slot(name))

    @contextmanager
    def route(self, slots: Slots, adapter_ids: Tensor) -> Iterator[None]:
        """Runs the transformer inside with sample b on slot ``adapter_ids[b]`` of ``slots``."""
        if self.routing is not None:
            raise RuntimeError("a routed pass is already running on this bank")
        self.routing = Routing(slots, adapter_ids)
        try:
            yield
        finally:
            self.routing = None

    @contextmanager
    def placed(self, ids: Tensor) -> Iterator[Tensor]:
        """The slots ``[B]`` of LoRAs ``ids [B]``, which stay there inside; see `chunks` for how many are possible.

        Args:
            ids: on the CPU, index into ``names`` or -1 for the base alone.
        """
        if self._pages is None:
            yield ids
            return
        with self._pages.held(self._distinct_paged(ids)) as page:
            table = {lora + self._resident: slot + self._resident for lora, slot in page.items()}
            yield torch.tensor([table.get(i, i) for i in ids.tolist()], dtype=ids.dtype)

    def fetch(self, ids: Tensor) -> None:
        """Begins to copy the LoRAs ``ids`` (as in `placed`) to the device, as far as there are pages to spare."""
        if self._pages is not None:
            self._pages.fetch(self._distinct_paged(ids))

    def chunks(self, ids: Tensor, limit: int) -> list[slice]:
        """Splits rows so that each part has at most ``limit``, and no more LoRAs than there are pages for."""
        starts, most = [0], len(self.names) if self._pages is None else self._pages.count
        for row in range(1, len(ids)):
            part = ids[starts[-1] : row + 1]
            if len(part) > limit or len(self._distinct_paged(part)) > most:
                starts.append(row)
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]

    def state(self, name: str, rank: int | None = None) -> LoRAState:
        """A copy of one LoRA as it is stored, its factors cut to ``rank``."""
        i = index_of(name, self.names)
        if i < self._resident:
            return self._all.state(name, rank)
        return copied_state(self._pages.loras[i - self._resident], rank)

    def squared_norms(self) -> dict[str, float]:
        """The sum of the squares of each LoRA's factors as they are stored."""
        loras = [self._all.slot(name) for name in self.names[: self._resident]]
        loras += [] if self._pages is None else self._pages.loras
        return {name: squared_norm(lora) for name, lora in zip(self.names, loras, strict=True)}

    def bytes(self) -> BankBytes:
        """The memory of all factors."""
        host = [] if self._pages is None else [f for lora in self._pages.loras for pair in lora.values() for f in pair]
        return BankBytes(*(sum(f.numel() * f.element_size() for f in part) for part in (self._all.parameters(), host)))

    def detach(self) -> None:
        """Restores the transformer's own layers exactly."""
        for module, layer in self._layers.items():
            _replace(self.transformer, module, layer.base)

    def output(self, module: str, x: Tensor) -> Tensor:
        """A layer's output in the running pass.

        The first layer of a group (q of q, k and v) has the others computed with it; they find their outputs waiting
        where they are given the same tensor. A layer that is given another one is computed alone.
        """
        if self.routing is None:
            raise RuntimeError("the transformer has an adapter bank attached: run it inside bank.route(...)")
        group, waiting = self._groups[module], self.routing.waiting
        source, outputs = waiting.get(group, (x, {}))
        if module not in outputs:
            source, outputs = waiting[group] = x, self._compute(group, x)
        y = outputs.pop(module)
        if not outputs:
            del waiting[group]
        return y if source is x else self._compute((module,), x)[module]

    def _compute(self, modules: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
        """Plain layers with slots by one call of the op; others are called themselves, and their slots' part added."""
        slots, layers = self.routing.slots, {module: self._layers[module].base for module in modules}
        rows = x if x.ndim == 3 else x.unsqueeze(1)
        ids = _ids_of_rows(self.routing.adapter_ids, len(rows), modules[0])
        fused = [module for module in modules if module in slots.factors and _is_plain(layers[module], x)]
        projections = [(layers[module].weight, layers[module].bias, *slots.factors[module]) for module in fused]
        given = multi_lora_linears(rows, projections, slots.scale, ids) if fused else []
        outputs = {module: y if x.ndim == 3 else y.squeeze(1) for module, y in zip(fused, given, strict=True)}
        for module in [module for module in modules if module not in outputs]:
            y = layers[module](x)
            if module in slots.factors:
                base = y if x.ndim == 3 else y.unsqueeze(1)
                y = multi_lora_add(base, rows, *slots.factors[module], slots.scale, ids).reshape(y.shape)
            outputs[module] = y
        return outputs

    def _paged(self, states: Sequence[LoRAState]) -> Pages:
        stacks = {module: (a[self._resident :], b[self._resident :]) for module, (a, b) in self._all.factors.items()}
        pinned = self._all.scale.is_cuda
        return Pages(stacks, [host_factors(factors_of(state), self.dtype, pinned) for state in states])

    def _distinct_paged(self, ids: Tensor) -> list[int]:
        return [i - self._resident for i in dict.fromkeys(ids.tolist()) if i >= self._resident]


class RoutedLinear(nn.Module):
    """A frozen linear layer plus the slots that the running pass routes its samples to."""

    def __init__(self, base: nn.Linear, module: str, bank: AdapterBank):
        super().__init__()
        self.base = base
        self.module = module
        self._bank = [bank]  # in a list: a plain attribute, not a submodule of this layer

    @property
    def weight(self) -> Tensor:
        """The base's: Z-Image asks a layer for the dtype to give it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._bank[0].output(self.module, x)


def _groups(in_features: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Each module's group, itself among it: layers of one parent and one input size that `SHARED_INPUTS` names."""
    groups = defaultdict(list)
    place = {name: (family, i) for family in SHARED_INPUTS for i, name in enumerate(family)}
    for module, size in in_features.items():
        parent, _, name = module.rpartition(".")
        family, i = place.get(name, (name, 0))
        groups[parent, family, size].append((i, module))
    return {module: tuple(m for _, m in sorted(group)) for group in groups.values() for _, module in group}


def _ids_of_rows(adapter_ids: Tensor, count: int, module: str) -> Tensor:
    """Ids of a layer's rows. A layer may see the batch twice over, as a modulation that also gives that of timestep 0.

    Raises:
        CloraError: rows are no samples, as in embedders that get the tokens of all samples in one.
    """
    num_samples = len(adapter_ids)
    if num_samples == 1 or count in (num_samples, 2 * num_samples):
        return adapter_ids.repeat(count // num_samples)
    raise CloraError(
        f"the layer {module!r} gets {count} rows of {num_samples} routed samples, so that a LoRA cannot be chosen for "
        "each; route one adapter per sample, or, where its rows are no samples, leave this layer out of the LoRAs"
    )


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether a layer is what its weight says: not quantised, no hook on it, and of the input's dtype."""
    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor)
    return plain and not hooked and layer.weight.dtype == x.dtype


def _check_modules(transformer: nn.Module, modules: Sequence[str]) -> None:
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for name in sorted(set(modules) - set(linear)):
        raise CloraError(f"the transformer has no linear layer {name!r}{nearest(name, linear)}")


def _replace(transformer: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)
