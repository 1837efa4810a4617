"""Targets: the pictures that teachers make of their own sources, and the base of general edits (method.md section 4a)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.pages import teacher_pages
from clora.config.settings import DistillConfig
from clora.data.batches import GENERAL
from clora.data.cache import Cache, Entry, chunked
from clora.data.encoders import PromptTable
from clora.data.generation import Generator, Report
from clora.data.tables import Latents, LatentTable, TextTable, select
from clora.hashing import digest, tensor_digest
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text
from clora.progress import stage

# The base's seeds begin apart from those of the teachers' renders, which count from the config's own.
FIRST_GENERAL_SEED = 500_000
# Samples of a batch, where ``train.forward_rows`` allows as many.
TEACHERS_AT_ONCE, GENERAL_AT_ONCE = 16, 24


class Samples(NamedTuple):
    """N pictures to render.

    Attributes:
        sources: ``[N, S, C]`` encoded images to edit.
        prompt, empty: ``[N]`` rows of the encoded prompts, and of the empty prompts for the pass without a prompt.
        teacher: ``[N]`` index into the teachers; -1 (`GENERAL`) is the base.
        seed: ``[N]`` int64 seeds of the noise.
    """

    sources: Latents
    prompt: Tensor
    empty: Tensor
    teacher: Tensor
    seed: Tensor

    @staticmethod
    def of_teachers(sources: Latents, prompt: Tensor, empty: Tensor, seed: int) -> Samples:
        """The samples of E teachers with M sources each, from ``[E, M, S, C]`` and ``[E, M]``, teacher by teacher."""
        teacher = torch.arange(len(prompt)).repeat_interleave(prompt.shape[1])
        return Samples(
            sources.flatten(0, 1), prompt.flatten(), empty.flatten(), teacher, seed + torch.arange(len(teacher))
        )

    @staticmethod
    def of_base(sources: Latents, prompt: Tensor, empty: Tensor, seed: int) -> Samples:
        """The base's samples of Q general pairs (`DistillData.general_pairs`), from ``[Q, S, C]`` and ``[Q]``."""
        seeds = seed + FIRST_GENERAL_SEED + torch.arange(len(prompt))
        return Samples(sources, prompt, empty, torch.full_like(prompt, GENERAL), seeds)

    def at(self, rows: Sequence[int] | slice) -> Samples:
        """Some of the samples."""
        sources, *others = self
        return Samples(select(sources, rows), *(part[rows] for part in others))


def num_passes(config: DistillConfig, samples: int) -> int:
    """Rows that pass through the transformer to render this number of samples."""
    sampler = config.sampler
    return samples * sampler.teacher_steps * sampler.passes_per_teacher_step


