"""How well an autoencoder, a base and teachers do on held-out photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from rich.table import Table

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.progress import stage
from clora.studio.demo_config import GUIDANCE
from clora.studio.judges import Judge, features
from clora.studio.next.edits import FAMILIES, Edit, sample_edit
from clora.studio.next.effects import EFFECTS
from clora.studio.next.scenes import make_scene, render
from clora.studio.next.teachers import kind_of
from clora.studio.pixels import to_images, to_tensor

FIRST_SCENE = 1_000_000_000
FIRST_GENERAL = 1_100_000_000
FIRST_SEED = 8_000_000
FIRST_TEACHER_SEED = 7_000_000
GENERAL_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.random)
STEPS = 20
TEACHER_STEPS = 40
TEACHER_ACCURACY = 0.9
TEACHER_PSNR = {"colour": 26.0, "spatial": 21.0}
"""Floors in dB, by the kind of effect; a stochastic effect has no one exact result."""
BELOW_CEILING = 4.0
"""dB that a colour map may stay below what the autoencoder lets through, where that is little, as of steep maps (thermal)."""


@dataclass(frozen=True)
class GeneralCase:
    """One held-out general edit.

    Attributes:
        edit: the requested edit, with the picture before and its exact result.
        others: ``[K, F]`` features that a correct output must be further from: those of the unchanged source and of
            other edits of the same scene, two of them of the same kind with other words.
    """

    edit: Edit
    others: np.ndarray

    def is_correct(self, output: np.ndarray) -> bool:
        """Decides whether the exact result is nearer to ``output`` than anything else."""
        found, exact = features(np.stack([output, self.edit.result]))
        return bool(np.linalg.norm(found - exact) < np.linalg.norm(self.others - found, axis=1).min())


@cache
def general_cases(count: int, size: int) -> tuple[GeneralCase, ...]:
    """Draws held-out general edits at a size, the kinds of edit in turn."""
    return tuple(_general_case(index, size) for index in range(count))


def _general_case(index: int, size: int) -> GeneralCase:
    scene = make_scene(FIRST_GENERAL + index, "held_out", min_objects=1)
    rng = np.random.default_rng([index, 5])
    family = GENERAL_FAMILIES[index % len(GENERAL_FAMILIES)]
    # The first draw that shows: the removal of an object that is hidden behind another does not.
    draws = [sample_edit(scene, rng, family, size) for _ in range(8)]
    edit = next((edit for edit in draws if _differ(edit.result, edit.source)), draws[0])
    # Other things that could have been done to this scene, two of them of the same kind with other words.
    rivals = [sample_edit(scene, rng, other, size) for other in (*GENERAL_FAMILIES, family, family)]
    images = [rival.result for rival in rivals if rival.instruction != edit.instruction] + [edit.source]
    # A rival that looks like the exact result would make a correct output count as wrong.
    distinct = [image for image in images if _differ(image, edit.result)]
    return GeneralCase(edit, features(np.stack(distinct)))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).mean() > 0.01)


def base_outputs(adapter: Flux2KleinAdapter, cases: Sequence[GeneralCase]) -> np.ndarray:
    """Renders what the base makes of edits, in Euler steps without guidance: ``[N, S, S, 3]``."""
    text = adapter.encode_prompts([case.edit.instruction for case in cases])
    sources = adapter.encode_images(to_tensor(np.stack([case.edit.source for case in cases])))
    seeds = [FIRST_SEED + i for i in range(len(cases))]
    with stage("general edits", STEPS * len(cases)) as advance:
        ids = torch.zeros(len(cases), dtype=torch.int64)
        latents = Generator(adapter, report=advance).euler(ids, Conditioning(text, sources), seeds, STEPS)
    return to_images(adapter.decode(latents))


def base_quality(adapter: Flux2KleinAdapter, count: int) -> dict[str, object]:
    """Measures a base on ``count`` held-out edits: the share that is right, and the PSNR in dB of each kind of edit."""
    cases = general_cases(count, adapter.size[0])
    outputs = base_outputs(adapter, cases)
    right = [case.is_correct(output) for case, output in zip(cases, outputs, strict=True)]
    by_family: dict[str, list[float]] = {}
    for case, output in zip(cases, outputs, strict=True):
        by_family.setdefault(case.edit.family, []).append(psnr(output, case.edit.result))
    values = {family: round(float(np.mean(found)), 1) for family, found in by_family.items()}
    return {"general_accuracy": float(np.mean(right)), "psnr": values}


@torch.no_grad()
def vae_quality(vae, count: int = 32) -> dict[str, float]:
    """Measures the PSNR in dB of a round trip of held-out scenes, at 64 and 128 pixels."""
    found = {}
    for size in (64, 128):
        scenes = np.stack([render(make_scene(FIRST_SCENE + i, "held_out"), size) for i in range(count)])
        latents = vae.encode(to_tensor(scenes).to(vae.device)).latent_dist.mode()
        decoded = to_images(vae.decode(latents).sample)
        found[f"psnr_{size}"] = float(np.mean([psnr(*pair) for pair in zip(decoded, scenes, strict=True)]))
    return found


def psnr(image: np.ndarray, expected: np.ndarray) -> float:
    """Returns the likeness of images in [0, 1] in dB."""
    return float(-10 * np.log10(max(np.mean((image - expected) ** 2), 1e-10)))


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
    sources = np.stack([render(make_scene(FIRST_SCENE + i, "held_out"), adapter.size[0]) for i in range(count)])
    outputs = teacher_outputs(adapter, loras, sources)
    judges = [Judge.for_source(source, i, EFFECTS) for i, source in enumerate(sources)]
    measured = {}
    for effect, images in outputs.items():
        verdicts = [judge.score(image, effect) for judge, image in zip(judges, images, strict=True)]
        accuracy = float(np.mean([verdict.accurate for verdict in verdicts]))
        if EFFECTS[effect].stochastic:
            measured[effect] = TeacherQuality(accuracy)
            continue
        exact = np.stack([judge.exact[effect] for judge in judges])
        decoded = to_images(adapter.decode(adapter.encode_images(to_tensor(exact))))
        measured[effect] = TeacherQuality(accuracy, _mean_psnr(images, exact), _mean_psnr(decoded, exact))
    return measured


def teacher_outputs(
    adapter: Flux2KleinAdapter, loras: Mapping[str, LoRAState], sources: np.ndarray
) -> dict[str, np.ndarray]:
    """Renders what each teacher makes of pictures ``[N, S, S, 3]``, in Euler steps with the demo's guidance."""
    text = adapter.encode_prompts([EFFECTS[effect].prompt for effect in loras])
    empty = adapter.encode_prompts([""])
    latents = adapter.encode_images(to_tensor(sources))
    seeds = [FIRST_TEACHER_SEED + i for i in range(len(sources))]
    outputs = {}
    # A guided step passes every row through the transformer twice.
    passes = 2 * TEACHER_STEPS * len(sources) * len(loras)
    with stage("quality of teachers", passes) as advance, AdapterBank(adapter.pipeline.transformer, loras) as bank:
        generator = Generator(adapter, bank, report=advance)
        for index, effect in enumerate(loras):
            ids = torch.full((len(sources),), index)
            conditioning = Conditioning(text[ids], latents)
            made = generator.euler(ids, conditioning, seeds, TEACHER_STEPS, empty, GUIDANCE)
            outputs[effect] = to_images(adapter.decode(made))
    return outputs


