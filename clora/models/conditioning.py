"""The inputs of a pass of the transformer beside the noisy latents: encoded prompts and the images to edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clora.devices import send, take

Shapes = tuple[tuple[int, int], ...]
"""Height and width in tokens of each reference image, then of anything else that a family reads of them."""


@dataclass(frozen=True)
class Text:
    """Encoded prompts; rows are prompts.

    Attributes:
        embeds: ``[B, L, D]``.
        mask: ``[B, L]`` bool, false at padding and, in families that encode a prompt in segments, once after each
            segment; None where every token counts. Always on the CPU, where lengths are read from it.
        pooled: ``[B, P]`` embedding of the whole prompt, for the families that have one.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Tensor | slice | int) -> Text:
        """Returns some prompts; ``rows`` as in `clora.devices.take`."""
        return Text(*(None if part is None else take(part, rows) for part in (self.embeds, self.mask, self.pooled)))

    def to(self, device: torch.device) -> Text:
        """Returns the same prompts on a device; the mask stays on the CPU."""
        return Text(send(self.embeds, device), self.mask, None if self.pooled is None else send(self.pooled, device))

    def padded(self, length: int, masked: bool) -> Text:
        """Returns the same prompts, padded with zeros to a length; with a mask, or with none where every token counts."""
        padding = length - self.embeds.shape[1]
        embeds = functional.pad(self.embeds, (0, 0, 0, padding)) if padding else self.embeds
        if not masked:
            return Text(embeds, None, self.pooled)
        mask = torch.ones(self.embeds.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        return Text(embeds, functional.pad(mask, (0, padding)), self.pooled)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Joins all rows; shorter ones are padded with masked zeros."""
        length = max(part.embeds.shape[1] for part in parts)
        # Prompts that all have one length and no mask stay without: attention then needs none.
        masked = any(part.mask is not None or part.embeds.shape[1] < length for part in parts)
        parts = [part.padded(length, masked) for part in parts]
        mask = torch.cat([part.mask for part in parts]) if masked else None
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return Text(torch.cat([part.embeds for part in parts]), mask, pooled)


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a batch; rows are samples.

    Attributes:
        text: the prompts, ``B`` rows.
        source: ``[B, S, C]`` packed latents of the images to edit, one after the other; anything else that the family
            reads of these images follows, in rows of the same width.
        shapes: the sizes in tokens of all these parts, the same for all rows; None for one image of the adapter's own
            size.
    """

    text: Text
    source: Tensor
    shapes: Shapes | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: Tensor | slice | int) -> Conditioning:
        """Returns some samples; ``rows`` as in `clora.devices.take`."""
        return Conditioning(self.text[rows], take(self.source, rows), self.shapes)

    def to(self, device: torch.device) -> Conditioning:
        """Returns the same on a device."""
        return Conditioning(self.text.to(device), send(self.source, device), self.shapes)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins all rows. Raises ValueError where images differ in size."""
        if any(part.shapes != parts[0].shapes for part in parts):
            raise ValueError(f"expected images of one size, found {[part.shapes for part in parts]}")
        text = Text.cat([part.text for part in parts])
        return Conditioning(text, torch.cat([part.source for part in parts]), parts[0].shapes)
