"""All prompts of a distillation, encoded once: one table, whose rows the data refers to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clora.conditioning import Text
from clora.encoders import Encoders


class Pictures(NamedTuple):
    """A set of images to edit: its name and pixels ``[N, 3, H, W]``."""

    name: str
    pixels: Tensor


class PromptTable:
    """Collects prompts, then encodes each different one once.

    A row is a prompt, or a prompt and the image it is about where the family encodes them together.
    """

    def __init__(self, text_sees_image: bool):
        self._sees = text_sees_image
        self._rows: dict[tuple[object, ...], int] = {}
        self._prompts: list[str] = []
        self._pixels: list[Tensor] = []

    def rows(self, prompt: str, pictures: Pictures, indices: Tensor) -> Tensor:
        """Rows of one prompt about some of the pictures, int64 as ``indices``."""
        return torch.tensor([self._row(prompt, pictures, index) for index in indices.tolist()], dtype=torch.int64)

    def _row(self, prompt: str, pictures: Pictures, index: int) -> int:
        key = (prompt, pictures.name, index) if self._sees else (prompt,)
        if key not in self._rows:
            self._rows[key] = len(self._prompts)
            self._prompts.append(prompt)
            if self._sees:
                self._pixels.append(pictures.pixels[index])
        return self._rows[key]

    def prompt(self, row: int) -> str:
        """The prompt of a row."""
        return self._prompts[row]

    def encode(self, encoders: Encoders) -> Text:
        """The table. Raises CloraError for a prompt of too many tokens."""
        return encoders.prompts(self._prompts, torch.stack(self._pixels) if self._pixels else None)
