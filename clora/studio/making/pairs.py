"""Pairs of pictures before and after an effect, and the loss of LoRAs that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.devices import send
from clora.errors import CloraError
from clora.flow.matching import flow_matching_losses
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text

SHIFT = 2.0  # of the noise levels


@dataclass(frozen=True)
class Pairs:
    """Encoded before/after pairs of E LoRAs, on the CPU.

    Attributes:
        sources: ``[E, M, T, C]``.
        targets: ``[E, M, T, C]``.
        text: encoded prompts, E rows.
    """

    sources: Tensor
    targets: Tensor
    text: Text


def pair_losses(
    adapter: ModelAdapter,
    bank: AdapterBank,
    slots: Slots,
    pairs: Pairs,
    ids: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Computes the flow-matching loss of each row, ``[B]``."""
    device = adapter.pipeline.transformer.device
    sample = torch.randint(pairs.sources.shape[1], ids.shape, generator=generator)
    x0 = send(pairs.targets[ids, sample].float(), device)
    conditioning = Conditioning(pairs.text[ids], pairs.sources[ids, sample].float()).to(device)
    with bank.route(slots, ids):
        return flow_matching_losses(lambda x, s: adapter.velocity(x, s, conditioning), x0, SHIFT, generator)


def gradient_sizes(slots: Slots) -> Tensor:
    """Returns the sum ``[E]`` of the absolute gradients of each slot."""
    per_stack = []
    for stack in slots.stacks:
        gradients = [factor.grad for factor in chain.from_iterable(stack.factors.values()) if factor.grad is not None]
        per_stack.append(sum(gradient.flatten(1).abs().sum(1) for gradient in gradients))
    places = [slots.places[slot] for slot in range(len(slots.names))]
    return torch.stack([per_stack[stack][row] for stack, row in places])


def check_finite(values: Tensor, names: tuple[str, ...], update: int, what: str) -> None:
    """Raises CloraError where one of ``values [E]`` is not finite."""
    bad = ~torch.isfinite(values)
    if bad.any():
        name = names[int(bad.nonzero()[0, 0])]
        raise CloraError(f"update {update + 1}: the {what} of LoRA {name!r} is not finite; lower the learning rate")