def samples_at_once(config: DistillConfig, most: int) -> int:
    """Samples of one batch, at most ``most``; with guidance each is two rows of ``train.forward_rows``."""
    rows = config.train.forward_rows
    return most if rows is None else max(1, min(most, rows // config.sampler.passes_per_teacher_step))


def render_targets(
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    samples: Samples,
    text: Text | TextTable,
    config: DistillConfig,
    report: Report,
) -> Iterator[Tensor]:
    """Renders samples by guided Euler sampling, each by its teacher and with its own prompt (the paper's y).

    Args:
        adapter: the model family.
        teachers: effect name to LoRA, in the order that ``samples.teacher`` counts.
        samples: N pictures to render.
        text: the encoded prompts.
        config: sampler settings.
        report: called as ``report(passes)``.

    Yields:
        Each sample's latents ``[T, C]`` in order, as soon as its batch is done.
    """

    def render(generator: Generator, batch: Samples) -> Tensor:
        return generator.euler(
            batch.teacher,
            Conditioning(text[batch.prompt], batch.sources[:]),
            batch.seed.tolist(),
            config.sampler.teacher_steps,
            text[batch.empty],
            config.sampler.teacher_guidance,
            config.sampler.teacher_norm_rescale,
        )

    if (samples.teacher == GENERAL).all():
        # The base renders with no bank attached, and in larger batches: it needs no memory for LoRAs.
        at_once = samples_at_once(config, GENERAL_AT_ONCE)
        generator = Generator(adapter, None, at_once, report)
        for start in range(0, len(samples.prompt), at_once):
            batch = samples.at(slice(start, start + at_once))
            yield from render(generator, batch)
        return
    # The bank holds every teacher, also of those that have nothing to render: its ranks are then the same in every run.
    transformer = adapter.pipeline.transformer
    pages = teacher_pages(config.train.teacher_memory_gb, transformer, list(teachers.values()))
    at_once = samples_at_once(config, TEACHERS_AT_ONCE)
    ids = samples.teacher
    with AdapterBank(transformer, teachers, pages=pages) as bank:
        generator = Generator(adapter, bank, at_once, report)
        chunks = [slice(chunk.start, chunk.stop) for chunk in render_chunks(ids, at_once)]
        for rows, following in zip(chunks, [*chunks[1:], slice(0)], strict=True):
            with bank.placed(ids[rows]):
                bank.fetch(ids[following])  # the next batch's teacher arrives while this one renders
                yield from render(generator, samples.at(rows))


def render_chunks(teacher: Tensor, at_once: int) -> list[range]:
    """Splits samples ``[N]``, teacher by teacher, into the batches that are rendered at once.

    A batch has one teacher. Its bits do not depend on the other effects of a run, nor on what was rendered before.
    """
    chunks = []
    start = 0
    for count in teacher.unique_consecutive(return_counts=True)[1].tolist():
        chunks += chunked(count, at_once, start)
        start += count
    return chunks


@dataclass(frozen=True)
class CachedTargets:
    """Renders what the cache does not have; an entry is one picture.

    Attributes:
        config: sampler settings.
        adapter: the model family.
        table, text: the prompts, and the same encoded.
        cache: earlier renders.
        components: fingerprints of the pipeline's parts (`clora.models.fingerprint.component_fingerprints`).
    """

    config: DistillConfig
    adapter: ModelAdapter
    table: PromptTable
    text: TextTable
    cache: Cache
    components: Mapping[str, str]

    def render(
        self,
        title: str,
        teachers: Mapping[str, LoRAState],
        samples: Samples,
        images: Sequence[str],
        names: Sequence[str],
    ) -> LatentTable:
        """The latents of N samples.

        Args:
            title: of the stage that shows the progress.
            teachers: as in `render_targets`.
            samples: N pictures to render.
            images: the hash of each sample's source (`clora.data.encoders.Pictures`).
            names: the picture of each sample, for messages.

        Returns:
            ``[N, T, C]``.
        """
        # An entry's key is everything that its render depends on, whatever other renders share its batch. It is found
        # again by what it shows, not by its place in a run: one more effect renders only its own.
        sampler = self.config.sampler
        shared = {
            "family": type(self.adapter).__name__,
            "pipeline": digest(self.components),
            "size": self.adapter.size,
            "max_sequence_length": self.adapter.max_sequence_length,
            "sampler": {
                "teacher_steps": sampler.teacher_steps,
                "guidance": sampler.teacher_guidance,
                "guidance_embedding": sampler.guidance_embedding,
            },
            "norm_rescale": sampler.teacher_norm_rescale,
        }
        loras = [*map(lora_digest, teachers.values()), None]  # the last, number -1, is the base
        rows = zip(samples.prompt.tolist(), images, samples.teacher.tolist(), samples.seed.tolist(), strict=True)
        keys = [
            {**shared, "prompt": self.table.prompts[row], "image": image, "lora": loras[teacher], "seed": seed}
            for row, image, teacher, seed in rows
        ]

        def make(chunks: list[range]) -> Iterator[Entry]:
            rows = list(chain(*chunks))
            with stage(title, num_passes(self.config, len(rows))) as advance:
                # Only a teacher's last chunk is shorter than the others, so that these rows are split as the whole was.
                chosen = samples.at(rows)
                for latents in render_targets(self.adapter, teachers, chosen, self.text, self.config, advance):
                    yield {"latents": latents}

        def describe(i: int) -> str:
            teacher = int(samples.teacher[i])
            who = "a general edit" if teacher == GENERAL else f"effect {list(teachers)[teacher]!r}"
            return f"{who}, the target of {names[i]}"

        at_once = samples_at_once(self.config, TEACHERS_AT_ONCE if teachers else GENERAL_AT_ONCE)
        chunks = render_chunks(samples.teacher, at_once)
        targets = self.cache.entries("targets")
        targets.extend(keys, chunks, describe, make)
        return LatentTable([targets])


def lora_digest(state: LoRAState) -> str:
    """The hash of a LoRA's factors, whatever file they came from."""
    factors = {}
    for name, module in state.modules.items():
        factors |= {f"{name}.lora_A": module.lora_A, f"{name}.lora_B": module.lora_B}
    return tensor_digest(factors)
