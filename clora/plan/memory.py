"""The arithmetic of a distillation: device memory by part, disk, passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clora.config import DistillConfig
from clora.plan.cost import PassCost
from clora.teacher_pages import pages_that_fit

MASTER = GRADIENT = 4
"""Bytes of a trained value and of its gradient, float32 both."""
OPTIMIZER = {("adamw", 32): 8, ("adamw", 8): 2, ("muon", 32): 4, ("muon", 8): 4}
"""Bytes of an optimizer's state per trained value, by name and ``train.optimizer_bits``: two moments, or one of fp32."""

Shapes = Mapping[str, tuple[int, int]]
Ranks = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Facts:
    """What the arithmetic reads of a pipeline and its teachers.

    Attributes:
        transformer, encoders: bytes of the weights of the transformer, and of text encoders and autoencoder.
        value: bytes of a value in the transformer's dtype.
        shapes: of the transformer's linear layers.
        student: the layers that student and critic adapt.
        teachers: effect to layer to rank.
        blocks: number of blocks that gradient checkpointing computes again one by one.
        cost: of one row's pass.
    """

    transformer: int
    encoders: int
    value: int
    shapes: Shapes
    student: Sequence[str]
    teachers: Ranks
    blocks: int
    cost: PassCost


def trained_values(facts: Facts, rank: int) -> int:
    """Values of the student's LoRA."""
    return rank * sum(sum(facts.shapes[name]) for name in facts.student)


def stack_ranks(facts: Facts, rank: int) -> dict[str, int]:
    """The common rank of all slots of each layer: the student's, or a teacher's higher one."""
    ranks = dict.fromkeys(facts.student, rank)
    for teacher in facts.teachers.values():
        for name, own in teacher.items():
            ranks[name] = max(ranks.get(name, 0), own)
    return ranks


def slot_values(facts: Facts, rank: int) -> int:
    """Values of one slot of the bank, padded to the common ranks."""
    return sum(own * sum(facts.shapes[name]) for name, own in stack_ranks(facts, rank).items())


def optimizer_bytes(config: DistillConfig) -> int:
    """Of both optimizers' states, per value of the student's LoRA."""
    train = config.train
    return OPTIMIZER[train.optimizer, train.optimizer_bits] + OPTIMIZER["adamw", train.optimizer_bits]


def memory(facts: Facts, config: DistillConfig) -> dict[str, int]:
    """Device memory by part, in bytes; ``encoders`` leave the device before the others come."""
    rank, train = config.student.rank, config.train
    values = trained_values(facts, rank)
    checkpointed = train.gradient_checkpointing
    block = facts.cost.saved // facts.blocks
    saved = facts.cost.saved_checkpointed if checkpointed else facts.cost.saved
    slot = slot_values(facts, rank) * facts.value
    rows, scored = rows_with_gradient(config), scoring_rows(config)
    return {
        "encoders": facts.encoders,
        "base": facts.transformer,
        "teachers": slot * (pages_that_fit(train.teacher_memory_gb, slot, len(facts.teachers)) or len(facts.teachers)),
        "scoring critic": slot,
        "student and critic": 2 * values * MASTER,
        "gradients": values * GRADIENT,
        "optimizers": values * optimizer_bytes(config),
        "activations": max(rows * (saved + (block if checkpointed else 0)), scored * block),
    }


def peak(parts: Mapping[str, int]) -> int:
    """The most memory at once: encoding, or training."""
    return max(parts["encoders"], sum(size for name, size in parts.items() if name != "encoders"))


def rows_with_gradient(config: DistillConfig) -> int:
    """Most rows of one pass with gradient: a student update whose rows are all of the effect stream."""
    objective = config.objective
    parts = (objective.backward_simulation, objective.target_simulation, objective.trajectory_anchoring)
    return config.train.batch_size * max(1, sum(parts))


def scoring_rows(config: DistillConfig) -> int:
    """Most rows of one scoring pass: critic, teacher and, with guidance, teacher with the empty prompt."""
    objective = config.objective
    scored = config.train.batch_size * (objective.backward_simulation + objective.target_simulation)
    rows = scored * (2 if config.sampler.guidance == 0 else 3)
    return rows if config.train.scoring_rows is None else min(rows, config.train.scoring_rows)


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
    return critic + learning * (scored + anchored) + scored * (2 if config.sampler.guidance == 0 else 3)


def anchoring_passes(config: DistillConfig) -> float:
    """The same of an update of the run's first part, which is trajectory anchoring alone."""
    return config.train.batch_size * (3 if config.train.gradient_checkpointing else 2)


def rendered(config: DistillConfig, sources: int) -> int:
    """Pictures that teachers and base render, of so many sources."""
    missing = sum(effect.targets is None for effect in config.effects)
    general = config.data.general_targets if config.objective.dual_stream else 0
    return missing * min(sources, config.data.sources_per_effect) + general


def disk(facts: Facts, config: DistillConfig, latents: int, pictures: int) -> dict[str, int]:
    """Disk by part, in bytes.

    Args:
        facts: of the pipeline and its teachers.
        config: the settings.
        latents: values of an encoded picture, source or result.
        pictures: sources and results that are kept.
    """
    values = trained_values(facts, config.student.rank)
    states = 2 * MASTER + optimizer_bytes(config)
    return {
        "collection": values * facts.value,
        "checkpoint while it trains": values * states,
        "encoded pictures while it trains": 4 * latents * pictures,
    }
