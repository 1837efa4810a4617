"""Targets: what every teacher makes of its own sources, and the base of general edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.pages import teacher_pages
from clora.config.settings import DistillConfig
from clora.data.cache import Cache, Entry, Key
from clora.data.encoders import PromptTable
from clora.data.generation import Generator
from clora.hashing import digest, tensor_digest
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text
from clora.progress import Advance, stage

FIRST_GENERAL_SEED = 500_000  # apart from the seeds of the teachers' renders
TEACHERS_AT_ONCE, GENERAL_AT_ONCE = 16, 24  # samples of a batch, where ``train.forward_rows`` allows as many

Report = Callable[[int], None]


class Samples(NamedTuple):
    """What is rendered: sources ``[..., S, C]``, rows of their prompts and of the empty prompts beside them ``[...]``."""

    sources: Tensor
    prompt: Tensor
    empty: Tensor

    def flat(self) -> Samples:
        """The same as ``[N]``."""
        return Samples(self.sources.flatten(0, -3), self.prompt.flatten(), self.empty.flatten())

    def at(self, rows: Sequence[int]) -> Samples:
        """Some of ``[N]``."""
        return Samples(*(part[rows] for part in self))


def num_passes(config: DistillConfig, samples: int) -> int:
    """Rows that pass through the transformer to render so many samples."""
    sampler = config.sampler
    return samples * sampler.teacher_steps * sampler.passes_per_teacher_step


def samples_at_once(config: DistillConfig, most: int) -> int:
    """Samples of one batch, at most so many: of two rows each where there is guidance."""
    rows = config.train.forward_rows
    return most if rows is None else max(1, min(most, rows // config.sampler.passes_per_teacher_step))


def target_seeds(config: DistillConfig, samples: int) -> list[int]:
    """The seeds of the teachers' renders, one for each of ``[E, M]`` in order."""
    return [config.seed + i for i in range(samples)]


def general_seeds(config: DistillConfig, samples: int) -> list[int]:
    """The seeds of the base's renders of general pairs."""
    return [config.seed + FIRST_GENERAL_SEED + i for i in range(samples)]


def render_targets(
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    samples: Samples,
    text: Text,
    config: DistillConfig,
    report: Report,
) -> Tensor:
    """What every teacher makes of its own sources (the paper's y): guided Euler sampling with its own prompt.

    Args:
        adapter: the model family.
        teachers: effect name to LoRA, E of them.
        samples: ``[E, M]`` of them.
        text: the encoded prompts.
        config: sampler settings and seed.
        report: called as ``report(passes)``.

    Returns:
        ``[E, M, T, C]``.
    """
    every = range(samples.prompt.numel())
    rendered = render_some_targets(every, adapter, teachers, samples, text, config, report)
    return torch.stack([latents for _, latents in rendered]).unflatten(0, samples.prompt.shape)


def render_some_targets(
    wanted: Sequence[int],
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    samples: Samples,
    text: Text,
    config: DistillConfig,
    report: Report,
) -> Iterator[tuple[int, Tensor]]:
    """`render_targets` for some of ``[E, M]``, counted row by row: yields each with its latents when its batch is done."""
    effect = torch.arange(len(teachers)).repeat_interleave(samples.prompt.shape[1])
    names = [list(teachers)[i] for i in sorted({int(effect[n]) for n in wanted})]
    slot = {name: i for i, name in enumerate(names)}
    ids = torch.tensor([slot.get(name, -1) for name in teachers])[effect]
    transformer, states = adapter.pipeline.transformer, {name: teachers[name] for name in names}
    pages = teacher_pages(config.train.teacher_memory_gb, transformer, list(states.values()))
    with AdapterBank(transformer, states, pages=pages) as bank:
        count = samples_at_once(config, TEACHERS_AT_ONCE)
        generator = Generator(adapter, bank, bank.slots(), config.sampler.shift, count, report)
        seeds = target_seeds(config, len(effect))
        chunks = [list(wanted[c]) for c in bank.chunks(ids[list(wanted)], count)]
        for rows, following in zip(chunks, [*chunks[1:], []], strict=True):
            with bank.placed(ids[rows]) as slots:
                bank.fetch(ids[following])
                yield from _render(generator, rows, slots, samples.flat(), text, seeds, config)


def render_general_targets(
    adapter: ModelAdapter, samples: Samples, text: Text, config: DistillConfig, report: Report
) -> Tensor:
    """What the base makes of general pairs (`DistillData.general_pairs`), as teachers do.

    Args:
        adapter: the model family.
        samples: ``[Q]`` of them.
        text: the encoded prompts.
        config: sampler settings and seed.
        report: called as ``report(passes)``.

    Returns:
        ``[Q, T, C]``.
    """
    rendered = render_some_general_targets(range(len(samples.prompt)), adapter, samples, text, config, report)
    return torch.stack([latents for _, latents in rendered])


