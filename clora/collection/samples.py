"""A picture of what a new student does: every effect on a picture that it was trained on, beside the result it was taught."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.config.settings import DistillConfig
from clora.data.batches import DistillData
from clora.data.generation import Generator
from clora.data.images import encode_png, list_images, load_image
from clora.data.rendering import TEACHERS_AT_ONCE, samples_at_once
from clora.devices import on_device
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.common import to_pil
from clora.models.conditioning import Conditioning
from clora.progress import stage
from clora.report.drawing import draw_grid

CELL = 256  # pixels of a picture's longer side at most


def draw_samples(
    config: DistillConfig, adapter: ModelAdapter, student: LoRAState, data: DistillData, device: torch.device
) -> bytes:
    """The grid as PNG: picture, target and the student's result, a row for each effect.

    Args:
        config: the settings.
        adapter: the model family; its transformer is on the device and carries no bank.
        student: what was trained.
        data: what it was trained on.
        device: where the autoencoder goes for it.
    """
    with stage("draw samples", len(data.effects) * config.sampler.steps) as advance:
        results = _results(config, adapter, student, data, advance)
        with on_device(adapter.pipeline.vae, device):
            columns = [_first_pictures(config), *(_decoded(adapter, part) for part in (data.targets[:, 0], results))]
    names = ("picture", "target", f"this LoRA, {config.sampler.steps} passes")
    return encode_png(draw_grid(names, data.effects, np.stack(columns, axis=1)))


def _results(config: DistillConfig, adapter: ModelAdapter, student: LoRAState, data: DistillData, report) -> Tensor:
    """Latents ``[E, T, C]`` of the first sample of each effect under its first prompt."""
    count, sampler = len(data.effects), config.sampler
    with AdapterBank(adapter.pipeline.transformer, {"student": student}) as bank:
        batch = samples_at_once(config, TEACHERS_AT_ONCE)
        generator = Generator(adapter, bank, bank.slots(), sampler.shift, batch, report)
        conditioning = Conditioning(data.text[data.student_text[:, 0, 0]], data.sources[:, 0])
        ids = torch.zeros(count, dtype=torch.int64)
        return generator.few_step(ids, conditioning, [config.seed] * count, sampler.steps)


def _first_pictures(config: DistillConfig) -> np.ndarray:
    """uint8 ``[E, H, W, 3]``, small."""
    folders = [effect.sources or config.data.sources for effect in config.effects]
    return np.stack([_small(load_image(list_images(folder)[0], config.data.size)) for folder in folders])


def _decoded(adapter: ModelAdapter, latents: Tensor) -> np.ndarray:
    """The same of latents, one by one: an autoencoder needs much memory for a large picture."""
    return np.stack([_small(adapter.decode(row[None])[0]) for row in latents])


def _small(pixels: Tensor) -> np.ndarray:
    image = to_pil(pixels)
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return np.asarray(image)
