"""Training the studio's teachers by flow matching on pairs from photographs, group by group, one slot for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.slots import Slots
from clora.hashing import tensor_digest
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.state import LoRAState, fresh_lora
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.effects import EFFECTS
from clora.studio.making.base import pipeline_digest
from clora.studio.making.optimizers import rate_factor, resume
from clora.studio.making.pairs import Pairs, check_finite, gradient_sizes, pair_losses
from clora.studio.photographs import Photographs
from clora.studio.pixels import to_tensor
from clora.studio.precision import ReducedAdapter
from clora.studio.scenes import SIZES, make_scene, render
from clora.studio.teacher_files import TeacherSpec
from clora.studio.teachers import PAIRS, TEACHERS, kind_of
from clora.training.checkpoint import save_state

FIRST_SCENE = 200_000_000
UPDATES = 1000
"""Of each group."""
GROUP = 10
"""Teachers that are trained together, at most: all fifty would need five times the memory."""
ROWS = {64: 2, 128: 1}
"""Of each teacher in an update, by the side of its pictures."""
LEARNING_RATE = 2e-3
CHECKPOINT_EVERY = 100


def groups(specs: Sequence[TeacherSpec]) -> list[tuple[TeacherSpec, ...]]:
    """Splits teachers into groups of at most `GROUP` that have the same number of pairs."""
    made = []
    # Those of the same layers are neighbours: a pass multiplies their rows at once.
    ordered = sorted(specs, key=lambda spec: (num_pairs(spec), spec.attention_only))
    for _, equal in groupby(ordered, key=num_pairs):
        members = tuple(equal)
        made += [members[start : start + GROUP] for start in range(0, len(members), GROUP)]
    return made


def num_pairs(spec: TeacherSpec) -> int:
    """Returns how many pairs a teacher is trained on."""
    return PAIRS[kind_of(spec.effect)]


def train_group(
    pipeline,
    specs: Sequence[TeacherSpec],
    seed: int,
    checkpoint: Path,
    photographs: Photographs,
    report: Callable[[int, Mapping[str, float]], None],
) -> dict[str, LoRAState]:
    """Trains teachers with equal numbers of pairs in one bank; returns effect name to LoRA. They do not influence one another.

    A stopped run goes on to the same bits.

    Args:
        pipeline: the studio's, with its base.
        specs: the teachers; a teacher's scenes depend on its effect only.
        seed: of the first weights and the draws.
        checkpoint: a file, which stays when the training is done.
        photographs: whose train split the pairs are made of.
        report: called as ``report(update, {"loss": ...})``.

    Raises:
        CloraError: the checkpoint is of another run, or a loss or gradient is not finite; the latter names update and LoRA.
    """
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(seed)
    # A checkpoint belongs to one recipe, and to the pipeline that it was trained on.
    recipe = {
        "updates": UPDATES,
        "seed": seed,
        "rows": str(ROWS),
        "pictures": photographs.digest(),
        "pairs": pairs_digest(specs, photographs),
        "teachers": ", ".join(f"{spec} on {num_pairs(spec)} pairs" for spec in specs),
        "pipeline": pipeline_digest(pipeline, ("transformer", "vae", "text_encoder")),
    }
    with AdapterBank(transformer, fresh_loras(transformer, specs, generator), dtype=torch.float32) as bank:
        slots = bank.slots(trainable=True)
        optimizer = torch.optim.AdamW(slots.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        # Views of the slots: read by checkpoints, written by a resumed run.
        state = {str(i): factor.detach() for i, factor in enumerate(slots.parameters())}
        first = resume(checkpoint, state, {"teachers": optimizer}, generator, recipe)
        if first < UPDATES:
            adapters = {size: ReducedAdapter(pipeline, size) for size in ROWS}
            pairs = {size: encode_pairs(adapter, specs, photographs) for size, adapter in adapters.items()}
        for update in range(first, UPDATES):
            size = SIZES[update % 2]
            loss = _step(adapters[size], bank, slots, pairs[size], optimizer, generator, update)
            if (update + 1) % CHECKPOINT_EVERY == 0 or update + 1 == UPDATES:
                values = {"update": update + 1, "recipe": recipe}
                save_state(checkpoint, state, {"teachers": optimizer}, generator, values)
            report(update + 1, {"loss": loss})
        return {spec.effect: bank.state(spec.effect) for spec in specs}


def fresh_loras(transformer, specs: Sequence[TeacherSpec], generator: torch.Generator) -> dict[str, LoRAState]:
    """Makes the untrained LoRA of each teacher, by effect name."""
    layers = block_layers(transformer)
    attention = [name for name in layers if ".attn." in name]
    shapes = linear_shapes(transformer)
    return {
        spec.effect: fresh_lora(shapes, spec.rank, generator, attention if spec.attention_only else layers)
        for spec in specs
    }


def encode_pairs(adapter: Flux2KleinAdapter, specs: Sequence[TeacherSpec], photographs: Photographs) -> Pairs:
    """Draws and encodes the pairs of teachers with equal numbers of them, at the adapter's size; the same scenes at every size."""
    sources, targets = [], []
    for spec in specs:
        before, after = draw_pairs(spec, adapter.size[0], photographs)
        sources.append(adapter.encode_images(to_tensor(before)))
        targets.append(adapter.encode_images(to_tensor(after)))
    text = adapter.encode_prompts([EFFECTS[spec.effect].prompt for spec in specs])
    return Pairs(torch.stack(sources), torch.stack(targets), text)


def draw_pairs(
    spec: TeacherSpec, size: int, photographs: Photographs, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a teacher's pairs, or the first ``count``: pictures before and after, ``[M, size, size, 3]`` each.

    No other teacher has their scenes.
    """
    first = FIRST_SCENE + 1000 * TEACHERS.index(spec.effect)
    before, after = [], []
    for seed in range(first, first + (count or num_pairs(spec))):
        before.append(render(make_scene(seed, "train", photographs=photographs), size))
        after.append(EFFECTS[spec.effect].apply(before[-1], np.random.default_rng([seed, 4])))
    return np.stack(before), np.stack(after)


def pairs_digest(specs: Sequence[TeacherSpec], photographs: Photographs) -> str:
    """Returns the hash of each teacher's first pair, with which that of all changes where scenes or effects do."""
    first = {spec.effect: draw_pairs(spec, 64, photographs, 1) for spec in specs}
    return tensor_digest({name: torch.from_numpy(np.stack(pair)) for name, pair in first.items()})


def _step(
    adapter: Flux2KleinAdapter,
    bank: AdapterBank,
    slots: Slots,
    pairs: Pairs,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    update: int,
) -> float:
    """Makes one update of every slot; returns the mean loss."""
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate_factor(update, UPDATES, warmup=20, decay=0.5)
    rows = ROWS[adapter.size[0]]
    ids = torch.arange(len(slots.names)).repeat_interleave(rows)
    losses: Tensor = pair_losses(adapter, bank, slots, pairs, ids, generator)
    per_lora = losses.view(-1, rows)
    check_finite(per_lora.detach().sum(1), slots.names, update, "loss")
    optimizer.zero_grad(set_to_none=True)
    # Summed over LoRAs, so that each has the gradient that it would have if it were trained by itself.
    per_lora.mean(1).sum().backward()
    check_finite(gradient_sizes(slots), slots.names, update, "gradient")
    optimizer.step()
    return float(losses.detach().mean())
