"""The samples of a collection: a picture of every effect, on an image from training, beside the target of its teacher."""

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

CELL = 256  # most pixels of an image's longer side


def draw_samples(
    config: DistillConfig, adapter: ModelAdapter, student: LoRAState, data: DistillData, device: torch.device
) -> bytes:
    """Draws a grid as PNG: source image, target and the student's result, a row for each effect.

    Args:
        config: the settings.
        adapter: the model family; its transformer is on the device and carries no bank.
        student: the trained LoRA.
        data: its training data.
        device: where the autoencoder runs.
    """
    num_effects, steps = len(data.effects), config.sampler.steps
    with stage("draw samples", num_effects * steps) as advance:
        # The first source of each effect under its first prompt.
        conditioning = Conditioning(data.text[data.student_text[:, 0, 0]], data.sources[:, 0])
        with AdapterBank(adapter.pipeline.transformer, {"student": student}) as bank:
            at_once = samples_at_once(config, TEACHERS_AT_ONCE)
            generator = Generator(adapter, bank, at_once, advance)
            ids = torch.zeros(num_effects, dtype=torch.int64)
            results = generator.few_step(ids, conditioning, [config.seed] * num_effects, steps, config.sampler.shift)
        rows = []
        with on_device(adapter.pipeline.vae, device):
            for effect, target, result in zip(config.effects, data.targets[:, 0], results, strict=True):
                source = load_image(list_images(effect.sources or config.data.sources)[0], config.data.size)
                # One at a time: an autoencoder needs much memory for a large image.
                decoded = [adapter.decode(latents[None])[0] for latents in (target, result)]
                rows.append([_small(image) for image in (source, *decoded)])
    columns = ("picture", "target", f"this LoRA, {steps} passes")
    return encode_png(draw_grid(columns, data.effects, np.array(rows)))


def _small(pixels: Tensor) -> np.ndarray:
    """Scales an image ``[3, H, W]`` in [-1, 1] down to uint8 ``[h, w, 3]`` of `CELL` pixels at most."""
    image = to_pil(pixels)
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return np.asarray(image)
