"""Prompts and images encoded by the pipeline's text encoders and VAE, once each, behind a cache.

The encoders are on the device only while they encode. `clora.data.prepare.encode_data` is the entry; the form in which
a pass of the transformer reads the result is `clora.models.conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clora.data.cache import Cache, Entry, Key, chunked
from clora.data.images import ImageFolder
from clora.devices import move
from clora.hashing import digest, tensor_digest
from clora.models import ModelAdapter
from clora.models.conditioning import Text
from clora.models.fingerprint import component_fingerprints

PROMPTS_AT_ONCE, IMAGES_AT_ONCE = 64, 32  # an interrupted run loses no more than these
OTHER_PARTS = ("transformer", "scheduler")  # no encoding depends on them


class Encoders:
    """A model adapter's encoders.

    Inside the context they move to the device when something is to be encoded that the cache does not have; at its end
    they go back to where they were.

    Args:
        adapter: the model family.
        cache: earlier encodings; an entry for each prompt (with its image, where the family encodes them together) and
            each image.
        device: where they encode; None leaves them where they are.
    """

    def __init__(self, adapter: ModelAdapter, cache: Cache, device: torch.device | None):
        self.adapter = adapter
        self.cache = cache
        self.device = device
        self.components = component_fingerprints(adapter.pipeline)
        parts = {name: hashed for name, hashed in self.components.items() if name not in OTHER_PARTS}
        self._key: Key = {"family": type(adapter).__name__, "encoders": digest(parts)}
        self._homes: dict[str, torch.device] = {}

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *raised: object) -> None:
        for name, home in self._homes.items():
            move(self.adapter.pipeline.components[name], home)
        if self._homes and self.device.type == "cuda":
            # The transformer comes next and is to find one large block instead of the encoders' many small ones.
            torch.cuda.empty_cache()
        self._homes = {}

    def prompts(self, prompts: Sequence[str], pixels: Tensor | None) -> Text:
        """Encoded prompts, with the images that they are about ``[N, 3, H, W]`` where the family encodes them together.

        Raises:
            CloraError: a prompt of too many tokens.
        """
        images = [None] * len(prompts) if pixels is None else pixel_digests(pixels)
        limit = self.adapter.max_sequence_length
        # The image is a part of a prompt's key only where the family encodes them together.
        keys = [
            {**self._key, "max_sequence_length": limit, "prompt": prompt, "image": image}
            for prompt, image in zip(prompts, images, strict=True)
        ]

        def encode(rows: list[int]) -> Iterator[Entry]:
            references = None if pixels is None else [pixels[rows]]
            return _text_entries(self.adapter.encode_prompts([prompts[i] for i in rows], references))

        # An entry is one prompt, [L, D] and so on; `Text.cat` pads them to the longest.
        rows = []
        for entry in self._encode("prompts", keys, encode, lambda i: f"prompt {prompts[i]!r}", PROMPTS_AT_ONCE):
            rows.append(Text(**{name: part[None] for name, part in entry.items()}))
        return Text.cat(rows)

    def sources(self, pixels: Tensor | ImageFolder, folder: str = "the pictures") -> Tensor:
        """Encoded images to edit ``[N, S, C]``; messages name their folder."""
        return self._images("sources", pixels, folder, lambda images: self.adapter.encode_sources([images])[0])

    def results(self, pixels: Tensor | ImageFolder, folder: str = "the pictures") -> Tensor:
        """Encoded results ``[N, T, C]``; messages name their folder."""
        return self._images("results", pixels, folder, self.adapter.encode_images)

    def _images(
        self, kind: str, pixels: Tensor | ImageFolder, folder: str, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        keys = [{**self._key, "image": image} for image in pixel_digests(pixels)]

        def rows(indices: list[int]) -> Iterator[Entry]:
            return ({"latents": row} for row in encode(pixels[indices]))

        def describe(i: int) -> str:
            return f"picture {i + 1} of {folder}"

        return torch.stack([entry["latents"] for entry in self._encode(kind, keys, rows, describe, IMAGES_AT_ONCE)])

    def _encode(
        self,
        kind: str,
        keys: Sequence[Key],
        encode: Callable[[list[int]], Iterator[Entry]],
        describe: Callable[[int], str],
        at_once: int,
    ) -> list[Entry]:
        """Entries of the keys; ``encode(rows)`` yields those of some of them, called for ``at_once`` rows at a time."""

        def make(chunks: list[range]) -> Iterator[Entry]:
            self._bring()
            for chunk in chunks:
                yield from encode(list(chunk))

        return self.cache.entries(kind, keys, chunked(len(keys), at_once), describe, make)

    def _bring(self) -> None:
        """Moves the encoders to the device, unless they are there."""
        if self.device is None or self._homes:
            return
        for name, part in self.adapter.pipeline.components.items():
            if isinstance(part, nn.Module) and name not in OTHER_PARTS:
                self._homes[name] = part.device
                move(part, self.device)


def pixel_digests(pixels: Iterable[Tensor]) -> list[str]:
    """A hash of each image ``[3, H, W]``."""
    return [tensor_digest({"pixels": image}) for image in pixels]


def _text_entries(text: Text) -> Iterator[Entry]:
    """Each prompt's tensors without the padding at its end, which depends on the prompts encoded beside it."""
    positions = torch.arange(1, text.embeds.shape[1] + 1)
    for row in range(len(text)):
        # Up to the last token: in the middle of a prompt masked positions may separate its segments.
        length = len(positions) if text.mask is None else int((positions * text.mask[row]).max())
        parts = {name: part for name, part in vars(text[row]).items() if part is not None}
        yield {name: part if name == "pooled" else part[:length] for name, part in parts.items()}


class Pictures(NamedTuple):
    """A set of images to edit: its name and pixels ``[N, 3, H, W]``, which may stay in their files."""

    name: str
    pixels: Tensor | ImageFolder


class PromptTable:
    """Collects prompts, then encodes each different one once.

    A row is a prompt, or a prompt and the image it is about where the family encodes them together.

    Attributes:
        text_sees_image: `ModelAdapter.text_sees_image`.
        prompts: the prompt of each row.
    """

    def __init__(self, text_sees_image: bool):
        self.prompts: list[str] = []
        self.text_sees_image = text_sees_image
        self._rows: dict[tuple[object, ...], int] = {}
        self._pixels: list[Tensor] = []

    def rows(self, prompt: str, pictures: Pictures, indices: Tensor) -> Tensor:
        """Rows of one prompt about some of the pictures, int64 like ``indices``; new ones are added."""
        rows = []
        for index in indices.tolist():
            key = (prompt, pictures.name, index) if self.text_sees_image else (prompt,)
            if key not in self._rows:
                self._rows[key] = len(self.prompts)
                self.prompts.append(prompt)
                if self.text_sees_image:
                    self._pixels.append(pictures.pixels[index])
            rows.append(self._rows[key])
        return torch.tensor(rows, dtype=torch.int64)

    def encode(self, encoders: Encoders) -> Text:
        """The encoded table. Raises CloraError for a prompt of too many tokens."""
        return encoders.prompts(self.prompts, torch.stack(self._pixels) if self._pixels else None)
