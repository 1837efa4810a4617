"""Encoded training data and the routed batches drawn from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clora.config.training import ObjectiveConfig
from clora.data.tables import Latents, TextTable, select, stack
from clora.devices import send, take
from clora.models.conditioning import Conditioning, Text

GENERAL = -1
"""The effect of a row of the general stream, whose teacher is the base."""


class EffectSamples(NamedTuple):
    """One effect's part of the data: M samples, the student's prompts in P phrasings.

    Rows of prompts are one for each sample, or a single one that all samples share.

    Attributes:
        name: the effect.
        sources: ``[M, S, C]`` encoded images to edit.
        targets: ``[M, T, C]`` what the teacher makes of them (the paper's y).
        teacher_text: ``[M]`` or ``[1]`` rows of the teacher's own prompt in `DistillData.text`.
        student_text: ``[P, M]`` or ``[P, 1]`` rows of trigger and description.
        empty_text: ``[M]`` or ``[1]`` rows of the empty prompt of the unconditional branch.
    """

    name: str
    sources: Latents
    targets: Latents
    teacher_text: Tensor
    student_text: Tensor
    empty_text: Tensor


class Previews(NamedTuple):
    """What people watch a training by: one picture for each of E effects, which no training sees if some are held out.

    Attributes:
        pictures: E images ``[3, H, W]`` in [-1, 1].
        sources: ``[E, S, C]`` the same encoded.
        targets: ``[E, T, C]`` what the teachers make of them.
        student_text: ``[E]`` rows of the student's first prompt in `DistillData.text`.
    """

    pictures: list[Tensor]
    sources: Latents
    targets: Latents
    student_text: Tensor


@dataclass(frozen=True)
class DistillData:
    """Everything a distillation reads, encoded once, on the CPU or in files; built by `of`.

    Prompts are rows of one table, ``text``: families whose prompts are encoded together with the image have a row per
    prompt and source, others one per prompt.

    Attributes:
        effects: names of the E effects; also the teachers' order in the bank.
        text: every encoded prompt.
        sources, targets, teacher_text, student_text, empty_text: those of `EffectSamples`, all effects stacked
            (``[E, M, ...]``, ``student_text [E, P, M]``).
        general_sources: ``[G, S, C]`` unlabelled images of the general stream.
        general_pairs: ``[Q, 3]`` the general stream's pairs: source, row of the instruction, row of the empty prompt.
        general_targets: ``[Q, T, C]`` what the base makes of these pairs, or None. With them the general stream is
            anchored like effects.
        previews: None where a training shows none.
    """

    effects: tuple[str, ...]
    text: Text | TextTable
    sources: Latents
    targets: Latents
    teacher_text: Tensor
    student_text: Tensor
    empty_text: Tensor
    general_sources: Latents
    general_pairs: Tensor
    general_targets: Latents | None = None
    previews: Previews | None = None

    def __post_init__(self) -> None:
        if self.general_targets is not None and len(self.general_targets) != len(self.general_pairs):
            found = f"{len(self.general_targets)} targets of {len(self.general_pairs)} pairs"
            raise ValueError(f"expected a general target for each pair, found {found}")

    @classmethod
    def of(
        cls,
        text: Text | TextTable,
        effects: Sequence[EffectSamples],
        general_sources: Latents,
        general_pairs: Tensor,
        general_targets: Latents | None = None,
        previews: Previews | None = None,
    ) -> DistillData:
        """Stacks the effects; one with fewer samples or phrasings than others repeats its own in turn."""
        samples = torch.arange(max(len(effect.targets) for effect in effects))
        phrasings = torch.arange(max(len(effect.student_text) for effect in effects))
        latents, prompts = [], []
        for _, sources, targets, teacher, student, empty in effects:
            # From [M] to the most samples of any effect, from [P, M] to the most phrasings too.
            count = len(targets)
            rows = samples % count
            student = student.expand(-1, count)[phrasings % len(student)][:, rows]
            teacher, empty = teacher.expand(count)[rows], empty.expand(count)[rows]
            latents.append((select(sources, rows), select(targets, rows)))
            prompts.append((teacher, student, empty))
        names = tuple(effect.name for effect in effects)
        stacked = (*map(stack, zip(*latents, strict=True)), *map(torch.stack, zip(*prompts, strict=True)))
        return cls(names, text, *stacked, general_sources, general_pairs, general_targets, previews)


def general_pair(pair: Tensor, num_sources: int, num_texts: int) -> tuple[Tensor, Tensor]:
    """Source and instruction of general pairs: all sources in turn, from round to round with another instruction."""
    return pair % num_sources, (pair + pair // num_sources) % num_texts


@dataclass(frozen=True)
class Batch:
    """Routed samples: rows may use different teachers.

    Attributes:
        effect: ``[B]`` index into the effects; -1 (`GENERAL`) marks the general stream.
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


class Rows(NamedTuple):
    """B rows of one stream.

    Attributes:
        effect: ``[B]`` as in `Batch`.
        student, teacher, empty: ``[B]`` rows of the student's, the teacher's and the empty prompts in `DistillData.text`.
        source: ``[B, S, C]``.
        target: ``[B, T, C]``; zeros ``[1, 1, 1]`` where there is none.
    """

    effect: Tensor
    student: Tensor
    teacher: Tensor
    empty: Tensor
    source: Tensor
    target: Tensor


def effect_rows(
    data: DistillData, objective: ObjectiveConfig, effect: Tensor, sample: Tensor, phrasing: Tensor
) -> Rows:
    """Reads rows of the effect stream: these samples ``[B]`` of these effects, in these phrasings of the student's prompt."""
    teacher = data.teacher_text[effect, sample]
    # Orthogonal prompting (4b): the student reads trigger and description, else the teacher's own prompt.
    student = data.student_text[effect, phrasing, sample] if objective.orthogonal_prompting else teacher
    empty = data.empty_text[effect, sample]
    return Rows(effect, student, teacher, empty, data.sources[effect, sample], data.targets[effect, sample])


def general_rows(data: DistillData, pair: Tensor) -> Rows:
    """Reads rows of the pairs ``[B]``: the student and its teacher, the base, read the same instruction."""
    source, instruction, empty = data.general_pairs[pair].unbind(1)
    target = torch.zeros(1, 1, 1) if data.general_targets is None else data.general_targets[pair]
    effect = torch.full_like(pair, GENERAL)
    return Rows(effect, instruction, instruction, empty, data.general_sources[source], target)


class BatchSampler:
    """Draws batches by probabilistic dual-stream routing (paper: PDSR) with asymmetric prompts (AOP).

    Source: docs/method.md section 4(a, b).

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
        # Between two draws the rows keep their streams, as the released code has it for 20 updates (section 5).
        if self.objective.dual_stream and has_loss and update % self.objective.switch_every == 0:
            chance = torch.rand(self.batch_size, generator=self.generator)
            self._general = chance >= self.objective.switch_probability
        return self.gather(self._general)

    def draw_targets(self, update: int) -> Batch:
        """As `draw`, without rows that have no target."""
        if self.data.general_targets is not None:
            return self.draw(update)
        return self.gather(torch.zeros(self.batch_size, dtype=torch.bool))

    def state(self) -> dict[str, Tensor]:
        """The streams last drawn, for `load_state`; the generator's state is its owner's to keep."""
        return {"general": self._general}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state`; other entries are ignored."""
        self._general = state["general"]

    def gather(self, general: Tensor) -> Batch:
        """A batch whose rows are of the general stream where ``general [B]`` is true, else of the effect stream."""
        # Both streams are drawn for every row, so that later random numbers do not depend on how many are of which.
        rows: Sequence[Tensor] = self._effect_rows()
        num_pairs = len(self.data.general_pairs)
        pair = self._pick(num_pairs) if num_pairs else None
        if general.any():
            streams = zip(rows, general_rows(self.data, pair), strict=True)
            rows = [torch.where(general.view(-1, *[1] * (own.ndim - 1)), other, own) for own, other in streams]
        effect, student, teacher, empty, source, target = rows
        # The three conditionings differ in their prompts only, so that they share the images.
        source = send(source, self.device)

        def conditioned(text_rows: Tensor) -> Conditioning:
            return Conditioning(self.data.text[text_rows].to(self.device), source)

        return Batch(
            effect,
            conditioned(student),
            conditioned(teacher),
            conditioned(empty),
            send(target, self.device, torch.float32),
            has_target=~general if self.data.general_targets is None else torch.ones_like(general),
        )

    def _effect_rows(self) -> Rows:
        """A random effect, sample and phrasing for each row."""
        data = self.data
        effect = self._pick(len(data.effects))
        sample = self._pick(data.targets.shape[1])
        phrasing = self._pick(data.student_text.shape[1])
        return effect_rows(data, self.objective, effect, sample, phrasing)

    def _pick(self, count: int) -> Tensor:
        return torch.randint(count, (self.batch_size,), generator=self.generator)
