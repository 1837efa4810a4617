"""The arithmetic of a distillation: device memory by part, disk, passes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clora.bank.pages import module_ranks, page_bytes, pages_that_fit
from clora.commands.plan.cost import PassCost
from clora.config.settings import DistillConfig, TrainConfig
from clora.data.prepare import renders_general
from clora.data.rendering import GENERAL_AT_ONCE, TEACHERS_AT_ONCE, samples_at_once

MASTER = GRADIENT = 4
"""Bytes of a trained value and of its gradient, float32 both."""
MOMENTS = {"adamw": 2, "muon": 1}
"""Values that an optimizer keeps of each trained one."""

Shapes = Mapping[str, tuple[int, int]]
Ranks = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Facts:
    """What the arithmetic reads of a pipeline and its teachers.

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
    shapes: Shapes
    student: Sequence[str]
    teachers: Ranks
    blocks: int
    cost: PassCost


def weight_bytes(module: torch.nn.Module, folder: Path) -> int:
    """Bytes of a component's weights: of its dtype, or what its own configuration quantises them to.

    Args:
        module: without its weights.
        folder: it was saved in. A quantised one takes as much as its files; where these are not there, bitsandbytes' 4
            or 8 bits are counted for the weights of linear layers but the last of a language model, without their scales.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    full = sum(tensor.numel() * tensor.itemsize for tensor in (*module.parameters(), *module.buffers()))
    quantised = config.get("quantization_config") or {}
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else None
    if quantised and stored:
        return stored
    if bits is None:
        return full
    head = getattr(module, "get_output_embeddings", lambda: None)()  # transformers leaves it as it is
    linear = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return full - sum(weight.numel() * (8 * weight.itemsize - bits) // 8 for weight in linear)


def trained_values(facts: Facts, rank: int) -> int:
    """Values of the student's LoRA."""
    return rank * sum(sum(facts.shapes[name]) for name in facts.student)


def slot_bytes(facts: Facts, rank: int) -> int:
    """Bytes of one slot of the bank, whose ranks are the highest of any LoRA."""
    student = dict.fromkeys(facts.student, rank)
    return page_bytes(facts.shapes, module_ranks([student, *facts.teachers.values()]), facts.dtype)


def num_slots(facts: Facts, config: DistillConfig) -> int:
    """The bank's slots on the device: the critic's, and the teachers' or as many as fit. Raises CloraError for too few."""
    count, one = len(facts.teachers), slot_bytes(facts, config.student.rank)
    pages = pages_that_fit(config.train.teacher_memory_gb, one, count)
    return 1 + (count if pages is None else pages)


def state_bytes(train: TrainConfig) -> int:
    """Bytes of both optimizers' states per trained value; Muon's stay in 32 bits."""
    adamw = MOMENTS["adamw"] * train.optimizer_bits // 8
    return adamw + (adamw if train.optimizer == "adamw" else 4 * MOMENTS[train.optimizer])


def memory(facts: Facts, config: DistillConfig) -> dict[str, int]:
    """Device memory by part, in bytes; ``encoders`` leave the device before the others come.

    ``rendering`` is all that is there while targets are rendered.

    Raises:
        CloraError: ``train.teacher_memory_gb`` holds too few teachers.
    """
    rank, train = config.student.rank, config.train
    values = trained_values(facts, rank)
    checkpointed = train.gradient_checkpointing
    block = facts.cost.saved // facts.blocks
    saved = facts.cost.saved_checkpointed if checkpointed else facts.cost.saved
    rows = rows_with_gradient(config)
    recomputed = rows if checkpointed else 0
    learning = rows * saved + max(recomputed, scoring_rows(config)) * block  # scored while the student's pass is kept
    slots = slot_bytes(facts, rank) * num_slots(facts, config)
    return {
        "encoders": facts.encoders,
        "rendering": facts.transformer + slots + rendering_rows(config) * block,
        "base": facts.transformer,
        "teachers": slots,
        "student and critic": 2 * values * MASTER,
        "gradients": values * GRADIENT,
        "optimizers": values * state_bytes(train),
        "activations": max(learning, train.batch_size * block),
    }


def peak(parts: Mapping[str, int]) -> int:
    """The most memory at once: encoding, rendering, or training."""
    before = ("encoders", "rendering")
    return max(*(parts[name] for name in before), sum(size for name, size in parts.items() if name not in before))


def rows_with_gradient(config: DistillConfig) -> int:
    """Most rows of one pass with gradient: a student update whose samples are all of the effect stream."""
    objective = config.objective
    parts = (objective.backward_simulation, objective.target_simulation, objective.trajectory_anchoring)
    rows = config.train.batch_size * max(1, sum(parts))
    return rows if config.train.gradient_rows is None else min(rows, config.train.gradient_rows)


def scoring_rows(config: DistillConfig) -> int:
    """Most rows of one scoring pass: critic, teacher and, with guidance, teacher with the empty prompt."""
    objective = config.objective
    scored = config.train.batch_size * (objective.backward_simulation + objective.target_simulation)
    rows = min(scored, rows_with_gradient(config)) * config.sampler.rows_per_scored_sample
    return rows if config.train.forward_rows is None else min(rows, config.train.forward_rows)


def rendering_rows(config: DistillConfig) -> int:
    """Most rows of one pass while targets are rendered; 0 where all are given."""
    most = max(
        GENERAL_AT_ONCE if renders_general(config) else 0,
        TEACHERS_AT_ONCE if any(effect.targets is None for effect in config.effects) else 0,
    )
    return most and samples_at_once(config, most) * config.sampler.passes_per_teacher_step


def forward_passes(config: DistillConfig) -> float:
    """What a student update after anchoring costs in forward passes of one row, its critic updates included.

    A backward pass through a frozen base costs about as much as a forward pass, recomputation one more. Streams count at
    their expected share, steps of the simulation at their mean.
    """
    objective, train = config.objective, config.train
    effects = train.batch_size * (objective.switch_probability if objective.dual_stream else 1.0)
    scored = train.batch_size * objective.backward_simulation + effects * objective.target_simulation
    anchored = (train.batch_size if config.data.general_targets else effects) * objective.trajectory_anchoring
    learning = 3 if train.gradient_checkpointing else 2
    if not scored:
        return learning * anchored
    simulated = (config.sampler.steps - 1) / 2
    critic = train.critic_ratio * train.batch_size * (simulated + 1 + learning)
    return critic + learning * (scored + anchored) + scored * config.sampler.rows_per_scored_sample


def anchoring_passes(config: DistillConfig) -> float:
    """The same of an update of the run's first part, which is trajectory anchoring alone."""
    return config.train.batch_size * (3 if config.train.gradient_checkpointing else 2)


def disk(facts: Facts, config: DistillConfig, encoded: int) -> dict[str, int]:
    """Disk by part, in bytes.

    Args:
        facts: of the pipeline and its teachers.
        config: the settings.
        encoded: values of the encoded pictures and prompts, which are in the host's memory too.
    """
    values = trained_values(facts, config.student.rank)
    states = 2 * MASTER + state_bytes(config.train)
    return {
        "collection": values * facts.dtype.itemsize,
        "checkpoint while it trains": values * states,
        "encoded while it trains, in memory too": encoded * facts.dtype.itemsize,
    }
