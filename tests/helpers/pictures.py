"""Random pictures for tests of pipelines that take PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth picture of ``(height, width)``, so that resizing keeps something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Image.Image, ...]:
    """Returns a picture of each size."""
    return tuple(picture(seed + i, size) for i, size in enumerate(sizes))


def pixels(image: Image.Image) -> torch.Tensor:
    """The same as adapters take it, fp32 ``[1, 3, H, W]`` in [-1, 1], with the strides that diffusers gives it."""
    return torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2) / 127.5 - 1


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (20, 24)) -> Path:
    """Writes PNG files ``0.png``, ``1.png`` ... of different pictures, those of another seed different again."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(100 * seed + i, size).save(folder / f"{i}.png")
    return folder
