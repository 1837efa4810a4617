"""Edits of pictures, and what clora's few-step sampler makes of them, to be compared with stock calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from helpers.pictures import pixels
from PIL import Image
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.flow.matching import student_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning


@dataclass(frozen=True)
class Sample:
    """One edit: prompt, images to edit, name of a LoRA (None for the base) and seed of all its noise."""

    prompt: str
    images: tuple[Image.Image, ...]
    lora: str | None
    seed: int


def condition(adapter: ModelAdapter, samples: Sequence[Sample], prompt: str | None = None) -> Conditioning:
    """The samples' conditioning, with another prompt where one is given; all have images of the same sizes."""
    references = [torch.cat([pixels(i) for i in images]) for images in zip(*(s.images for s in samples), strict=True)]
    prompts = [sample.prompt if prompt is None else prompt for sample in samples]
    return Conditioning(adapter.encode_prompts(prompts, references), *adapter.encode_sources(references))


@contextmanager
def routed(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample]
) -> Iterator[tuple[AdapterBank, Tensor]]:
    """A bank of all LoRAs, and the samples' rows in it."""
    with AdapterBank(adapter.pipeline.transformer, loras) as bank:
        yield bank, torch.tensor([-1 if s.lora is None else list(loras).index(s.lora) for s in samples])


def start_noise(adapter: ModelAdapter, sample: Sample) -> Tensor:
    """Noise ``[1, T, C]`` to start from."""
    return torch.randn(1, *adapter.latent_shape, generator=torch.Generator().manual_seed(sample.seed + 1))


@torch.no_grad()
def few_step(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample], steps: int = 8
) -> Tensor:
    """Images ``[N, 3, H, W]`` of clora's few-step sampler, all samples in one batch."""
    conditioning, noises = condition(adapter, samples), []
    for sample in samples:
        torch.manual_seed(sample.seed)  # as before a stock call, which draws a sample's noise at each step
        noises.append([torch.randn(1, *adapter.latent_shape) for _ in range(steps - 1)])
    with routed(adapter, loras, samples) as (bank, ids), bank.route(bank.slots(), ids):
        latents = few_step_sample(
            lambda x, sigma: adapter.velocity(x, sigma, conditioning),
            torch.cat([start_noise(adapter, sample) for sample in samples]),
            student_schedule(steps),
            noises=[torch.cat(rows) for rows in zip(*noises, strict=True)],
        )
    return to_images(adapter.decode(latents))


def to_images(decoded: Tensor) -> Tensor:
    """Decoded images as pipelines return them, in [0, 1]."""
    return (decoded / 2 + 0.5).clamp(0, 1)
