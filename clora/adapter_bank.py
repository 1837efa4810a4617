"""The bank: student, critic and teachers as slots of one stack of low-rank deltas on one frozen transformer.

Which sample uses which slot is a value, `Routing`, that a pass carries through `AdapterBank.route`; nothing is
switched, copied or merged between passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clora.errors import CloraError, nearest
from clora.lora.state import LoRAModule, LoRAState
from clora.ops import multi_lora_linear


@dataclass(frozen=True, eq=False)
class Slots:
    """A contiguous range of slots, as the factors that a pass multiplies with.

    Attributes:
        names: the slots, in order.
        factors: per module ``(lora_A [E, R, K], lora_B [E, N, R])``; views into the bank, so that training one range
            is seen by every other.
    """

    names: tuple[str, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def parameters(self) -> list[Tensor]:
        """The factors as a flat list, for an optimizer."""
        return [factor for pair in self.factors.values() for factor in pair]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which slot each sample of a batch uses: ``adapter_ids [B]`` index ``slots``, -1 is the base alone."""

    slots: Slots
    adapter_ids: Tensor


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
        return Slots(names, factors)

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


class RoutedLinear(nn.Module):
    """A frozen linear layer plus the slots that the running pass routes its samples to."""

    def __init__(self, base: nn.Linear, module: str, bank: AdapterBank):
        super().__init__()
        self.base = base
        self.module = module
        self._bank = [bank]  # in a list: a plain attribute, not a submodule of this layer

    def forward(self, x: Tensor) -> Tensor:
        routing = self._bank[0].routing
        if routing is None:
            raise RuntimeError("the transformer has an adapter bank attached: run it inside bank.route(...)")
        a, b = routing.slots.factors[self.module]
        rows = x if x.ndim == 3 else x.unsqueeze(1)
        scale = torch.ones(len(a), device=x.device)
        ids = _ids_of_rows(routing.adapter_ids, len(rows))
        y = multi_lora_linear(rows, self.base.weight, self.base.bias, a, b, scale, ids)
        return y if x.ndim == 3 else y.squeeze(1)


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