def psnr_floor(effect: str, ceiling: float | None) -> float | None:
    """Returns the PSNR in dB that a teacher should reach, given the autoencoder's; None for a stochastic effect."""
    kind = kind_of(effect)
    if ceiling is None or kind not in TEACHER_PSNR:
        return None
    return min(TEACHER_PSNR[kind], ceiling - BELOW_CEILING) if kind == "colour" else TEACHER_PSNR[kind]


def teacher_table(measured: Mapping[str, TeacherQuality]) -> Table:
    """Shows teachers against their floors; those below one are red."""
    title = f"{len(measured)} teachers, held-out scenes, accuracy of {TEACHER_ACCURACY:.2f} or more"
    table = Table("teacher", "accuracy", "PSNR", "floor", "round trip", title=title)
    for effect, found in measured.items():
        floor = psnr_floor(effect, found.ceiling)
        cells = ["" if value is None else f"{value:.1f}" for value in (found.psnr, floor, found.ceiling)]
        low = found.accuracy < TEACHER_ACCURACY or (floor is not None and found.psnr < floor)
        table.add_row(effect, f"{found.accuracy:.3f}", *cells, style="red" if low else "")
    return table


def _mean_psnr(images: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([psnr(*pair) for pair in zip(images, expected, strict=True)]))
