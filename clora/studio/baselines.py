"""What the student is compared with: the teachers at 80 and at 8 passes, merges of their weights, and the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator
from clora.lora.algebra import merge_states
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.assets import student_prompts
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import general_accuracy, general_cases, held_out_sources, judge_effects, summary
from clora.studio.judges import Verdict
from clora.studio.making.vae import to_images, to_tensor

MERGES = {"merge_svd": "svd", "merge_ties_svd": "ties_svd", "merge_dare_ties_svd": "dare_ties_svd"}
STEPS, TEACHER_STEPS, SHIFT = 8, 40, 3.0
MERGE_RANK = 64


@dataclass(frozen=True)
class Measured:
    """One row of the table: outputs per effect ``[N, 64, 64, 3]``, verdicts, general accuracy, size of one LoRA in fp16."""

    outputs: Mapping[str, np.ndarray]
    verdicts: Mapping[str, Sequence[Verdict]]
    general: float | None
    megabytes: float | None = None

    def row(self) -> dict[str, object]:
        return summary(self.verdicts, self.general)

    def to_json(self) -> dict[str, object]:
        verdicts = {effect: [asdict(v) for v in row] for effect, row in self.verdicts.items()}
        return {"verdicts": verdicts, "general": self.general, "megabytes": self.megabytes}


@dataclass(frozen=True)
class EvaluationSet:
    """Encoded held-out scenes, N per effect, and general cases.

    Attributes:
        effects: the effects.
        count: N.
        sources: ``[N, T, C]``.
        teacher_text, student_text: E prompts.
        empty_text: the empty prompt.
        general: conditioning of the general cases.
    """

    effects: tuple[str, ...]
    count: int
    sources: Tensor
    teacher_text: Text
    student_text: Text
    empty_text: Text
    general: Conditioning

    @staticmethod
    def encode(adapter: Flux2KleinAdapter, effects: Sequence[str], count: int, general: int) -> EvaluationSet:
        cases = general_cases(general)
        return EvaluationSet(
            effects=tuple(effects),
            count=count,
            sources=adapter.encode_images(to_tensor(held_out_sources(count))),
            teacher_text=adapter.encode_prompts([EFFECTS[e].prompt for e in effects]),
            student_text=adapter.encode_prompts([student_prompts(e)[0] for e in effects]),
            empty_text=adapter.encode_prompts([""]),
            general=Conditioning(
                adapter.encode_prompts([case.edit.instruction for case in cases]),
                adapter.encode_images(to_tensor(np.stack([case.source for case in cases]))),
            ),
        )

    def conditioning(self, text: Text) -> Conditioning:
        """Every effect on every scene: ``E x N`` rows."""
        e = len(self.effects)
        return Conditioning(text[self.ids], self.sources.repeat(e, 1, 1))

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.effects)).repeat_interleave(self.count)

    @property
    def seeds(self) -> list[int]:
        return [7_000_000 + i for i in range(len(self.effects) * self.count)]


Report = Callable[[int], None]


def measure_teachers(
    adapter: Flux2KleinAdapter,
    teachers: Mapping[str, LoRAState],
    evaluation: EvaluationSet,
    guidance: float,
    report: Report,
) -> dict[str, Measured]:
    """Rows ``teachers_80`` and ``teachers_8``: the latter is the better of Euler and the few-step sampler."""
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        generator = Generator(adapter, bank, bank.slots(), SHIFT, report=report)
        ids, seeds = evaluation.ids, evaluation.seeds
        conditioning = evaluation.conditioning(evaluation.teacher_text)
        full = generator.guided_euler(ids, conditioning, evaluation.empty_text, seeds, TEACHER_STEPS, guidance)
        short = [generator.euler(ids, conditioning, seeds, STEPS), generator.few_step(ids, conditioning, seeds, STEPS)]
    candidates = [_measured(adapter, evaluation, latents) for latents in short]
    best = max(candidates, key=lambda m: (m.row()["effect_accuracy"], -m.row()["bad_case_rate"]))
    return {"teachers_80": _measured(adapter, evaluation, full), "teachers_8": best}


def measure_one_lora(
    adapter: Flux2KleinAdapter, lora: LoRAState | None, evaluation: EvaluationSet, text: Text, report: Report
) -> Measured:
    """One LoRA (None: the base) for every effect and for general edits, with the few-step sampler."""
    transformer = adapter.pipeline.transformer
    with nullcontext() if lora is None else AdapterBank(transformer, {"lora": lora}) as bank:
        slots = None if bank is None else bank.slots()
        generator = Generator(adapter, bank, slots, SHIFT, report=report)
        ids = torch.zeros(len(evaluation.ids), dtype=torch.int64)
        latents = generator.few_step(ids, evaluation.conditioning(text), evaluation.seeds, STEPS)
        count = len(evaluation.general)
        general_seeds = [8_000_000 + i for i in range(count)]
        general = generator.few_step(torch.zeros(count, dtype=torch.int64), evaluation.general, general_seeds, STEPS)
    accuracy = general_accuracy(to_images(adapter.decode(general)))
    size = None if lora is None else round(2e-6 * lora.num_parameters, 2)
    return replace(_measured(adapter, evaluation, latents, accuracy), megabytes=size)


def measure_merges(
    adapter: Flux2KleinAdapter, teachers: Mapping[str, LoRAState], evaluation: EvaluationSet, report: Report
) -> dict[str, Measured]:
    """One row per PEFT merge that takes unequal ranks, asked with the teachers' prompts.

    Each is measured at several weights per teacher and the best is kept, as its user would.
    """
    shapes = linear_shapes(adapter.pipeline.transformer)
    states = list(teachers.values())
    rank = min(MERGE_RANK, sum(state.max_rank for state in states))

    def best(method: str) -> Measured:
        weights = [1.0, len(states) ** -0.5, 1 / len(states)]
        merged = [merge_states(states, shapes, method, rank, [w] * len(states)) for w in weights]
        rows = [measure_one_lora(adapter, lora, evaluation, evaluation.teacher_text, report) for lora in merged]
        return max(rows, key=lambda m: m.row()["effect_accuracy"])

    return {name: best(method) for name, method in MERGES.items()}


def _measured(
    adapter: Flux2KleinAdapter, evaluation: EvaluationSet, latents: Tensor, general: float | None = None
) -> Measured:
    images = to_images(adapter.decode(latents))
    outputs = {e: images[i * evaluation.count : (i + 1) * evaluation.count] for i, e in enumerate(evaluation.effects)}
    return Measured(outputs, judge_effects(outputs), general)
