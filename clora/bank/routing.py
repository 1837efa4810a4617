"""One routed pass: how a linear layer computes a batch whose samples use different LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clora.bank.slots import Slots
from clora.errors import CloraError
from clora.ops import multi_lora_add, multi_lora_linears

SHARED_INPUTS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)
"""Names of layers of one parent that read the same tensor, in the order in which transformers call them."""


@dataclass(eq=False)
class RoutedPass:
    """One pass of the transformer: the slot of each sample, and the outputs that were computed before their layer's turn.

    Layers that read the same tensor (q, k and v of an attention) are computed by one call of the op: it is read once.
    But the transformer calls them one by one. So the first call of a group computes all its layers and returns its own
    output; the others' wait until their layers are called.

    Attributes:
        slots: the slots that the ids count.
        adapter_ids: ``[B]`` on the transformer's device, -1 for only the base.
        layers: module to the frozen layer.
        groups: module to the modules of its group, itself among them (`shared_inputs`).
        scale: ``[E]`` that every slot's change is multiplied by; by default the slots' own.
        waiting: module to the tensor that it was computed from and its output.
    """

    slots: Slots
    adapter_ids: Tensor
    layers: Mapping[str, nn.Linear]
    groups: Mapping[str, tuple[str, ...]]
    scale: Tensor
    waiting: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
        factors = {module: self.slots.factors[module] for module in modules if module in self.slots.factors}
        # The ops take tokens, [B, T, K]. One vector for each sample, as of the time step, is one token.
        tokens = x if x.ndim == 3 else x.unsqueeze(1)
        ids = ids_of_rows(self.adapter_ids, x, modules[0])
        outputs = {}

        # Plain layers: base and low-rank part of all of them in one call of the op.
        fused = [module for module in factors if is_plain(self.layers[module], x)]
        if fused:
            projections = [(self.layers[m].weight, self.layers[m].bias, *factors[m]) for m in fused]
            together = multi_lora_linears(tokens, projections, self.scale, ids)
            for module, y in zip(fused, together, strict=True):
                outputs[module] = y if x.ndim == 3 else y.squeeze(1)

        # Quantised or hooked layers are called as they are, and the low-rank part is added to what they return.
        for module in modules:
            if module in outputs:
                continue
            y = outputs[module] = self.layers[module](x)
            if module in factors:
                base = y if x.ndim == 3 else y.unsqueeze(1)
                added = multi_lora_add(base, tokens, *factors[module], self.scale, ids)
                outputs[module] = added.reshape(y.shape)
        return outputs


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


def ids_of_rows(adapter_ids: Tensor, x: Tensor, module: str) -> Tensor:
    """Returns the ids ``[R]`` of the R rows of a layer's input.

    A layer of one vector per sample ``[B, K]`` may see the batch twice, one after the other: a modulation that is also
    computed for timestep 0.

    Raises:
        CloraError: there are more or fewer rows of tokens than samples. In which order they belong to the samples is
            unknown: several pictures of a prompt are neighbours, negative prompts follow all prompts. Or the rows are not
            samples, as in embedders that read the tokens of all samples at once.
    """
    num_samples, num_rows = len(adapter_ids), len(x)
    if num_samples == 1 or num_rows == num_samples or (x.ndim == 2 and num_rows == 2 * num_samples):
        return adapter_ids.repeat(num_rows // num_samples)
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


def is_plain(layer: nn.Linear, x: Tensor) -> bool:
    """Returns True for a layer that is only its weight and bias: not quantised, without hooks, and of the input's dtype."""
    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, torch.Tensor)
    return plain and not hooked and layer.weight.dtype == x.dtype
