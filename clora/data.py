"""Encoded training data and the routed batches drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.config import ObjectiveConfig
from clora.models import Conditioning

GENERAL = -1


@dataclass(frozen=True)
class DistillData:
    """Everything a distillation reads, encoded once. T, C latent tokens and channels; L, D text tokens and channels.

    Attributes:
        effects: effect names, E of them; also the teachers' slots in the bank.
        sources: ``[E, M, T, C]`` source images of the effect stream.
        targets: ``[E, M, T, C]`` what teacher e makes of source ``[e, m]`` (the paper's y).
        teacher_text: ``[E, L, D]`` the teachers' own prompts.
        student_text: ``[E, P, L, D]`` trigger and description, in P phrasings.
        general_sources: ``[G, T, C]`` unlabelled images of the general stream.
        general_text: ``[I, L, D]`` general edit instructions.
        empty_text: ``[L, D]`` the empty prompt of the unconditional branch.
    """

    effects: tuple[str, ...]
    sources: Tensor
    targets: Tensor
    teacher_text: Tensor
    student_text: Tensor
    general_sources: Tensor
    general_text: Tensor
    empty_text: Tensor


@dataclass(frozen=True)
class Batch:
    """Routed samples: rows may use different teachers.

    Attributes:
        effect: ``[B]`` index into the effects; -1 (`GENERAL`) marks the general stream, whose teacher is the base.
        student: conditioning of student and critic.
        teacher: conditioning of the teachers.
        target: ``[B, T, C]``, zero for general rows.
    """

    effect: Tensor
    student: Conditioning
    teacher: Conditioning
    target: Tensor

    def __len__(self) -> int:
        return len(self.effect)

    def effect_rows(self) -> Batch:
        """The rows of the effect stream."""
        rows = torch.nonzero(self.effect >= 0).flatten()
        return Batch(self.effect[rows], self.student[rows], self.teacher[rows], self.target[rows])

    def names(self, effects: Sequence[str]) -> list[str]:
        return [effects[e] if e >= 0 else "general" for e in self.effect.tolist()]


class BatchSampler:
    """Draws batches by probabilistic dual-stream routing (paper: PDSR) with asymmetric prompts (AOP).

    Args:
        data: the encoded data.
        objective: which parts are on, and how streams are chosen.
        batch_size: rows per batch.
        generator: source of every choice, on the CPU.
    """

    def __init__(self, data: DistillData, objective: ObjectiveConfig, batch_size: int, generator: torch.Generator):
        self.data = data
        self.objective = objective
        self.batch_size = batch_size
        self.generator = generator
        self._general = torch.zeros(batch_size, dtype=torch.bool)

    def draw(self, update: int) -> Batch:
        """The batch of one iteration; streams are redrawn every ``objective.switch_every`` iterations.

        Without backward simulation, its only loss, the general stream is left out.
        """
        dual_stream = self.objective.dual_stream and self.objective.backward_simulation
        if dual_stream and update % self.objective.switch_every == 0:
            chance = torch.rand(self.batch_size, generator=self.generator)
            self._general = chance >= self.objective.switch_probability
        return self._gather(self._general)

    def draw_effects(self) -> Batch:
        """A batch of the effect stream alone."""
        return self._gather(torch.zeros(self.batch_size, dtype=torch.bool))

    def _gather(self, general: Tensor) -> Batch:
        data = self.data
        effect = self._pick(len(data.effects))
        sample, phrasing = self._pick(data.targets.shape[1]), self._pick(data.student_text.shape[1])
        source = data.sources[effect, sample]
        teacher_text = data.teacher_text[effect]
        student_text = data.student_text[effect, phrasing] if self.objective.orthogonal_prompting else teacher_text
        target = data.targets[effect, sample]
        instruction = data.general_text[self._pick(len(data.general_text))]
        where = general.to(source.device)[:, None, None]
        source = torch.where(where, data.general_sources[self._pick(len(data.general_sources))], source)
        return Batch(
            effect.masked_fill(general, GENERAL),
            Conditioning(torch.where(where, instruction, student_text), source),
            Conditioning(torch.where(where, instruction, teacher_text), source),
            target.masked_fill(where, 0.0),
        )

    def _pick(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch_size,), generator=self.generator)
