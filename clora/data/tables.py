"""Tables of encoded pictures and prompts, whose rows stay in the cache's files and are read when a batch asks for them.

They are indexed like the tensors that they stand for, so that batches are drawn from either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clora.data.cache import Entries
from clora.models.conditioning import Text


class LatentTable:
    """Latents ``[*N, T, C]``.

    Args:
        parts: the entries with the latents.
        index: ``[*N, 2]`` int64, of each row the number of its part and its position there; None for the rows of a single
            part, in order.
    """

    def __init__(self, parts: Sequence[Entries], index: Tensor | None = None):
        if index is None:
            positions = torch.arange(len(parts[0]))
            index = torch.stack([torch.zeros_like(positions), positions], dim=1)
        self.parts = tuple(parts)
        self.index = index

    @property
    def shape(self) -> torch.Size:
        """The shape ``[*N, T, C]`` of all latents, one row or more."""
        part, position = self.index.flatten(0, -2)[0].tolist()
        ((_, _, latent),) = self.parts[part].layout(position)
        return torch.Size((*self.index.shape[:-1], *latent))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> Tensor:
        """Reads the latents ``[*M, T, C]`` of some rows, chosen as in a tensor ``[*N]``. Raises CloraError as `Entries`."""
        chosen = self.index[rows]
        latents = [self.parts[part][position]["latents"] for part, position in chosen.reshape(-1, 2).tolist()]
        return torch.stack(latents).view(*chosen.shape[:-1], *latents[0].shape)

    def flatten(self, start: int, end: int) -> LatentTable:
        """Returns the same rows with these leading dimensions joined."""
        return LatentTable(self.parts, self.index.flatten(start, end))


Latents = Tensor | LatentTable


def select(latents: Latents, rows: Tensor | Sequence[int] | slice) -> Latents:
    """Returns some rows of a table as a table, of which none is read, or of a tensor as a tensor."""
    if isinstance(latents, Tensor):
        return latents[rows]
    return LatentTable(latents.parts, latents.index[rows])


def stack(latents: Sequence[Latents]) -> Latents:
    """Stacks tables, of which no row is read, along a new first dimension; or tensors, beside which tables are read."""
    tables = [each for each in latents if isinstance(each, LatentTable)]
    if len(tables) < len(latents):
        return torch.stack([each[:] for each in latents])
    parts: list[Entries] = []
    index = []
    for table in tables:
        index.append(table.index + torch.tensor([len(parts), 0]))
        parts += table.parts
    return LatentTable(parts, torch.stack(index))


class TextTable:
    """Encoded prompts as `Text`: all are padded to the longest, and have masks if some need one.

    Args:
        entries: each with the tensors of one prompt (`Text`) without padding.
    """

    def __init__(self, entries: Entries):
        shapes = [{part: shape for part, _, shape in entries.layout(i)} for i in range(len(entries))]
        lengths = {shape["embeds"][0] for shape in shapes}
        self._entries = entries
        self._length = max(lengths)
        self._masked = len(lengths) > 1 or any("mask" in shape for shape in shapes)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, rows: Tensor | slice) -> Text:
        """Reads some prompts. Raises CloraError as `Entries`."""
        positions = torch.arange(len(self))[rows].tolist()
        # Many rows of a batch share one prompt.
        read = {i: self._read(i) for i in dict.fromkeys(positions)}
        return Text.cat([read[i] for i in positions])

    def _read(self, i: int) -> Text:
        prompt = Text(**{part: tensor[None] for part, tensor in self._entries[i].items()})
        return prompt.padded(self._length, self._masked)
