"""The needs of a distillation, by arithmetic: rows, passes, device memory by part, disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from clora.bank.pages import pages_that_fit, resident_bytes, stack_bytes
from clora.bank.slots import module_ranks
from clora.commands.plan.cost import PassCost
from clora.config.settings import DistillConfig
from clora.config.training import TrainConfig
from clora.data.prepare import renders_general
from clora.data.rendering import GENERAL_AT_ONCE, TEACHERS_AT_ONCE, samples_at_once
from clora.training.least_squares import (
    adapted_layers,
    layer_groups,
    moment_bytes,
    rows_at_once,
    solving_bytes,
    start_rows,
)

MASTER = GRADIENT = 4
"""Bytes of a trained value and of its gradient, float32 both."""
MOMENTS = {"adamw": 2, "muon": 1}
"""Values that an optimizer keeps for each trained one."""
BEFORE = ("encoders", "rendering", "start")
"""Parts of the memory that are not there while a run trains."""


@dataclass(frozen=True)
class Facts:
    """The facts about a pipeline and its teachers that the arithmetic needs.

    Attributes:
        transformer, encoders: bytes of the weights of the transformer, and of text encoders and autoencoder.
        dtype: of the transformer's arithmetic, and so of the bank's slots.
        shapes: of the transformer's linear layers.
        student: the layers that student and critic adapt.
        teachers: effect to layer to rank.
        blocks: number of blocks that gradient checkpointing computes again one by one.
        cost: of one row's pass.
    """

    transformer: int
    encoders: int
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, int]]
    student: Sequence[str]
    teachers: Mapping[str, Mapping[str, int]]
    blocks: int
    cost: PassCost


def weight_bytes(module: torch.nn.Module, folder: Path) -> int:
    """Returns the bytes of a component's weights, in its dtype or as its own configuration quantises them.

    Args:
        module: without its weights.
        folder: the folder it was saved in. A quantised component takes as much as its files. Where these are missing,
            the weights of linear layers count bitsandbytes' 4 or 8 bits, without their scales.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    quantised = config.get("quantization_config") or {}
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if quantised and stored:
        return stored
    full = sum(tensor.numel() * tensor.itemsize for tensor in (*module.parameters(), *module.buffers()))
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else None
    if bits is None:
        return full
    # transformers leaves the last layer of a language model as it is.
    head = getattr(module, "get_output_embeddings", lambda: None)()
    linear = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return full - sum(weight.numel() * (8 * weight.itemsize - bits) // 8 for weight in linear)


def rows_with_gradient(config: DistillConfig) -> int:
    """Most rows whose graphs are kept at once: a student update whose samples are all of the effect stream."""
    objective = config.objective
    parts = (objective.backward_simulation, objective.target_simulation, objective.trajectory_anchoring)
    # Each part of the loss that is on adds a row of each sample (docs/method.md section 4).
    rows = config.train.batch_size * max(1, sum(parts))
    return min(rows, config.train.stated_rows or rows)


def scoring_rows(config: DistillConfig) -> int:
    """Most rows of one scoring pass: critic, teacher and, with guidance, teacher with the empty prompt."""
    objective = config.objective
    scored = config.train.batch_size * (objective.backward_simulation + objective.target_simulation)
    rows = min(scored, rows_with_gradient(config)) * config.sampler.rows_per_scored_sample
    return min(rows, config.train.forward_rows or 2 * (config.train.stated_rows or rows))


def rendering_rows(config: DistillConfig) -> int:
    """Most rows of one pass while targets are rendered; 0 where all are given."""
    most = max(
        GENERAL_AT_ONCE if renders_general(config) else 0,
        TEACHERS_AT_ONCE if any(effect.targets is None for effect in config.effects) else 0,
    )
    return most and samples_at_once(config, most) * config.sampler.passes_per_teacher_step


def anchoring_passes(config: DistillConfig) -> float:
    """Forward passes of one row that cost as much as an update of the run's first part, which is anchoring only.

    A backward pass through a frozen base costs about as much as a forward pass, recomputation one more.
    """
    return config.train.batch_size * (3 if config.train.gradient_checkpointing else 2)


def forward_passes(config: DistillConfig) -> float:
    """The same for a student update after anchoring, its critic updates included.

    Streams count at their expected share, steps of the simulation at their mean.
    """
    objective, train = config.objective, config.train
    # Expected samples of an update: of the effect stream, scored, and anchored.
    effects = train.batch_size * (objective.switch_probability if objective.dual_stream else 1.0)
    scored = train.batch_size * objective.backward_simulation + effects * objective.target_simulation
    anchored = (train.batch_size if config.data.general_targets else effects) * objective.trajectory_anchoring
    learning = 3 if train.gradient_checkpointing else 2
    if not scored:
        return learning * anchored
    # A critic update: the simulation up to a random step, the student's prediction there, the critic's own pass.
    simulated = (config.sampler.steps - 1) / 2
    critic = train.critic_ratio * train.batch_size * (simulated + 1 + learning)
    if config.shares_prediction(config.train.stated_rows):
        critic -= train.batch_size
    return critic + learning * (scored + anchored) + scored * config.sampler.rows_per_scored_sample


def start_groups(facts: Facts, config: DistillConfig, available: int | None) -> list[list[str]]:
    """Returns the layers that a least-squares start fits, in the groups for which its passes are repeated; none for others.

    Args:
        facts: of the pipeline and its teachers.
        config: the settings.
        available: bytes of the device; None for unknown.
    """
    if config.student.init != "least_squares":
        return []
    layers = adapted_layers(facts.student, list(facts.teachers.values()))
    sizes = {layer: moment_bytes(facts.shapes[layer], _ranks(facts, layer)) for layer in layers}
    # When a run groups them, only the base and the teachers are on the device.
    free = None if available is None else max(0, available - facts.transformer - bank_bytes(facts, config))
    return layer_groups(sizes, free)


def _ranks(facts: Facts, layer: str) -> list[int]:
    """The ranks of the teachers that change a layer."""
    return [teacher[layer] for teacher in facts.teachers.values() if layer in teacher]


def start_passes(facts: Facts, config: DistillConfig, groups: Sequence[Sequence[str]]) -> float:
    """Forward passes of one row that a least-squares start costs: its own, and what their inputs' moments take."""
    each, general = start_rows(config, renders_general(config))
    # A product x x^T is two operations for each pair of a vector's values.
    moments = sum(2 * facts.cost.inputs[layer] * facts.shapes[layer][1] ** 2 for layer in chain(*groups))
    return (each * len(facts.teachers) + general) * (len(groups) + moments / facts.cost.flops)


def start_bytes(facts: Facts, config: DistillConfig, groups: Sequence[Sequence[str]]) -> int:
    """Bytes beside base and teachers while the start is fitted: a group's moments, and its passes or the fit of a layer."""
    block = rows_at_once(config) * facts.cost.saved // facts.blocks
    most = 0
    for group in groups:
        sizes = [(facts.shapes[layer], _ranks(facts, layer)) for layer in group]
        fit = max(solving_bytes(*size) for size in sizes)
        most = max(most, sum(moment_bytes(*size) for size in sizes) + max(fit, block))
    return most


def trained_values(facts: Facts, rank: int) -> int:
    """Values of the student's LoRA: ``rank x (in + out)`` for each of its layers."""
    return rank * sum(sum(facts.shapes[name]) for name in facts.student)


def bank_bytes(facts: Facts, config: DistillConfig) -> int:
    """Bytes of the bank: the critic, and the teachers or as many as fit. Raises CloraError for too few."""
    teachers = list(facts.teachers.values())
    pages = pages_that_fit(config.train.teacher_memory_gb, facts.shapes, teachers, facts.dtype)
    critic = stack_bytes(facts.shapes, dict.fromkeys(facts.student, config.student.rank), facts.dtype)
    if pages is None:
        return critic + resident_bytes(facts.shapes, teachers, facts.dtype)
    return critic + pages * stack_bytes(facts.shapes, module_ranks(teachers), facts.dtype)


def merged_bytes(facts: Facts) -> int:
    """Bytes of the weight into which a layer merges one LoRA after the other: that of the largest layer that any changes."""
    changed = {*facts.student, *(layer for teacher in facts.teachers.values() for layer in teacher)}
    return max(math.prod(facts.shapes[layer]) for layer in changed) * facts.dtype.itemsize


def num_kept(train: TrainConfig) -> int:
    """LoRAs in float32: student, critic and, with ``train.ema_decay``, the student's average."""
    return 2 if train.ema_decay is None else 3


def state_bytes(train: TrainConfig) -> int:
    """Bytes of both optimizers' states per trained value; Muon's stay in 32 bits."""
    # The critic's is always AdamW; only AdamW's moments can be in 8 bits.
    critic = MOMENTS["adamw"] * train.optimizer_bits // 8
    return critic + (critic if train.optimizer == "adamw" else 4 * MOMENTS[train.optimizer])


def memory(facts: Facts, config: DistillConfig, available: int | None = None) -> dict[str, int]:
    """Device memory by part, in bytes; ``encoders`` leave the device before the others come.

    ``rendering`` is everything on the device while targets are rendered, ``start`` while a least-squares start is fitted, 0 for
    other starts; the student's average counts as student.

    Args:
        facts: of the pipeline and its teachers.
        config: the settings.
        available: bytes of the device, of which a least-squares start fills a part; None for unknown.

    Raises:
        CloraError: ``train.teacher_memory_gb`` holds too few teachers.
    """
    train = config.train
    values = trained_values(facts, config.student.rank)
    bank = bank_bytes(facts, config)
    merged = merged_bytes(facts)
    # A pass without gradient holds the activations of one block at a time.
    block = facts.cost.saved // facts.blocks
    rows = rows_with_gradient(config)
    # The student's pass is kept while its samples are scored. With checkpointing a block is computed again for it later.
    saved = facts.cost.saved_checkpointed if train.gradient_checkpointing else facts.cost.saved
    recomputed = rows if train.gradient_checkpointing else 0
    learning = rows * saved + max(recomputed, scoring_rows(config)) * block
    groups = start_groups(facts, config, available)
    start = facts.transformer + bank + start_bytes(facts, config, groups) + merged if groups else 0
    return {
        "encoders": facts.encoders,
        "rendering": facts.transformer + bank + rendering_rows(config) * block + merged,
        "start": start,
        "base": facts.transformer,
        "teachers": bank,
        "student and critic": num_kept(train) * values * MASTER,
        "gradients": values * GRADIENT,
        "optimizers": values * state_bytes(train),
        "activations": max(learning, train.batch_size * block),
        "merged weight": merged,
    }


def peak(parts: Mapping[str, int]) -> int:
    """The most memory at once: encoding, rendering, fitting the start, or training."""
    return max(*(parts[name] for name in BEFORE), sum(size for name, size in parts.items() if name not in BEFORE))


def disk(facts: Facts, config: DistillConfig, encoded: int) -> dict[str, int]:
    """Disk by part, in bytes.

    Args:
        facts: of the pipeline and its teachers.
        config: the settings.
        encoded: values of the encoded pictures, prompts and targets.
    """
    values, train = trained_values(facts, config.student.rank), config.train
    # Student and critic, each with its optimizer, and the student's average.
    states = num_kept(train) * MASTER + state_bytes(train)
    # A new one is written before the oldest is removed.
    checkpoints = min(train.keep_checkpoints + 1, math.ceil(train.updates / train.checkpoint_every))
    return {
        "collection": values * facts.dtype.itemsize,
        "checkpoints while it trains": values * states * checkpoints,
        "encoded while it trains": encoded * facts.dtype.itemsize,
    }
