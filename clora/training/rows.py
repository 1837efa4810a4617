"""The rows of one student update: its parts joined into one batch, and that batch split to bound memory.

Source: docs/method.md section 4(c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The joined rows of one student forward: D distribution-matching rows first, then A anchor rows.

    Attributes:
        x, conditioning: per student row.
        sigma, kind, weight, effect: the same, on the CPU.
        teacher, uncond: the teachers' conditioning of the D rows to be scored, with and without their prompts.
        score_sigma: ``[D]`` noise level at which each of these is scored, on the CPU.
        score_noise: ``[D, T, C]`` noise that takes each of these there.
        anchor_target: ``[A, T, C]`` noise minus target of the anchor rows.
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
    anchor_target: Tensor

    @staticmethod
    def join(
        parts: Sequence[Part],
        score_sigma: Tensor,
        score_noise: Tensor,
        anchor_target: Tensor,
        num_samples: int | None = None,
    ) -> StudentRows:
        """Joins the parts, those to be scored before the anchor rows.

        Args:
            parts: kinds of rows.
            score_sigma, score_noise, anchor_target: as in the attributes.
            num_samples: of the batch, which the sum of a kind's losses is divided by; None for the kind's own rows.
        """
        weights = []
        for part in parts:
            # The loss takes the mean over a kind's rows. Weighed with their share of the samples, it is their sum divided
            # by all samples.
            share = 1 if num_samples is None else len(part.batch) / num_samples
            weights.append(torch.full((len(part.batch),), part.weight * share))
        scored = slice(len(score_sigma))
        return StudentRows(
            x=torch.cat([part.x for part in parts]),
            sigma=torch.cat([part.sigma for part in parts]),
            kind=kinds(parts),
            weight=torch.cat(weights),
            effect=torch.cat([part.batch.effect for part in parts]),
            conditioning=Conditioning.cat([part.batch.student for part in parts]),
            teacher=Conditioning.cat([part.batch.teacher for part in parts])[scored],
            uncond=Conditioning.cat([part.batch.uncond for part in parts])[scored],
            score_sigma=score_sigma,
            score_noise=score_noise,
            anchor_target=anchor_target,
        )

    def split(self, limit: int | None) -> list[StudentRows]:
        """Parts of at most ``limit`` rows whose losses add up to that of all rows; one part for None."""
        num_scored = len(self.teacher)
        parts = []
        for rows in slices(len(self.x), limit):
            # The scored rows are the first D, so that the same slice fits their fields, cut off at their end.
            part = {name: field[rows] for name, field in vars(self).items()}
            # The loss of a kind is the mean over its rows. A part takes the mean over its own rows of a kind, so that
            # they are weighed with their share of all rows of that kind: losses and gradients then add up.
            share = torch.bincount(part["kind"], minlength=3) / torch.bincount(self.kind, minlength=3)
            part["weight"] = part["weight"] * share[part["kind"]]
            # The anchor rows follow, counted from D on.
            part["anchor_target"] = self.anchor_target[max(rows.start - num_scored, 0) : max(rows.stop - num_scored, 0)]
            parts.append(StudentRows(**part))
        return parts


def kinds(parts: Sequence[Part]) -> Tensor:
    """int64 ``[R]``, the kind of each row of the parts."""
    counts = torch.tensor([len(part.batch) for part in parts], dtype=torch.int64)
    return torch.tensor([part.kind for part in parts], dtype=torch.int64).repeat_interleave(counts)


def slices(count: int, limit: int | None) -> list[slice]:
    """``count`` rows in parts of at most ``limit``; one part for None."""
    limit = limit or count
    return [slice(i, i + limit) for i in range(0, count, limit)]
