"""How well an autoencoder, a base and teachers do on held-out photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator
from clora.lora.state import LoRAState
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.progress import stage
from clora.studio.baselines import EvaluationSet, full_renders, general_rows
from clora.studio.demo_config import GUIDANCE, TEACHER_STEPS
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import general_cases, held_out_sources, judge_effects, judges
from clora.studio.judges import psnr
from clora.studio.pixels import to_images, to_tensor
from clora.studio.scenes import SIZE, SIZES
from clora.studio.teachers import kind_of

STEPS = 20
CASES = 160
"""Held-out edits that a base is measured on."""
TEACHER_ACCURACY = 0.9
TEACHER_PSNR = {"colour": 26.0, "spatial": 21.0}
"""Floors in dB, by the kind of effect; a stochastic effect has no one exact result."""
BELOW_CEILING = 4.0
"""dB that a colour map may stay below what the autoencoder lets through, where that is little, as of steep maps (thermal)."""


def base_outputs(adapter: Flux2KleinAdapter, count: int) -> np.ndarray:
    """Renders what the base makes of the first general cases, in Euler steps with the studio's guidance: ``[N, S, S, 3]`` in [0, 1]."""
    rows = general_rows(adapter, count)
    empty = adapter.encode_prompts([""])
    # A guided step passes every row through the transformer twice.
    with stage("general edits", 2 * STEPS * count) as advance:
        latents = Generator(adapter, report=advance).euler(*rows, STEPS, empty, GUIDANCE)
    return to_images(adapter.decode(latents))


def base_quality(adapter: Flux2KleinAdapter, count: int = CASES) -> dict[str, object]:
    """Measures a base on ``count`` held-out edits: the share that is right, and the PSNR in dB of each kind of edit."""
    cases = general_cases(count, adapter.size[0])
    outputs = base_outputs(adapter, count)
    right = [case.is_correct(output) for case, output in zip(cases, outputs, strict=True)]
    by_family: dict[str, list[float]] = {}
    for case, output in zip(cases, outputs, strict=True):
        by_family.setdefault(case.edit.family, []).append(psnr(output, case.edit.result))
    values = {family: round(float(np.mean(found)), 1) for family, found in by_family.items()}
    return {"general_accuracy": float(np.mean(right)), "psnr": values}


@torch.no_grad()
def round_trip(vae, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes images ``[N, S, S, 3]`` in [0, 1]; returns float32 of the same."""
    return to_images(vae.decode(vae.encode(to_tensor(images).to(vae.device)).latent_dist.mode()).sample)


def vae_quality(vae, count: int = 32) -> dict[str, float]:
    """Measures the PSNR in dB of a round trip of held-out scenes, at 64 and 128 pixels."""
    found = {}
    for size in SIZES:
        scenes = held_out_sources(count, size)
        decoded = round_trip(vae, scenes)
        found[f"vae_psnr_{size}"] = _mean_psnr(decoded, scenes)
    return found


@dataclass(frozen=True)
class TeacherQuality:
    """What one teacher reaches on held-out photographs.

    Attributes:
        accuracy: the share of outputs that the judge accepts.
        psnr: mean in dB against the exact results; None for a stochastic effect.
        ceiling: mean in dB of the autoencoder's round trip of the exact results; None for a stochastic effect.
    """

    accuracy: float
    psnr: float | None = None
    ceiling: float | None = None


def teacher_quality(
    adapter: Flux2KleinAdapter, loras: Mapping[str, LoRAState], count: int = 24
) -> dict[str, TeacherQuality]:
    """Measures teachers, by effect name, each on the same ``count`` held-out scenes and noises."""
    outputs = teacher_outputs(adapter, loras, count)
    measured = {}
    for effect, verdicts in judge_effects(outputs, count).items():
        accuracy = float(np.mean([verdict.accurate for verdict in verdicts]))
        if EFFECTS[effect].stochastic:
            measured[effect] = TeacherQuality(accuracy)
            continue
        exact = np.stack([judge.exact[effect] for judge in judges(count, adapter.size[0])])
        ceiling = _mean_psnr(round_trip(adapter.pipeline.vae, exact), exact)
        measured[effect] = TeacherQuality(accuracy, float(np.mean([verdict.psnr for verdict in verdicts])), ceiling)
    return measured


def teacher_outputs(adapter: Flux2KleinAdapter, loras: Mapping[str, LoRAState], count: int) -> dict[str, np.ndarray]:
    """Renders what each teacher makes of the first held-out scenes: effect to float32 ``[count, S, S, 3]`` in [0, 1]."""
    rows = EvaluationSet.encode(adapter, tuple(loras), count, 1)
    # A guided step passes every row through the transformer twice.
    passes = 2 * TEACHER_STEPS * len(rows.ids)
    with stage("quality of teachers", passes) as advance, AdapterBank(adapter.pipeline.transformer, loras) as bank:
        return rows.outputs(full_renders(rows, Generator(adapter, bank, report=advance)))


def psnr_floor(effect: str, ceiling: float | None) -> float | None:
    """Returns the PSNR in dB that a teacher should reach, given the autoencoder's; None for a stochastic effect."""
    kind = kind_of(effect)
    if ceiling is None or kind not in TEACHER_PSNR:
        return None
    return min(TEACHER_PSNR[kind], ceiling - BELOW_CEILING) if kind == "colour" else TEACHER_PSNR[kind]


def is_low(effect: str, found: TeacherQuality) -> bool:
    """Decides whether a teacher is below one of its floors."""
    floor = psnr_floor(effect, found.ceiling)
    # The other way round, a value that is not a number would pass.
    return not (found.accuracy >= TEACHER_ACCURACY and (floor is None or found.psnr >= floor))


def teacher_table(measured: Mapping[str, TeacherQuality], size: int = SIZE) -> Table:
    """Shows teachers against their floors; those below one are red."""
    title = f"{len(measured)} teachers, held-out scenes at {size} x {size}, accuracy of {TEACHER_ACCURACY:.2f} or more"
    table = Table("teacher", "accuracy", "PSNR", "floor", "round trip", title=title)
    for effect, found in measured.items():
        floor = psnr_floor(effect, found.ceiling)
        cells = ["" if value is None else f"{value:.1f}" for value in (found.psnr, floor, found.ceiling)]
        table.add_row(effect, f"{found.accuracy:.3f}", *cells, style="red" if is_low(effect, found) else "")
    return table


def _mean_psnr(images: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([psnr(*pair) for pair in zip(images, expected, strict=True)]))
