"""Training the studio's teachers by flow matching, each on 20 pairs: all at once, in routed batches, one slot each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.devices import send
from clora.errors import CloraError
from clora.flow.matching import flow_matching_losses
from clora.lora.families import FLUX2
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.save import save_lora
from clora.lora.state import LoRAState, fresh_lora
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.effects import EFFECTS
from clora.studio.pixels import to_tensor
from clora.studio.scenes import make_scene, render
from clora.studio.teachers import SPECS, TeacherSpec

FIRST_SCENE = 200_000_000
PAIRS = 20
UPDATES = 700
ROWS_PER_LORA = 2  # in every batch
LEARNING_RATE = 2e-3
SHIFT = 2.0  # of the noise levels
KOHYA_ALPHA = 4.0


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


def encode_pairs(adapter: Flux2KleinAdapter, specs: Sequence[TeacherSpec]) -> Pairs:
    """Renders and encodes the training pairs of some teachers; no other teacher and no evaluation has their scenes."""
    sources = []
    targets = []
    for spec in specs:
        index = SPECS.index(spec)
        rng = np.random.default_rng([index, 4])
        before = [render(make_scene(FIRST_SCENE + 1000 * index + i)) for i in range(PAIRS)]
        after = [EFFECTS[spec.effect].apply(image, rng) for image in before]
        sources.append(adapter.encode_images(to_tensor(np.stack(before))))
        targets.append(adapter.encode_images(to_tensor(np.stack(after))))
    text = adapter.encode_prompts([EFFECTS[spec.effect].prompt for spec in specs])
    return Pairs(torch.stack(sources), torch.stack(targets), text)


def train_teachers(
    adapter: Flux2KleinAdapter,
    specs: Sequence[TeacherSpec],
    seed: int,
    report: Callable[[int, Mapping[str, float]], None],
) -> dict[str, LoRAState]:
    """Trains teachers together; returns effect name to LoRA."""
    transformer = adapter.pipeline.transformer
    generator = torch.Generator().manual_seed(seed)
    layers = block_layers(transformer)
    attention = [name for name in layers if ".attn." in name]
    shapes = linear_shapes(transformer)
    fresh = {
        spec.effect: fresh_lora(shapes, spec.rank, generator, attention if spec.attention_only else layers)
        for spec in specs
    }
    with AdapterBank(transformer, fresh, dtype=torch.float32) as bank:
        train_loras(adapter, bank, bank.slots(trainable=True), encode_pairs(adapter, specs), seed, report)
        return {spec.effect: bank.state(spec.effect) for spec in specs}


def train_loras(
    adapter: ModelAdapter,
    bank: AdapterBank,
    slots: Slots,
    pairs: Pairs,
    seed: int,
    report: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Trains every slot of ``slots`` on its own pairs; slots do not influence one another.

    The learning rate of AdamW rises over the first 20 updates and falls linearly over the second half.

    Args:
        adapter: the model family, around the pipeline whose transformer carries the bank.
        bank: the bank.
        slots: trainable slots, in the order of ``pairs``.
        pairs: encoded training pairs.
        seed: of the draws.
        report: called as ``report(update, {"loss": ...})``.

    Raises:
        CloraError: a loss or gradient is not finite; names the update and the LoRA.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(slots.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    # Every batch has the same number of rows of each LoRA: [0, 0, 1, 1, ...].
    ids = torch.arange(len(slots.names)).repeat_interleave(ROWS_PER_LORA)
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (update + 1) / 20, 2 * (UPDATES - update) / UPDATES)
        losses = pair_losses(adapter, bank, slots, pairs, ids, generator)
        per_lora = losses.view(-1, ROWS_PER_LORA)
        check_finite(per_lora.detach().sum(1), slots.names, update, "loss")
        optimizer.zero_grad(set_to_none=True)
        # Summed over LoRAs, so that each has the gradient that it would have if it were trained by itself.
        per_lora.mean(1).sum().backward()
        check_finite(gradient_sizes(slots), slots.names, update, "gradient")
        optimizer.step()
        report(update + 1, {"loss": float(losses.detach().mean())})


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


def save_teacher(spec: TeacherSpec, state: LoRAState, folder: Path) -> Path:
    """Writes one teacher in its format under ``folder``; returns the file or folder that a user would point at."""
    path = folder / (spec.effect if spec.format == "peft" else f"{spec.effect}.safetensors")
    alpha = KOHYA_ALPHA if spec.format == "kohya" else None
    save_lora(state, path, spec.format, alpha=alpha, dtype=torch.float16, family=FLUX2)
    return path
