"""Random pictures for tests of pipelines that take PIL images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth picture of ``(height, width)``, so that resizing keeps something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    """The same as adapters take it, fp32 ``[1, 3, H, W]`` in [-1, 1], with the strides that diffusers gives it."""
    return torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2) / 127.5 - 1


def write_pictures(folder, count: int, size: tuple[int, int]) -> None:
    """PNG files of different pictures."""
    for i in range(count):
        picture(100 + i, size).save(folder / f"{i}.png")


def write_images(folder, count, seed=0):
    """A new folder of PNG files of noise, 20x24 pixels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder
