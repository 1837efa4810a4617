"""The rows that the student is compared with: the teachers at 80 and at 8 passes, merges of their weights, the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator, Report
from clora.lora.algebra import merge_states
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.progress import stage
from clora.studio import evaluation
from clora.studio.demo_config import GUIDANCE, student_prompts
from clora.studio.effects import EFFECTS
from clora.studio.judges import Verdict
from clora.studio.pixels import to_bytes, to_images, to_tensor
from clora.studio.teachers import TEACHERS

MERGES = {"merge_svd": "svd", "merge_ties_svd": "ties_svd", "merge_dare_ties_svd": "dare_ties_svd"}
MERGE_RANK = 64
STEPS = 8
TEACHER_STEPS = 40
SHIFT = 3.0
FIRST_EFFECT_SEED = 7_000_000
FIRST_GENERAL_SEED = 8_000_000

Rows = tuple[Tensor, Conditioning, list[int]]
"""The slots ``[N]``, the conditioning and the seeds of N rows to sample (`Generator`)."""


@dataclass(frozen=True)
class Measured:
    """One row of the table of methods.

    Attributes:
        pictures: effect to its output for the grid, uint8 ``[64, 64, 3]`` (see `grid_pictures`).
        verdicts: effect to the verdict on each held-out scene.
        general: accuracy of general edits.
        megabytes: size of one LoRA in fp16.
        precomputed: the row ships with the studio.
    """

    pictures: Mapping[str, np.ndarray]
    verdicts: Mapping[str, Sequence[Verdict]]
    general: float | None
    megabytes: float | None = None
    precomputed: bool = False

    def row(self) -> dict[str, object]:
        """Returns the measured columns of the table of results; None for the mean of nothing."""

        def mean(values: Sequence[float]) -> float | None:
            return float(np.mean(values)) if values else None

        everything, stochastic, per_effect = [], [], {}
        for effect, verdicts in self.verdicts.items():
            everything += verdicts
            stochastic += verdicts if EFFECTS[effect].stochastic else []
            per_effect[effect] = mean([v.accurate for v in verdicts])
        return {
            "effect_accuracy": mean([v.accurate for v in everything]),
            "bad_case_rate": mean([v.bad_case for v in everything]),
            "bad_case_rate_stochastic": mean([v.bad_case for v in stochastic]),
            "psnr": mean([v.psnr for v in everything if v.psnr is not None]),
            "subject_alignment": mean([v.subject_alignment for v in everything]),
            "general_accuracy": self.general,
            "per_effect": per_effect,
        }

    def to_json(self) -> dict[str, object]:
        verdicts = {effect: list(map(asdict, row)) for effect, row in self.verdicts.items()}
        return {"verdicts": verdicts, "general": self.general, "megabytes": self.megabytes}


@dataclass(frozen=True)
class EvaluationSet:
    """Encoded held-out scenes of every effect: E effects on N scenes each, ``E x N`` rows.

    Attributes:
        adapter: the studio.
        effects: the effects.
        ids: ``[E x N]``, the effect of each row.
        sources: ``[E x N, T, C]``.
        seeds: of the noise, one for each row.
    """

    adapter: Flux2KleinAdapter
    effects: tuple[str, ...]
    ids: Tensor
    sources: Tensor
    seeds: list[int]

    @staticmethod
    def encode(adapter: Flux2KleinAdapter, effects: Sequence[str]) -> EvaluationSet:
        sources = adapter.encode_images(to_tensor(evaluation.held_out_sources(evaluation.NUM_SCENES)))
        # Effect by effect: the rows e N to (e + 1) N - 1 are the scenes of effect e.
        ids = torch.arange(len(effects)).repeat_interleave(len(sources))
        seeds = [FIRST_EFFECT_SEED + i for i in range(len(ids))]
        return EvaluationSet(adapter, tuple(effects), ids, sources.repeat(len(effects), 1, 1), seeds)

    def conditioning(self, text: Text) -> Conditioning:
        """The rows with the prompt of their effect, of ``text``'s E."""
        return Conditioning(text[self.ids], self.sources)

    def measured(self, latents: Tensor) -> Measured:
        """Judges the latents of all rows."""
        images = to_images(self.adapter.decode(latents)).reshape(len(self.effects), -1, *self.adapter.size, 3)
        outputs = dict(zip(self.effects, images, strict=True))
        return Measured(grid_pictures(outputs), evaluation.judge_effects(outputs), None)


def general_rows(adapter: Flux2KleinAdapter) -> Rows:
    """Encodes the held-out general edits, for a bank of one LoRA or none."""
    cases = evaluation.general_cases(evaluation.NUM_GENERAL)
    text = adapter.encode_prompts([case.edit.instruction for case in cases])
    sources = adapter.encode_images(to_tensor(np.stack([case.source for case in cases])))
    seeds = [FIRST_GENERAL_SEED + i for i in range(len(cases))]
    return torch.zeros(len(cases), dtype=torch.int64), Conditioning(text, sources), seeds


def measure_teachers(
    adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState], report: Report
) -> dict[str, Measured]:
    """Measures ``teachers_80`` and ``teachers_8``: the latter is the better of Euler and the few-step sampler."""
    rows = EvaluationSet.encode(adapter, tuple(teachers))
    conditioning = rows.conditioning(adapter.encode_prompts([EFFECTS[effect].prompt for effect in rows.effects]))
    empty = adapter.encode_prompts([""])
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        generator = Generator(adapter, bank, report=report)
        full = generator.euler(rows.ids, conditioning, rows.seeds, TEACHER_STEPS, empty, GUIDANCE)
        euler = generator.euler(rows.ids, conditioning, rows.seeds, STEPS)
        few_step = generator.few_step(rows.ids, conditioning, rows.seeds, STEPS, SHIFT)
    # Teachers were not trained for 8 passes: they get the sampler that suits them better.
    short = [rows.measured(latents) for latents in (euler, few_step)]
    best = max(short, key=lambda m: (m.row()["effect_accuracy"], -m.row()["bad_case_rate"]))
    return {"teachers_80": rows.measured(full), "teachers_8": best}


def measure_one_lora(
    lora: LoRAState | None, rows: EvaluationSet, text: Text, general: Rows, report: Report
) -> Measured:
    """Measures one LoRA (None: the base) on every effect and on `general_rows`, with the few-step sampler."""
    adapter = rows.adapter
    with nullcontext() if lora is None else AdapterBank(adapter.pipeline.transformer, {"lora": lora}) as bank:
        generator = Generator(adapter, bank, report=report)
        # Every row is on the one slot; without a bank the ids are not read.
        latents = generator.few_step(torch.zeros_like(rows.ids), rows.conditioning(text), rows.seeds, STEPS, SHIFT)
        general_latents = generator.few_step(*general, STEPS, SHIFT)
    return replace(
        rows.measured(latents),
        general=evaluation.general_accuracy(to_images(adapter.decode(general_latents))),
        # Two bytes for each number.
        megabytes=None if lora is None else round(2e-6 * lora.num_parameters, 2),
    )


def measure_baselines(
    adapter: Flux2KleinAdapter, loras: Mapping[str, LoRAState], merged: Sequence[str]
) -> dict[str, Measured]:
    """Measures all rows that do not depend on the student.

    Each merge of PEFT that takes unequal ranks is measured at several weights per teacher, and the best is kept, as
    its user would. It is asked with the teachers' prompts.

    Args:
        adapter: the studio.
        loras: effect name to teacher.
        merged: the effects whose teachers are merged, and which the base is measured on.
    """
    rows = EvaluationSet.encode(adapter, merged)
    general = general_rows(adapter)
    states = [loras[effect] for effect in merged]
    shapes = linear_shapes(adapter.pipeline.transformer)
    rank = min(MERGE_RANK, sum(state.max_rank for state in states))
    # Full weight for each teacher, weights of unit norm, weights that sum to one.
    weights = [1.0, len(states) ** -0.5, 1 / len(states)]
    text = adapter.encode_prompts([EFFECTS[effect].prompt for effect in merged])
    # A guided step passes every row through the transformer twice.
    teacher_passes = len(loras) * evaluation.NUM_SCENES * (2 * TEACHER_STEPS + 2 * STEPS)
    one_lora_passes = (len(rows.ids) + evaluation.NUM_GENERAL) * STEPS
    with stage("baselines", teacher_passes + (len(MERGES) * len(weights) + 1) * one_lora_passes) as advance:
        measured = measure_teachers(adapter, loras, advance)
        for name, method in MERGES.items():
            candidates = []
            for weight in weights:
                lora = merge_states(states, shapes, method, rank, [weight] * len(states))
                candidates.append(measure_one_lora(lora, rows, text, general, advance))
            measured[name] = max(candidates, key=lambda m: m.row()["effect_accuracy"])
        # The base is asked as the student is.
        text = adapter.encode_prompts([student_prompts(effect)[0] for effect in merged])
        measured["base"] = measure_one_lora(None, rows, text, general, advance)
    return measured


def grid_pictures(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Picks the picture of each effect for the grid from its outputs ``[N, 64, 64, 3]``, as uint8."""
    return {effect: to_bytes(images[grid_scene(effect)]) for effect, images in outputs.items()}


def grid_scene(effect: str) -> int:
    """Returns the held-out scene that shows an effect in the grid of pictures."""
    return TEACHERS.index(effect) % evaluation.NUM_SCENES
