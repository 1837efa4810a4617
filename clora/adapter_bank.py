"""The bank: student, critic and teachers as slots of one stack of low-rank deltas on one frozen transformer.

Which sample uses which slot is a value, `Routing`, that a pass carries through `AdapterBank.route`; nothing is
switched, copied or merged between passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clora.errors import CloraError, nearest
from clora.lora.state import LoRAModule, LoRAState
from clora.ops import multi_lora_linears

SHARED_INPUTS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)
"""Names of layers of one parent that read the same tensor, in the order in which transformers call them."""


@dataclass(frozen=True, eq=False)
class Slots:
    """A contiguous range of slots, as the factors that a pass multiplies with.

    Attributes:
        names: the slots, in order.
        factors: per module ``(lora_A [E, R, K], lora_B [E, N, R])``; views into the bank, so that training one range
            is seen by every other.
        scale: ones ``[E]``; the states' own scales are in their factors.
    """

    names: tuple[str, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    scale: Tensor

    def parameters(self) -> list[Tensor]:
        """The factors as a flat list, for an optimizer."""
        return [factor for pair in self.factors.values() for factor in pair]


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
    """Low-rank slots attached to a transformer's linear layers.

    Args:
        transformer: its linear layers named by the states are wrapped in place; ``detach`` restores them.
        states: slot name to LoRA. Ranks and modules may differ: shorter ranks are padded with zeros and a module that
            a LoRA lacks is zero there, so nothing of another slot can leak.

    Raises:
        CloraError: no state given, or a state names a module that the transformer does not have.
    """

    def __init__(self, transformer: nn.Module, states: Mapping[str, LoRAState]):
        if not states:
            raise CloraError("expected at least one LoRA for the bank, found none")
        modules = list(dict.fromkeys(m for state in states.values() for m in state.modules))
        _check_modules(transformer, modules)
        self.transformer = transformer
        self.names = tuple(states)
        self.routing: Routing | None = None
        self._layers: dict[str, RoutedLinear] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        for module in modules:
            base = transformer.get_submodule(module)
            self._stacks[module] = _stack(base, [state.modules.get(module) for state in states.values()])
            self._layers[module] = RoutedLinear(base, module, self)
            _replace(transformer, module, self._layers[module])
        self._groups = _groups({module: layer.base.in_features for module, layer in self._layers.items()})

    def slots(self, names: Sequence[str] | None = None, rank: int | None = None, trainable: bool = False) -> Slots:
        """A range of neighbouring slots (default: all), its factors cut to ``rank`` and set to take gradients or not.

        Raises:
            CloraError: a name is unknown, or the names are not neighbours in the bank's order.
        """
        names = tuple(self.names if names is None else names)
        first = _index(names[0], self.names)
        if self.names[first : first + len(names)] != names:
            raise CloraError(f"expected neighbouring slots of {list(self.names)}, found {list(names)}")
        rows = slice(first, first + len(names))
        factors = {
            module: (a[rows, :rank].requires_grad_(trainable), b[rows, :, :rank].requires_grad_(trainable))
            for module, (a, b) in self._stacks.items()
        }
        device = next(iter(factors.values()))[0].device
        return Slots(names, factors, torch.ones(len(names), device=device))

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

    def state(self, name: str, rank: int | None = None) -> LoRAState:
        """A copy of one slot as a LoRA, its factors cut to ``rank``."""
        i = _index(name, self.names)
        modules = {
            module: LoRAModule(a[i, :rank].detach().clone(), b[i, :, :rank].detach().clone())
            for module, (a, b) in self._stacks.items()
        }
        return LoRAState(modules)

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
        slots, layers = self.routing.slots, [self._layers[module].base for module in modules]
        projections = [
            (layer.weight, layer.bias, *slots.factors[module]) for module, layer in zip(modules, layers, strict=True)
        ]
        rows = x if x.ndim == 3 else x.unsqueeze(1)
        ids = _ids_of_rows(self.routing.adapter_ids, len(rows))
        outputs = multi_lora_linears(rows, projections, slots.scale, ids)
        return {module: y if x.ndim == 3 else y.squeeze(1) for module, y in zip(modules, outputs, strict=True)}


class RoutedLinear(nn.Module):
    """A frozen linear layer plus the slots that the running pass routes its samples to."""

    def __init__(self, base: nn.Linear, module: str, bank: AdapterBank):
        super().__init__()
        self.base = base
        self.module = module
        self._bank = [bank]  # in a list: a plain attribute, not a submodule of this layer

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


def _ids_of_rows(adapter_ids: Tensor, count: int) -> Tensor:
    """Ids of a layer's rows. A layer may see the batch twice over, as a modulation that also gives that of timestep 0."""
    return adapter_ids if len(adapter_ids) == count else adapter_ids.repeat(count // len(adapter_ids))


def _index(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise CloraError(f"unknown adapter {name!r}; the bank has {list(names)}{nearest(name, names)}")
    return names.index(name)


def _check_modules(transformer: nn.Module, modules: Sequence[str]) -> None:
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for name in sorted(set(modules) - set(linear)):
        raise CloraError(f"the transformer has no linear layer {name!r}{nearest(name, linear)}")


def _stack(base: nn.Linear, modules: Sequence[LoRAModule | None]) -> tuple[Tensor, Tensor]:
    """Zero-padded factors ``[S, R, K]`` and ``[S, N, R]`` in fp32 on the layer's device."""
    rank = max(module.rank for module in modules if module is not None)
    a = torch.zeros(len(modules), rank, base.in_features, device=base.weight.device)
    b = torch.zeros(len(modules), base.out_features, rank, device=base.weight.device)
    for i, module in enumerate(modules):
        if module is not None:
            a[i, : module.rank] = module.lora_A
            b[i, :, : module.rank] = module.lora_B
    return a, b


def _replace(transformer: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)


def fresh_lora(
    shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator, modules: Sequence[str] | None = None
) -> LoRAState:
    """An untrained LoRA: Kaiming-uniform ``lora_A``, zero ``lora_B``, so that its delta is zero.

    Args:
        shapes: module path to ``(out, in)`` (`clora.lora.files.linear_shapes`).
        rank: rank of every module.
        generator: source of ``lora_A``.
        modules: the modules to adapt; all of ``shapes`` by default.
    """

    def module(out_features: int, in_features: int) -> LoRAModule:
        bound = in_features**-0.5
        a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        return LoRAModule(a, torch.zeros(out_features, rank))

    return LoRAState({name: module(*shapes[name]) for name in (shapes if modules is None else modules)})
