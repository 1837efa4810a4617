"""The rows that the student is compared with: the teachers at 80 and at 8 passes, merges of their weights, the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

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
from clora.studio.demo_config import GUIDANCE, SHIFT, STEPS, TEACHER_STEPS, student_prompts
from clora.studio.effects import EFFECTS
from clora.studio.pixels import to_bytes, to_images, to_tensor
from clora.studio.results import Measured
from clora.studio.teachers import TEACHERS

MERGES = {"merge_svd": "svd", "merge_ties_svd": "ties_svd", "merge_dare_ties_svd": "dare_ties_svd"}
MERGE_RANK = 64
MERGE_SCENES = 12  # on which the weight of a merge is chosen
FIRST_EFFECT_SEED = 7_000_000
FIRST_GENERAL_SEED = 8_000_000

Rows = tuple[Tensor, Conditioning, list[int]]
"""The slots ``[N]``, the conditioning and the seeds of N rows to sample (`Generator`)."""


@dataclass(frozen=True)
class EvaluationSet:
    """Encoded held-out scenes of every effect: E effects on N outputs each, ``E x N`` rows.

    Attributes:
        adapter: the studio.
        effects: the effects.
        scenes: how many there are.
        ids: ``[E x N]``, the effect of each row.
        sources: ``[E x N, T, C]``; an effect's rows are the scenes in order, once for each noise.
        seeds: of the noise, one for each row; a method's output has the noise of all others' of its row.
    """

    adapter: Flux2KleinAdapter
    effects: tuple[str, ...]
    scenes: int
    ids: Tensor
    sources: Tensor
    seeds: list[int]

    @staticmethod
    def encode(
        adapter: Flux2KleinAdapter, effects: Sequence[str], scenes: int | None = None, noises: int | None = None
    ) -> EvaluationSet:
        """Encodes the first ``scenes`` held-out scenes; by default `evaluation.NUM_SCENES` with `evaluation.NOISES` each."""
        scenes = evaluation.NUM_SCENES if scenes is None else scenes
        noises = evaluation.NOISES if noises is None else noises
        latents = adapter.encode_images(to_tensor(evaluation.held_out_sources(scenes, adapter.size[0])))
        # Effect by effect: the rows e N to (e + 1) N - 1 are the outputs of effect e.
        ids = torch.arange(len(effects)).repeat_interleave(scenes * noises)
        # The same for an effect whatever others it is measured with.
        first = [FIRST_EFFECT_SEED + 1000 * TEACHERS.index(effect) for effect in effects]
        seeds = [start + i for start in first for i in range(scenes * noises)]
        return EvaluationSet(adapter, tuple(effects), scenes, ids, latents.repeat(len(effects) * noises, 1, 1), seeds)

    def conditioning(self, text: Text) -> Conditioning:
        """Returns the conditioning of all rows, each with the prompt of its effect, of ``text [E]``."""
        return Conditioning(text[self.ids], self.sources)

    def as_teachers(self) -> Conditioning:
        """Returns the conditioning of all rows, each with the prompt that its teacher was trained with."""
        return self.conditioning(self.adapter.encode_prompts([EFFECTS[effect].prompt for effect in self.effects]))

    def outputs(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Decodes the latents of all rows: effect name to images ``[N, S, S, 3]``."""
        images = to_images(self.adapter.decode(latents))
        return dict(zip(self.effects, np.split(images, len(self.effects)), strict=True))

    def measured(self, latents: Tensor, general: Sequence[bool] | None = None) -> Measured:
        """Judges the latents of all rows."""
        outputs = self.outputs(latents)
        return Measured(
            evaluation.judge_effects(outputs, self.scenes), self.scenes, general, grid_pictures(outputs, self.scenes)
        )


def general_rows(adapter: Flux2KleinAdapter, count: int) -> Rows:
    """Encodes the first held-out general edits, for a bank of one LoRA or none."""
    cases = evaluation.general_cases(count, adapter.size[0])
    text = adapter.encode_prompts([case.edit.instruction for case in cases])
    sources = adapter.encode_images(to_tensor(np.stack([case.edit.source for case in cases])))
    seeds = [FIRST_GENERAL_SEED + i for i in range(len(cases))]
    return torch.zeros(len(cases), dtype=torch.int64), Conditioning(text, sources), seeds


def full_renders(rows: EvaluationSet, generator: Generator) -> Tensor:
    """Renders all rows by their teachers: 40 Euler steps with guidance, which are 80 passes; latents ``[E x N, T, C]``."""
    empty = rows.adapter.encode_prompts([""])
    return generator.euler(rows.ids, rows.as_teachers(), rows.seeds, TEACHER_STEPS, empty, GUIDANCE)