def render_some_general_targets(
    wanted: Sequence[int], adapter: ModelAdapter, samples: Samples, text: Text, config: DistillConfig, report: Report
) -> Iterator[tuple[int, Tensor]]:
    """`render_general_targets` for some of ``[Q]``: yields each with its latents when its batch is done."""
    count = samples_at_once(config, GENERAL_AT_ONCE)
    generator = Generator(adapter, None, None, config.sampler.shift, count, report)
    seeds = general_seeds(config, len(samples.prompt))
    for start in range(0, len(wanted), generator.batch_size):
        rows = list(wanted[start : start + generator.batch_size])
        slots = torch.full((len(rows),), -1)  # the base alone reads none
        yield from _render(generator, rows, slots, samples, text, seeds, config)


def _render(
    generator: Generator,
    rows: Sequence[int],
    slots: Tensor,
    samples: Samples,
    text: Text,
    seeds: list[int],
    config: DistillConfig,
) -> Iterator[tuple[int, Tensor]]:
    """One batch: row of ``samples`` and latents of each."""
    sampler, batch = config.sampler, samples.at(rows)
    latents = generator.guided_euler(
        slots,
        Conditioning(text[batch.prompt], batch.sources),
        text[batch.empty],
        [seeds[row] for row in rows],
        sampler.teacher_steps,
        sampler.guidance,
        config.objective.norm_rescale,
    )
    yield from zip(rows, latents, strict=True)


Render = Callable[[Sequence[int], Advance], Iterator[tuple[int, Tensor]]]
NO_TARGET_READS = {"steps", "shift"}  # of the sampler's settings: those of the student


@dataclass(frozen=True)
class CachedTargets:
    """Renders what the cache does not have; an entry is one picture.

    Attributes:
        config: sampler settings and seed.
        adapter: the model family.
        table, text: the prompts, and the same encoded.
        cache: what was rendered before.
        components: what the pipeline is (`clora.models.fingerprint.component_fingerprints`).
    """

    config: DistillConfig
    adapter: ModelAdapter
    table: PromptTable
    text: Text
    cache: Cache
    components: Mapping[str, str]

    def of_teachers(self, teachers: Mapping[str, LoRAState], samples: Samples, images: Sequence[str]) -> Tensor:
        """What E teachers make of ``samples [E, M]``, ``[E, M, T, C]``; ``images`` has the hash of each source in order."""
        (num_effects, num_sources), made_from = samples.prompt.shape, [lora_digest(lora) for lora in teachers.values()]
        loras = [lora for lora in made_from for _ in range(num_sources)]

        def render(wanted: Sequence[int], advance: Advance) -> Iterator[tuple[int, Tensor]]:
            return render_some_targets(wanted, self.adapter, teachers, samples, self.text, self.config, advance)

        keys = self._keys(samples, images, loras, target_seeds(self.config, num_effects * num_sources))
        return self._targets("render targets", keys, render).unflatten(0, (num_effects, num_sources))

    def of_base(self, samples: Samples, images: Sequence[str]) -> Tensor:
        """What the base makes of ``samples [Q]``, ``[Q, T, C]``."""

        def render(wanted: Sequence[int], advance: Advance) -> Iterator[tuple[int, Tensor]]:
            return render_some_general_targets(wanted, self.adapter, samples, self.text, self.config, advance)

        keys = self._keys(samples, images, [None] * len(images), general_seeds(self.config, len(images)))
        return self._targets("render general targets", keys, render)

    def _targets(self, title: str, keys: Sequence[Key], render: Render) -> Tensor:
        def make(missing: list[int]) -> Iterator[tuple[int, Entry]]:
            with stage(title, num_passes(self.config, len(missing))) as advance:
                for i, latents in render(missing, advance):
                    yield i, {"latents": latents}

        return torch.stack([entry["latents"] for entry in self.cache.entries("targets", keys, make)])

    def _keys(
        self, samples: Samples, images: Sequence[str], loras: Sequence[str | None], seeds: Sequence[int]
    ) -> list[Key]:
        shared = {
            "family": type(self.adapter).__name__,
            "pipeline": digest(self.components),
            "size": self.adapter.size,
            "max_sequence_length": self.adapter.max_sequence_length,
            "sampler": self.config.sampler.model_dump(mode="json", exclude=NO_TARGET_READS),
            "norm_rescale": self.config.objective.norm_rescale,
        }
        prompts = [self.table.prompt(row) for row in samples.prompt.flatten().tolist()]
        return [
            {**shared, "prompt": prompt, "image": image, "lora": lora, "seed": seed}
            for prompt, image, lora, seed in zip(prompts, images, loras, seeds, strict=True)
        ]


def lora_digest(state: LoRAState) -> str:
    """The hash of what a LoRA does, whatever file it came from."""
    factors = (
        (f"{name}.{side}", getattr(m, side)) for name, m in state.modules.items() for side in ("lora_A", "lora_B")
    )
    return tensor_digest(dict(factors))
