"""The rows of one student update: its parts joined into one batch.

Source: docs/method.md section 4(c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.conditioning import Conditioning
from clora.data import Batch


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
    anchor_target: Tensor | None

    @staticmethod
    def join(parts: Sequence[Part], score_sigma: Tensor, anchor_target: Tensor | None) -> StudentRows:
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
            anchor_target=anchor_target,
        )