def measure_teachers(
    adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState], report: Report
) -> dict[str, Measured]:
    """Measures ``teachers_80`` and ``teachers_8``: the latter is the better of Euler and the few-step sampler."""
    rows = EvaluationSet.encode(adapter, tuple(teachers))
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        generator = Generator(adapter, bank, report=report)
        full = full_renders(rows, generator)
        conditioning = rows.as_teachers()
        euler = generator.euler(rows.ids, conditioning, rows.seeds, STEPS)
        few_step = generator.few_step(rows.ids, conditioning, rows.seeds, STEPS, SHIFT)
    # Teachers were not trained for 8 passes: they get the sampler that suits them better.
    short = [rows.measured(latents) for latents in (euler, few_step)]
    best = max(short, key=lambda m: (m.row()["effect_accuracy"], -m.row()["bad_case_rate"]))
    return {"teachers_80": rows.measured(full), "teachers_8": best}


def measure_one_lora(
    lora: LoRAState | None, rows: EvaluationSet, text: Text, general: Rows | None, report: Report
) -> Measured:
    """Measures one LoRA (None: what the transformer holds) on every effect and on `general_rows`, with the few-step sampler."""
    adapter = rows.adapter
    with nullcontext() if lora is None else AdapterBank(adapter.pipeline.transformer, {"lora": lora}) as bank:
        generator = Generator(adapter, bank, report=report)
        # Every row is on the one slot; without a bank the ids are not read.
        latents = generator.few_step(torch.zeros_like(rows.ids), rows.conditioning(text), rows.seeds, STEPS, SHIFT)
        edited = None if general is None else generator.few_step(*general, STEPS, SHIFT)
    correct = None if edited is None else evaluation.general_results(to_images(adapter.decode(edited)))
    return rows.measured(latents, correct)


def measure_baselines(adapter: Flux2KleinAdapter, loras: Mapping[str, LoRAState]) -> dict[str, Measured]:
    """Measures all rows that do not depend on the student, for these teachers by effect.

    Each merge of PEFT that takes unequal ranks is tried at several weights per teacher on some scenes, and the best is
    measured, as its user would choose. It is asked with the teachers' prompts.
    """
    effects = tuple(loras)
    rows = EvaluationSet.encode(adapter, effects)
    few = EvaluationSet.encode(adapter, effects, min(MERGE_SCENES, evaluation.NUM_SCENES), 1)
    general = general_rows(adapter, evaluation.NUM_GENERAL)
    states = list(loras.values())
    shapes = linear_shapes(adapter.pipeline.transformer)
    rank = min(MERGE_RANK, sum(state.max_rank for state in states))
    # Full weight for each teacher, weights of unit norm, weights that sum to one.
    weights = [1.0, len(states) ** -0.5, 1 / len(states)]
    text = adapter.encode_prompts([EFFECTS[effect].prompt for effect in effects])
    # A guided step passes every row through the transformer twice.
    teacher_passes = len(rows.ids) * (2 * TEACHER_STEPS + 2 * STEPS)
    merge_passes = len(weights) * len(few.ids) * STEPS
    one_lora_passes = (len(rows.ids) + evaluation.NUM_GENERAL) * STEPS
    with stage(
        "baselines", teacher_passes + len(MERGES) * merge_passes + (len(MERGES) + 1) * one_lora_passes
    ) as advance:
        measured = measure_teachers(adapter, loras, advance)
        for name, method in MERGES.items():
            merges = [merge_states(states, shapes, method, rank, [weight] * len(states)) for weight in weights]
            tried = [measure_one_lora(lora, few, text, None, advance).row() for lora in merges]
            best = max(range(len(weights)), key=lambda i: tried[i]["effect_accuracy"])
            found = measure_one_lora(merges[best], rows, text, general, advance)
            # Two bytes for each number.
            measured[name] = replace(found, megabytes=round(2e-6 * merges[best].num_parameters, 2))
        # The base is asked as the student is.
        asked = adapter.encode_prompts([student_prompts(effect)[0] for effect in effects])
        measured["base"] = measure_one_lora(None, rows, asked, general, advance)
    return measured


def grid_pictures(outputs: Mapping[str, np.ndarray], scenes: int) -> dict[str, np.ndarray]:
    """Picks the picture of each effect for the grid from its outputs ``[N, S, S, 3]``, as uint8."""
    return {effect: to_bytes(images[grid_scene(effect) % scenes]) for effect, images in outputs.items()}


def grid_scene(effect: str) -> int:
    """Returns the held-out scene that shows an effect in the grid of pictures."""
    return TEACHERS.index(effect) % evaluation.NUM_SCENES
