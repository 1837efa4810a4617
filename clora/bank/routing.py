"""One routed pass: how a linear layer computes a batch whose samples use different LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from clora.bank.slots import Factors, Slots
from clora.devices import send
from clora.errors import CloraError
from clora.ops import Run, chosen, multi_lora_add, multi_lora_linears, runs_of

SHARED_INPUTS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)
"""Names of layers of one parent that read the same tensor, in the order in which transformers call them."""


@dataclass(eq=False)
class RoutedStack:
    """A stack in a pass.

    Attributes:
        factors, strengths: as in `clora.bank.slots.Stack`.
        given: ``[E]`` the stack's own scale.
        scale: ``[E]`` that the changes of its LoRAs are multiplied by.
        ids: ``[B]`` row of each sample's LoRA, on the device; -1 where it is of another stack or only the base.
    """

    factors: Mapping[str, Factors]
    strengths: Mapping[str, tuple[float, ...]]
    given: Tensor
    scale: Tensor
    ids: Tensor


class Part(NamedTuple):
    """Neighbouring rows of a layer's input that the op computes in one call.

    Attributes:
        rows: None for all.
        stacks: whose LoRAs these rows use, at most one outside of a compiled graph; with the rows' ids and runs.
    """

    rows: slice | None
    stacks: Sequence[tuple[RoutedStack, Tensor, tuple[Run, ...] | None]]


@dataclass(eq=False)
class RoutedPass:
    """One pass of the transformer: the slot of each sample, and the outputs that were computed before their layer's turn.

    Layers that read the same tensor (q, k and v of an attention) are computed by one call of the op: it is read once.
    But the transformer calls them one by one. So the first call of a group computes all its layers and returns its own
    output; the others' wait until their layers are called.

    Attributes:
        num_samples: B.
        samples: stack and row of each, on the host; one with only the base stands in its neighbour's stack, with row -1.
        stacks: those that the samples use.
        layers: module to the frozen layer.
        groups: module to the modules of its group, itself among them (`shared_inputs`).
        waiting: module to the tensor that it was computed from and its output.
        parts: of the rows of a layer's input, by their number.
        by_value: which rows use which stack and LoRA is read from the ids on the device, so that a CUDA graph fits other
            batches; as within torch.compile.
        choices: backend and design of the ops, read from the environment once a pass.
    """

    num_samples: int
    samples: Sequence[tuple[int, int]]
    stacks: Sequence[RoutedStack]
    layers: Mapping[str, nn.Linear]
    groups: Mapping[str, tuple[str, ...]]
    waiting: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    parts: dict[int, Sequence[Part]] = field(default_factory=dict)
    by_value: bool = False
    choices: Mapping[str, str] = field(default_factory=chosen)

    @staticmethod
    def of(
        slots: Slots,
        ids: Sequence[int],
        layers: Mapping[str, nn.Linear],
        groups: Mapping[str, tuple[str, ...]],
        device: torch.device,
    ) -> RoutedPass:
        """Makes the pass of samples with these slots, -1 for only the base; sends the ids to the device, once."""
        places = [slots.places[i] if i >= 0 else (-1, -1) for i in ids]
        used = sorted({stack for stack, _ in places if stack >= 0})  # in one order, so that one graph serves it
        rows = [[row if stack == i else -1 for stack, row in places] for i in used]
        on_device = send(torch.tensor(rows, dtype=torch.int64), device)
        stacks = []
        for own, i in zip(on_device, used, strict=True):
            stack = slots.stacks[i]
            stacks.append(RoutedStack(stack.factors, stack.strengths, stack.scale, stack.scale, own))
        samples = []
        neighbour = 0
        for stack, row in places:
            neighbour = used.index(stack) if stack >= 0 else neighbour
            samples.append((neighbour, row))
        return RoutedPass(len(ids), samples, stacks, layers, groups)

    def strengthen(self, strength: float) -> None:
        """Multiplies the scales that the slots came with; a strength of before no longer counts."""
        for stack in self.stacks:
            stack.scale = stack.given * strength if strength != 1.0 else stack.given
            if abs(strength) < 1:
                stack.strengths = {}  # weaker than they were measured: nothing is merged in 16 bits

    def output(self, module: str, x: Tensor) -> Tensor:
        """Returns a layer's output ``[B, T, N]`` of ``x [B, T, K]``, or ``[B, N]`` of ``[B, K]``."""
        source, y = self.waiting.pop(module, (None, None))
        # The same tensor is the same object: a transformer hands one variable to q, k and v. Comparing values instead
        # would read the device and make the host wait. An id() would not do, since a freed tensor's can be given to
        # the next one; the object itself, held here, cannot be freed. torch.compile resolves `is` while it traces.
        if source is x:
            return y
        # Something waits, but of another tensor: in cross attention k and v read the text, not the queries' tokens. Then
        # the group's other layers do not read x either.
        modules = self.groups[module] if source is None else (module,)
        outputs = self._compute(modules, x)
        y = outputs.pop(module)
        for other, waiting in outputs.items():
            self.waiting[other] = (x, waiting)
        return y

    def _compute(self, modules: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
        """Returns the outputs of layers that all read x: ``W x + bias + B_e (A_e x)`` with each sample's slot e."""
        parts = self._parts(x, modules)
        # Quantised or hooked layers are called as they are, and the low-rank part is added to what they return.
        called = {module: self.layers[module](x) for module in modules if not is_plain(self.layers[module], x.dtype)}
        # The ops take tokens, [B, T, K]. One vector for each sample, as of the time step, is one token.
        one_token = x.ndim == 2
        if one_token:
            x = x.unsqueeze(1)
            called = {module: y.unsqueeze(1) for module, y in called.items()}
        # Parts of a pass without gradient are written to one output; else they are joined.
        whole: dict[str, Tensor] = {}
        if len(parts) > 1 and not torch.is_grad_enabled():
            for module in modules:
                if module not in called:
                    whole[module] = x.new_empty(*x.shape[:2], self.layers[module].out_features)
        pieces: dict[str, list[Tensor]] = {module: [] for module in modules if module not in whole}
        for part in parts:
            own = x if part.rows is None else x[part.rows]
            outputs = {module: y if part.rows is None else y[part.rows] for module, y in called.items()}
            places = {module: y[part.rows] for module, y in whole.items()}
            for stack, ids, runs in part.stacks:
                self._add(outputs, modules, own, stack, ids, runs, places)
            for module in modules:
                if module not in outputs:
                    outputs[module] = self.layers[module](own)
                    if module in places:
                        places[module].copy_(outputs[module])
                if module in pieces:
                    pieces[module].append(outputs[module])
        whole |= {module: own[0] if len(own) == 1 else torch.cat(own) for module, own in pieces.items()}
        return {module: y.squeeze(1) for module, y in whole.items()} if one_token else whole

    def _add(self, outputs: dict[str, Tensor], modules, x, stack: RoutedStack, ids, runs, places) -> None:
        """Adds a stack's low-rank part to the outputs of layers; those without an output yet get theirs with the base."""
        factors = {module: stack.factors[module] for module in modules if module in stack.factors}
        later = [module for module in factors if module not in outputs]
        backend = self.choices["backend"]
        for module in factors:
            if module not in later:
                base = outputs[module]
                outputs[module] = multi_lora_add(base, x, *factors[module], stack.scale, ids, backend=backend)
        if later:
            projections = [(self.layers[m].weight, self.layers[m].bias, *factors[m]) for m in later]
            # A graph must not depend on them.
            strengths = None if runs is None else [stack.strengths.get(module) for module in later]
            out = [places[module] for module in later] if places else None
            routed = {"runs": runs, "strengths": strengths, "out": out}
            together = multi_lora_linears(x, projections, stack.scale, ids, **routed, **self.choices)
            outputs.update(zip(later, together, strict=True))

    def _parts(self, x: Tensor, modules: tuple[str, ...]) -> Sequence[Part]:
        """Returns the parts of these layers' input."""
        # A graph takes the number of samples from a tensor: a number of Python's would be a constant of the graph.
        is_compiled = torch.compiler.is_compiling() and self.stacks
        repeats = repeats_of(len(self.stacks[0].ids) if is_compiled else self.num_samples, x, modules[0])
        if not any(module in stack.factors for stack in self.stacks for module in modules):
            return [Part(None, [])]
        if self.by_value or torch.compiler.is_compiling():
            # A graph fits other batches: each stack is added to all rows.
            return [Part(None, [(stack, stack.ids.repeat(repeats), None) for stack in self.stacks])]
        if len(x) not in self.parts:
            self.parts[len(x)] = self._split(repeats)
        return self.parts[len(x)]

    def _split(self, repeats: int) -> list[Part]:
        """Splits rows where the stack changes."""
        parts = []
        start = 0
        for i, samples in groupby([*self.samples] * repeats, key=lambda sample: sample[0]):
            own = [row for _, row in samples]
            rows = slice(start, start + len(own))
            parts.append(Part(rows, [(self.stacks[i], self.stacks[i].ids.repeat(repeats)[rows], runs_of(own))]))
            start += len(own)
        return parts if len(parts) > 1 else [Part(None, parts[0].stacks)]


def shared_inputs(in_features: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Returns each module's group, itself among it: layers of one parent and one input size that `SHARED_INPUTS` names."""
    groups = {}
    for module, size in in_features.items():
        name = module.rpartition(".")[2]
        parent = module.removesuffix(name)
        # Of one input size: in cross attention k and v read another tensor than q, often of another width.
        names = next((group for group in SHARED_INPUTS if name in group), (name,))
        groups[module] = tuple(parent + other for other in names if in_features.get(parent + other) == size)
    return groups


def repeats_of(num_samples: int, x: Tensor, module: str) -> int:
    """Returns how often the samples stand among the R rows of a layer's input, one after the other.

    A layer of one vector per sample ``[B, 1, K]`` may see the batch twice, one after the other: a modulation that is also
    computed for timestep 0. A single sample may be several rows.

    Raises:
        CloraError: there are more or fewer rows of tokens than samples. In which order they belong to the samples is
            unknown: several pictures of a prompt are neighbours, negative prompts follow all prompts. Or the rows are not
            samples, as in embedders that read the tokens of all samples at once.
    """
    num_rows = len(x)
    if num_samples == 1 or num_rows == num_samples or (x.ndim == 2 and num_rows == 2 * num_samples):
        return num_rows // num_samples
    if x.ndim == 3 and num_rows % num_samples == 0:
        raise CloraError(
            f"{num_samples} adapters are routed, but the batch has {num_rows} samples; give one name for each, in the order of "
            "the batch: a, a, b, b for two pictures of each prompt, a, b, a, b where negative prompts follow the prompts"
        )
    if num_rows < num_samples:
        raise CloraError(
            f"{num_samples} adapters are routed, but the batch has {num_rows} sample{'s' * (num_rows > 1)}; give "
            "one name per sample"
        )
    raise CloraError(
        f"the layer {module!r} gets {num_rows} rows of {num_samples} routed samples, so that a LoRA cannot be chosen for "
        "each; route one adapter per sample, or, where its rows are not samples, leave this layer out of the LoRAs"
    )


def is_plain(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Returns True for a layer that is only its weight and bias: not quantised, without hooks, of its input's dtype."""
    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, torch.Tensor, FakeTensor)  # fake: counted
    return plain and not hooked and layer.weight.dtype == dtype
