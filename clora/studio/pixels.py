"""Conversions between the studio's images, the autoencoder's tensors and bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_tensor(images: np.ndarray) -> Tensor:
    """``[N, H, W, 3]`` in [0, 1] to ``[N, 3, H, W]`` float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() * 2 - 1


def to_images(tensor: Tensor) -> np.ndarray:
    """``[N, 3, H, W]`` in [-1, 1] to ``[N, H, W, 3]`` float32 in [0, 1]."""
    return (tensor.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
