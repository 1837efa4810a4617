"""Encoded training data and the routed batches drawn from it."""

from __future__ import annotations

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
        general_targets: ``[P, T, C]`` what the base makes of general pairs (`general_pair`), or None. With them the
            general stream draws these pairs, and anchors them like effects.
    """

    effects: tuple[str, ...]
    sources: Tensor
    targets: Tensor
    teacher_text: Tensor
    student_text: Tensor
    general_sources: Tensor
    general_text: Tensor
    empty_text: Tensor
    general_targets: Tensor | None = None


def general_pair(pair: Tensor, num_sources: int, num_texts: int) -> tuple[Tensor, Tensor]:
    """Source and instruction of general pairs: all sources in turn, from round to round with another instruction."""
    return pair % num_sources, (pair + pair // num_sources) % num_texts


@dataclass(frozen=True)
class Batch:
    """Routed samples: rows may use different teachers.

    Attributes:
        effect: ``[B]`` index into the effects; -1 (`GENERAL`) marks the general stream, whose teacher is the base.
        student: conditioning of student and critic.
        teacher: conditioning of the teachers.
        target: ``[B, T, C]``, zero for rows without one.
        has_target: ``[B]`` bool.
    """

    effect: Tensor
    student: Conditioning
    teacher: Conditioning
    target: Tensor
    has_target: Tensor

    def __len__(self) -> int:
        return len(self.effect)

    def __getitem__(self, rows: Tensor) -> Batch:
        """The rows where ``rows [B]`` is true."""
        index = torch.nonzero(rows).flatten()
        return Batch(
            self.effect[index], self.student[index], self.teacher[index], self.target[index], self.has_target[index]
        )


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

        A general stream without a loss, neither backward simulation nor targets, is left out.
        """
        anchored = self.objective.trajectory_anchoring and self.data.general_targets is not None
        has_loss = self.objective.backward_simulation or anchored
        if self.objective.dual_stream and has_loss and update % self.objective.switch_every == 0:
            chance = torch.rand(self.batch_size, generator=self.generator)
            self._general = chance >= self.objective.switch_probability
        return self._gather(self._general)

    def draw_targets(self, update: int) -> Batch:
        """As `draw`, without rows that have no target."""
        if self.data.general_targets is not None:
            return self.draw(update)
        return self._gather(torch.zeros(self.batch_size, dtype=torch.bool))

    def _gather(self, general: Tensor) -> Batch:
        data = self.data
        effect = self._pick(len(data.effects))
        sample, phrasing = self._pick(data.targets.shape[1]), self._pick(data.student_text.shape[1])
        source = data.sources[effect, sample]
        teacher_text = data.teacher_text[effect]
        student_text = data.student_text[effect, phrasing] if self.objective.orthogonal_prompting else teacher_text
        general_source, instruction, general_target = self._general_rows()
        where = general.to(source.device)[:, None, None]
        source = torch.where(where, general_source, source)
        return Batch(
            effect.masked_fill(general, GENERAL),
            Conditioning(torch.where(where, instruction, student_text), source),
            Conditioning(torch.where(where, instruction, teacher_text), source),
            torch.where(where, general_target, data.targets[effect, sample]),
            ~general if data.general_targets is None else torch.ones_like(general),
        )

    def _general_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sources, instructions and targets (0 where there are none) of a batch of general pairs."""
        data, (num_sources, num_texts) = self.data, (len(self.data.general_sources), len(self.data.general_text))
        if data.general_targets is None:
            return (
                data.general_sources[self._pick(num_sources)],
                data.general_text[self._pick(num_texts)],
                torch.zeros(()),
            )
        pair = self._pick(len(data.general_targets))
        source, text = general_pair(pair, num_sources, num_texts)
        return data.general_sources[source], data.general_text[text], data.general_targets[pair]

    def _pick(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch_size,), generator=self.generator)
