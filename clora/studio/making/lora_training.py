"""Training effect LoRAs by flow matching on before/after pairs; many at once, one slot each, in routed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.devices import send
from clora.errors import CloraError
from clora.flow.matching import flow_matching_losses
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text


@dataclass(frozen=True)
class Pairs:
    """Encoded before/after pairs, on the CPU of E LoRAs: sources and targets ``[E, M, T, C]``, encoded prompts, E rows."""

    sources: Tensor
    targets: Tensor
    text: Text


def train_loras(
    adapter: ModelAdapter,
    bank: AdapterBank,
    slots: Slots,
    pairs: Pairs,
    *,
    updates: int,
    rows_per_lora: int,
    learning_rate: float,
    shift: float,
    seed: int,
    report: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Trains every slot of ``slots`` on its own pairs; slots do not influence one another.

    Args:
        adapter: the model family, around the pipeline whose transformer carries the bank.
        bank: the bank.
        slots: trainable slots, in the order of ``pairs``.
        pairs: encoded training pairs.
        updates: optimizer updates; the learning rate falls linearly over the second half.
        rows_per_lora: samples of each LoRA in a batch.
        learning_rate: peak AdamW learning rate.
        shift: time shift of the noise levels.
        seed: of the draws.
        report: called as ``report(update, {"loss": ...})``.

    Raises:
        CloraError: a loss or gradient is not finite; names the update and the LoRA.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(slots.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ids = torch.arange(len(slots.names)).repeat_interleave(rows_per_lora)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (update + 1) / 20, 2 * (updates - update) / updates)
        losses = _losses(adapter, bank, slots, pairs, ids, shift, generator)
        _check_finite(losses.detach().view(-1, rows_per_lora).sum(1), slots.names, update, "loss")
        optimizer.zero_grad(set_to_none=True)
        losses.view(-1, rows_per_lora).mean(1).sum().backward()
        _check_finite(_gradients(slots), slots.names, update, "gradient")
        optimizer.step()
        report(update + 1, {"loss": float(losses.detach().mean())})


def _losses(adapter, bank, slots: Slots, pairs: Pairs, ids: Tensor, shift: float, generator) -> Tensor:
    """Flow-matching loss of each row, ``[B]``."""
    device = adapter.pipeline.transformer.device
    sample = torch.randint(pairs.sources.shape[1], ids.shape, generator=generator)
    x0 = send(pairs.targets[ids, sample].float(), device)
    conditioning = Conditioning(pairs.text[ids], pairs.sources[ids, sample].float()).to(device)
    with bank.route(slots, send(ids, device)):
        return flow_matching_losses(lambda x, s: adapter.velocity(x, s, conditioning), x0, shift, generator)


def _gradients(slots: Slots) -> Tensor:
    """The size of each LoRA's gradient, ``[E]``."""
    return sum(p.grad.flatten(1).abs().sum(1) for p in slots.parameters() if p.grad is not None)


def _check_finite(values: Tensor, names: tuple[str, ...], update: int, what: str) -> None:
    """Raises CloraError where one of ``values [E]`` is not finite."""
    bad = ~torch.isfinite(values)
    if bad.any():
        name = names[int(bad.nonzero()[0, 0])]
        raise CloraError(f"update {update + 1}: the {what} of LoRA {name!r} is not finite; lower the learning rate")
