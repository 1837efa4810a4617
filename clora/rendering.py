"""Targets: what every teacher makes of its own sources, and the base of general edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clora.adapter_bank import AdapterBank
from clora.conditioning import Conditioning, Text
from clora.config import DistillConfig
from clora.generation import Generator
from clora.lora.state import LoRAState
from clora.models import ModelAdapter

FIRST_GENERAL_SEED = 500_000  # apart from the seeds of the teachers' renders

Report = Callable[[int], None]


class Samples(NamedTuple):
    """What is rendered: sources ``[..., S, C]``, rows of their prompts and of the empty prompts beside them ``[...]``."""

    sources: Tensor
    prompt: Tensor
    empty: Tensor


def num_passes(config: DistillConfig, samples: int) -> int:
    """Rows that pass through the transformer to render so many samples."""
    sampler = config.sampler
    return samples * sampler.teacher_steps * (1 if sampler.guidance == 0 else 2)


def render_targets(
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    samples: Samples,
    text: Text,
    config: DistillConfig,
    report: Report,
    batch_size: int = 16,
) -> Tensor:
    """What every teacher makes of its own sources (the paper's y): guided Euler sampling with its own prompt.

    Args:
        adapter: the model family.
        teachers: effect name to LoRA, E of them.
        samples: ``[E, M]`` of them.
        text: the encoded prompts.
        config: sampler settings and seed.
        report: called as ``report(passes)``.
        batch_size: samples per batch (two rows each).

    Returns:
        ``[E, M, T, C]``.
    """
    num_effects, num_sources = samples.prompt.shape
    bank = AdapterBank(adapter.pipeline.transformer, teachers)
    try:
        generator = Generator(adapter, bank, bank.slots(), config.sampler.shift, batch_size, report)
        effect = torch.arange(num_effects).repeat_interleave(num_sources)
        seeds = [config.seed + i for i in range(len(effect))]
        latents = _render(generator, effect, Samples(*(part.flatten(0, 1) for part in samples)), text, seeds, config)
    finally:
        bank.detach()
    return latents.unflatten(0, (num_effects, num_sources))


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
    generator = Generator(adapter, None, None, config.sampler.shift, report=report)
    ids = torch.arange(len(samples.prompt))
    return _render(generator, ids, samples, text, [config.seed + FIRST_GENERAL_SEED + p for p in ids.tolist()], config)


def _render(
    generator: Generator, ids: Tensor, samples: Samples, text: Text, seeds: list[int], config: DistillConfig
) -> Tensor:
    sampler = config.sampler
    conditioning = Conditioning(text[samples.prompt], samples.sources)
    return generator.guided_euler(
        ids,
        conditioning,
        text[samples.empty],
        seeds,
        sampler.teacher_steps,
        sampler.guidance,
        config.objective.norm_rescale,
    )
