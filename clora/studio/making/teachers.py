"""Training the studio's teachers by flow matching, each on 20 pairs: all at once, in routed batches, one slot each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.state import LoRAState, fresh_lora
from clora.models import ModelAdapter
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.effects import EFFECTS
from clora.studio.making.pairs import Pairs, check_finite, gradient_sizes, pair_losses
from clora.studio.pixels import to_tensor
from clora.studio.scenes import make_scene, render
from clora.studio.teacher_files import TeacherSpec
from clora.studio.teachers import SPECS

FIRST_SCENE = 200_000_000
PAIRS = 20
UPDATES = 700
ROWS_PER_LORA = 2  # in every batch
LEARNING_RATE = 2e-3


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
