"""Targets: what every teacher makes of its own sources, and the base of general edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clora.adapter_bank import AdapterBank
from clora.conditioning import Conditioning, Text
from clora.config import DistillConfig
from clora.generation import Generator
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.teacher_pages import teacher_pages

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
    return samples * sampler.teacher_steps * (1 if sampler.guidance == 0 else 2)


def samples_at_once(config: DistillConfig, most: int) -> int:
    """Samples of one batch, at most so many: of two rows each where there is guidance."""
    rows = config.train.forward_rows
    return most if rows is None else max(1, min(most, rows // (1 if config.sampler.guidance == 0 else 2)))


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
    bank = AdapterBank(transformer, states, pages=pages)
    try:
        count = samples_at_once(config, TEACHERS_AT_ONCE)
        generator = Generator(adapter, bank, bank.slots(), config.sampler.shift, count, report)
        seeds = target_seeds(config, len(effect))
        chunks = [list(wanted[c]) for c in bank.chunks(ids[list(wanted)], count)]
        for rows, following in zip(chunks, [*chunks[1:], []], strict=True):
            with bank.placed(ids[rows]) as slots:
                bank.fetch(ids[following])
                yield from _render(generator, rows, slots, samples.flat(), text, seeds, config)
    finally:
        bank.detach()


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
