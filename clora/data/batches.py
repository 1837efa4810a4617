"""Encoded training data and the routed batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clora.config.settings import ObjectiveConfig
from clora.devices import send, take
from clora.models.conditioning import Conditioning, Text

GENERAL = -1


@dataclass(frozen=True)
class DistillData:
    """Everything a distillation reads, encoded once, on the CPU. T, S, C latent tokens of results and sources, channels.

    Prompts are rows of one table, ``text``: families whose prompts are encoded together with the image have a row per
    prompt and source, others one per prompt.

    Attributes:
        effects: effect names, E of them; also the teachers' slots in the bank.
        text: every encoded prompt.
        sources: ``[E, M, S, C]`` source images of the effect stream.
        targets: ``[E, M, T, C]`` what teacher e makes of source ``[e, m]`` (the paper's y).
        teacher_text: ``[E, M]`` rows of the teachers' own prompts.
        student_text: ``[E, P, M]`` rows of trigger and description, in P phrasings.
        empty_text: ``[E, M]`` rows of the empty prompt of the unconditional branch.
        general_sources: ``[G, S, C]`` unlabelled images of the general stream.
        general_pairs: ``[Q, 3]`` the general stream's pairs: source, row of the instruction, row of the empty prompt.
        general_targets: ``[Q, T, C]`` what the base makes of these pairs, or None. With them the general stream is
            anchored like effects.
    """

    effects: tuple[str, ...]
    text: Text
    sources: Tensor
    targets: Tensor
    teacher_text: Tensor
    student_text: Tensor
    empty_text: Tensor
    general_sources: Tensor
    general_pairs: Tensor
    general_targets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.general_targets is not None and len(self.general_targets) != len(self.general_pairs):
            found = f"{len(self.general_targets)} targets of {len(self.general_pairs)} pairs"
            raise ValueError(f"expected a general target for each pair, found {found}")


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
        uncond: the same with the empty prompt.
        target: ``[B, T, C]`` fp32, zero for rows without one.
        has_target: ``[B]`` bool.
    """

    effect: Tensor
    student: Conditioning
    teacher: Conditioning
    uncond: Conditioning
    target: Tensor
    has_target: Tensor

    def __len__(self) -> int:
        return len(self.effect)

    def __getitem__(self, rows: Tensor) -> Batch:
        """The rows where ``rows [B]`` is true."""
        index = torch.nonzero(rows).flatten()
        return Batch(
            self.effect[index],
            self.student[index],
            self.teacher[index],
            self.uncond[index],
            take(self.target, index),
            self.has_target[index],
        )


class BatchSampler:
    """Draws batches by probabilistic dual-stream routing (paper: PDSR) with asymmetric prompts (AOP).

    Args:
        data: the encoded data.
        objective: which parts are on, and how streams are chosen.
        batch_size: rows per batch.
        generator: source of every choice, on the CPU.
        device: where the batches go; what routes, ``effect`` and ``has_target``, stays on the CPU.
    """

    def __init__(
        self,
        data: DistillData,
        objective: ObjectiveConfig,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ):
        self.data = data
        self.objective = objective
        self.batch_size = batch_size
        self.generator = generator
        self.device = torch.device(device)
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
        pair = self._pick(len(data.general_pairs)) if len(data.general_pairs) else torch.zeros_like(effect)
        teacher, empty = data.teacher_text[effect, sample], data.empty_text[effect, sample]
        student = data.student_text[effect, phrasing, sample] if self.objective.orthogonal_prompting else teacher
        source, target = data.sources[effect, sample], data.targets[effect, sample]
        if general.any():
            general_source, instruction, general_empty = data.general_pairs[pair].unbind(1)
            student, teacher = torch.where(general, instruction, student), torch.where(general, instruction, teacher)
            empty, where = torch.where(general, general_empty, empty), general[:, None, None]
            source = torch.where(where, data.general_sources[general_source], source)
            target = torch.where(where, self._general_target(pair), target)
        source = send(source, self.device)

        def conditioned(rows: Tensor) -> Conditioning:
            return Conditioning(data.text[rows].to(self.device), source)

        has_target = ~general if data.general_targets is None else torch.ones_like(general)
        return Batch(
            effect.masked_fill(general, GENERAL),
            conditioned(student),
            conditioned(teacher),
            conditioned(empty),
            send(target, self.device, torch.float32),
            has_target,
        )

    def _general_target(self, pair: Tensor) -> Tensor:
        """The targets of general pairs, 0 where there are none."""
        return torch.zeros(()) if self.data.general_targets is None else self.data.general_targets[pair]

    def _pick(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch_size,), generator=self.generator)
