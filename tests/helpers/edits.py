"""Edits of pictures by stock calls of a pipeline and by clora's few-step sampler, to be compared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.collection_cases import student_scheduler
from helpers.pictures import pixels
from PIL import Image
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator
from clora.flow.matching import student_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.save import save_lora
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2Adapter, Flux2KleinAdapter
from clora.models.families.z_image import ZImageOmniAdapter, _pack, _unpack


@dataclass(frozen=True)
class Sample:
    """One edit: prompt, images to edit, name of a LoRA (None for the base) and seed of all its noise."""

    prompt: str
    images: tuple[Image.Image, ...]
    lora: str | None
    seed: int


def condition(adapter: ModelAdapter, samples: Sequence[Sample], prompt: str | None = None) -> Conditioning:
    """Returns the samples' conditioning, with another prompt where one is given; all have images of the same sizes."""
    references = [torch.cat([pixels(i) for i in images]) for images in zip(*(s.images for s in samples), strict=True)]
    prompts = [sample.prompt if prompt is None else prompt for sample in samples]
    return Conditioning(adapter.encode_prompts(prompts, references), *adapter.encode_sources(references))


@contextmanager
def routed(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample]
) -> Iterator[tuple[AdapterBank, Tensor]]:
    """Yields a bank of all LoRAs, and the samples' rows in it."""
    with AdapterBank(adapter.pipeline.transformer, loras) as bank:
        yield bank, torch.tensor([-1 if s.lora is None else list(loras).index(s.lora) for s in samples])


def draw_noise(adapter: ModelAdapter, generator: torch.Generator | None = None) -> Tensor:
    """Draws packed noise ``[1, T, C]`` in the order of the pipeline's own latents, as its scheduler draws it."""
    if isinstance(adapter, ZImageOmniAdapter):
        channels = adapter.pipeline.transformer.config.in_channels
        return _pack(torch.randn(1, channels, *(2 * side for side in adapter._grid), generator=generator))
    return torch.randn(1, *adapter.latent_shape, generator=generator)


def start_noise(adapter: ModelAdapter, sample: Sample) -> Tensor:
    """Returns packed noise ``[1, T, C]`` to start from."""
    return draw_noise(adapter, torch.Generator().manual_seed(sample.seed + 1))


def own_latents(adapter: ModelAdapter, packed: Tensor) -> Tensor:
    """Returns packed latents as the pipeline takes and returns them."""
    if isinstance(adapter, Flux2KleinAdapter | Flux2Adapter):
        return packed.transpose(1, 2).unflatten(2, adapter._grid)
    return _unpack(packed, adapter._grid) if isinstance(adapter, ZImageOmniAdapter) else packed


def stock_call(
    adapter: ModelAdapter,
    loras: Mapping[str, LoRAState | Path],
    sample: Sample,
    folder: Path | None,
    scheduler=None,
    steps: int = 8,
    output_type: str = "pt",
    **kwargs,
) -> Tensor:
    """Returns images ``[1, 3, H, W]`` in [0, 1] of a stock call of a copy of the pipeline with the sample's LoRA.

    ``loras`` has states, which are saved in ``folder`` first, or folders and files. ``scheduler`` None is the pipeline's.
    """
    pipeline = copy.copy(adapter.pipeline)
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    pipeline.scheduler = scheduler or pipeline.scheduler
    if sample.lora is not None:
        file = lora = loras[sample.lora]
        if isinstance(lora, LoRAState):
            file = folder / "lora.safetensors"
            save_lora(lora, file)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(file)
        else:
            pipeline.transformer.load_lora_adapter(file, prefix="transformer")
    sizes = {"height": adapter.size[0], "width": adapter.size[1], "max_sequence_length": adapter.max_sequence_length}
    known = inspect.signature(type(pipeline).__call__).parameters
    arguments = {name: value for name, value in sizes.items() if name in known} | {**adapter.student_call, **kwargs}
    latents = own_latents(adapter, arguments.pop("latents", start_noise(adapter, sample)))
    torch.manual_seed(sample.seed)
    images = pipeline(
        image=list(sample.images) if len(sample.images) > 1 else sample.images[0],
        prompt=sample.prompt,
        num_inference_steps=steps,
        latents=latents,
        output_type=output_type,
        **arguments,
    ).images
    return images[:, :3] if output_type == "pt" else images


@contextmanager
def received(adapter: ModelAdapter) -> Iterator[list[dict[str, Any]]]:
    """Yields a list of the arguments of every pass of a transformer of the adapter's class inside."""
    kind = type(adapter.pipeline.transformer)
    calls = []
    forward = kind.forward

    def noted(self, *args, **kwargs):
        calls.append(inspect.signature(forward).bind(self, *args, **kwargs).arguments)
        return forward(self, *args, **kwargs)

    kind.forward = noted
    try:
        yield calls
    finally:
        kind.forward = forward


@torch.no_grad()
def few_step(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample], steps: int = 8
) -> Tensor:
    """Returns images ``[N, 3, H, W]`` of clora's few-step sampler, all samples in one batch."""
    return to_images(adapter.decode(few_step_latents(adapter, loras, samples, steps)))


@torch.no_grad()
def few_step_latents(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample], steps: int = 8
) -> Tensor:
    """Returns the packed latents of `few_step`."""
    conditioning = condition(adapter, samples)
    noises = []
    for sample in samples:
        torch.manual_seed(sample.seed)  # as before a stock call, which draws a sample's noise at each step
        noises.append([draw_noise(adapter) for _ in range(steps - 1)])
    with routed(adapter, loras, samples) as (bank, ids), bank.route(bank.slots(), ids):
        return few_step_sample(
            lambda x, sigma: adapter.velocity(x, sigma, conditioning),
            torch.cat([start_noise(adapter, sample) for sample in samples]),
            student_schedule(steps),
            noises=[torch.cat(rows) for rows in zip(*noises, strict=True)],
        )


def check_batch(
    adapter: ModelAdapter, loras: Mapping[str, LoRAState], samples: Sequence[Sample], folder: Path, steps: int = 8
) -> None:
    """Checks that clora's few-step sampler makes, in one batch, the images of a stock call for each sample."""
    batch = few_step(adapter, loras, samples, steps)
    for sample, ours in zip(samples, batch, strict=True):
        stock = stock_call(adapter, loras, sample, folder, student_scheduler(3.0), steps)
        torch.testing.assert_close(stock[0], ours, rtol=0, atol=1e-4)
    assert min((a - b).abs().max() for i, a in enumerate(batch) for b in batch[:i]) > 0.01


def guided(
    adapter: ModelAdapter,
    loras: Mapping[str, LoRAState],
    samples: Sequence[Sample],
    empty: Text,
    steps: int,
    w: float,
    norm_rescale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the packed noise and the images of the teachers' guided sampler, all samples in one batch."""
    seeds = [sample.seed for sample in samples]
    with routed(adapter, loras, samples) as (bank, ids):
        generator = Generator(adapter, bank)
        latents = generator.euler(ids, condition(adapter, samples), seeds, steps, empty, w, norm_rescale)
        return generator._noise(seeds), to_images(adapter.decode(latents))


def to_images(decoded: Tensor) -> Tensor:
    """Returns decoded images as pipelines return them, in [0, 1]."""
    return (decoded / 2 + 0.5).clamp(0, 1)
