"""Arithmetic of a distillation: device memory by part, disk, passes and time; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clora.config import DistillConfig

OPTIMIZER_BYTES = {"adamw": 8, "muon": 4}
"""State per trained value beside its fp32 master: two moments or one."""
MASTER, GRADIENT = 4, 4


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs to know of a pipeline.

    Attributes:
        transformer: bytes of its weights.
        encoders: bytes of text encoders and autoencoder.
        num_modules: linear layers that the student adapts.
        width: the sum of inputs and outputs of these layers: values per rank.
        num_blocks: of the transformer.
        value: bytes of a value in the transformer's dtype.
    """

    transformer: int
    encoders: int
    num_modules: int
    width: int
    num_blocks: int
    value: int


def trained_values(model: Model, rank: int) -> int:
    """Values of one LoRA on all of the student's layers."""
    return model.width * rank


def update_rows(config: DistillConfig) -> dict[str, float]:
    """Rows that pass through the transformer in one student update after anchoring, its critic updates included.

    Rows without gradient, rows with one, and the most that have a gradient at once. Streams at their expected share.
    """
    objective, batch = config.objective, config.train.batch_size
    effects = batch * (objective.switch_probability if objective.dual_stream else 1.0)
    ratio = config.train.critic_ratio
    simulated = (config.sampler.steps - 1) / 2
    matched = batch * objective.backward_simulation + effects * objective.target_simulation
    anchored = (batch if config.data.general_targets else effects) * objective.trajectory_anchoring
    most = batch * (objective.backward_simulation + objective.target_simulation + objective.trajectory_anchoring)
    if not matched:
        return {"without": 0.0, "with": anchored, "most": most}
    scoring = matched * (2 if config.sampler.guidance == 0 else 3)
    return {
        "without": ratio * batch * (simulated + 1) + scoring,
        "with": ratio * batch + matched + anchored,
        "most": max(most, batch),
    }


def forward_equivalents(rows: Mapping[str, float], checkpointed: bool) -> float:
    """Forward passes of one row that an update costs: a backward pass through a frozen base costs about another one,
    and checkpointing a third.
    """
    return rows["without"] + rows["with"] * (3 if checkpointed else 2)
