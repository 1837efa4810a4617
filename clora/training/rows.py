"""The rows of one student update: its parts joined into one batch.

Source: docs/method.md section 4(c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clora.data.batches import Batch
from clora.models.conditioning import Conditioning


@dataclass(frozen=True)
class Part:
    """One kind of student rows before they are joined: ``x [B, T, C]`` at noise ``sigma [B]``, one loss weight."""

    kind: int
    batch: Batch
    x: Tensor
    sigma: Tensor
    weight: float


@dataclass(frozen=True)
class StudentRows:
    """The joined rows of one student forward, distribution-matching rows first.

    Attributes:
        x, conditioning: per student row.
        sigma, kind, weight, effect: the same, on the CPU.
        teacher, uncond: the teachers' conditioning of the rows to be scored, with and without their prompts.
        score_sigma: ``[D]`` noise level at which each of these is scored, on the CPU.
        score_noise: ``[D, T, C]`` with which each of these is noised again for it.
        anchor_target: ``[A, T, C]`` noise minus target of the anchor rows, or None.
    """

    x: Tensor
    sigma: Tensor
    kind: Tensor
    weight: Tensor
    effect: Tensor
    conditioning: Conditioning
    teacher: Conditioning
    uncond: Conditioning
    score_sigma: Tensor
    score_noise: Tensor
    anchor_target: Tensor | None

    @staticmethod
    def join(
        parts: Sequence[Part], score_sigma: Tensor, score_noise: Tensor, anchor_target: Tensor | None
    ) -> StudentRows:
        """Joins the parts."""
        counts = torch.tensor([len(part.batch) for part in parts])
        return StudentRows(
            x=torch.cat([part.x for part in parts]),
            sigma=torch.cat([part.sigma for part in parts]),
            kind=torch.tensor([part.kind for part in parts]).repeat_interleave(counts),
            weight=torch.tensor([part.weight for part in parts]).repeat_interleave(counts),
            effect=torch.cat([part.batch.effect for part in parts]),
            conditioning=Conditioning.cat([part.batch.student for part in parts]),
            teacher=Conditioning.cat([part.batch.teacher for part in parts])[slice(len(score_sigma))],
            uncond=Conditioning.cat([part.batch.uncond for part in parts])[slice(len(score_sigma))],
            score_sigma=score_sigma,
            score_noise=score_noise,
            anchor_target=anchor_target,
        )

    def split(self, limit: int | None) -> list[StudentRows]:
        """Parts of at most ``limit`` rows whose losses add up to that of all rows; one part for None."""
        parts = slices(len(self.x), limit)
        return [self] if len(parts) == 1 else [self._part(rows) for rows in parts]

    def _part(self, rows: slice) -> StudentRows:
        kind, scored = self.kind[rows], len(self.teacher)
        share = torch.bincount(kind, minlength=3) / torch.bincount(self.kind, minlength=3)  # a loss is a kind's mean
        anchors = slice(max(rows.start - scored, 0), max(rows.stop - scored, 0))
        return replace(
            self,
            x=self.x[rows],
            sigma=self.sigma[rows],
            kind=kind,
            weight=self.weight[rows] * share[kind],
            effect=self.effect[rows],
            conditioning=self.conditioning[rows],
            teacher=self.teacher[rows],
            uncond=self.uncond[rows],
            score_sigma=self.score_sigma[rows],
            score_noise=self.score_noise[rows],
            anchor_target=None if self.anchor_target is None else self.anchor_target[anchors],
        )


def slices(count: int, limit: int | None) -> list[slice]:
    """``count`` rows in parts of at most ``limit``; one part for None."""
    limit = limit or count
    return [slice(i, min(i + limit, count)) for i in range(0, count, limit)]
