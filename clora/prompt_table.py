"""All prompts of a distillation, encoded once: one table, whose rows the data refers to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clora.conditioning import Text
from clora.models import ModelAdapter


class Pictures(NamedTuple):
    """A set of images to edit: its name, pixels ``[N, 3, H, W]`` and encoded sources ``[N, S, C]``."""

    name: str
    pixels: Tensor
    latents: Tensor


class PromptTable:
    """Collects prompts, then encodes each different one once.

    A row is a prompt, or a prompt and the image it is about where the family encodes them together.
    """

    def __init__(self, adapter: ModelAdapter):
        self._adapter = adapter
        self._rows: dict[tuple[object, ...], int] = {}
        self._prompts: list[str] = []
        self._pixels: list[Tensor] = []

    def rows(self, prompt: str, pictures: Pictures, indices: Tensor) -> Tensor:
        """Rows of one prompt about some of the pictures, int64 as ``indices``."""
        return torch.tensor([self._row(prompt, pictures, index) for index in indices.tolist()], dtype=torch.int64)

    def _row(self, prompt: str, pictures: Pictures, index: int) -> int:
        sees = self._adapter.text_sees_image
        key = (prompt, pictures.name, index) if sees else (prompt,)
        if key not in self._rows:
            self._rows[key] = len(self._prompts)
            self._prompts.append(prompt)
            if sees:
                self._pixels.append(pictures.pixels[index])
        return self._rows[key]

    def encode(self) -> Text:
        """The table. Raises CloraError for a prompt of too many tokens."""
        return self._adapter.encode_prompts(self._prompts, [torch.stack(self._pixels)] if self._pixels else None)
