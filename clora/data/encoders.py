"""Prompts and images encoded by the pipeline's text encoders and VAE, once each, behind a cache.

The encoders are on the device only while they encode. `clora.data.prepare.encode_data` is the entry; the form in which
a pass of the transformer reads the result is `clora.models.conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clora.data.cache import Cache, Entries, Entry, Key, chunked
from clora.data.images import ImageFolder
from clora.data.tables import LatentTable, TextTable
from clora.devices import move
from clora.errors import CloraError
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

    def prompts(self, prompts: Sequence[str], images: Sequence[Picture] | None) -> TextTable:
        """Encoded prompts, with the images that they are about where the family encodes them together.

        Raises:
            CloraError: a prompt of too many tokens.
        """
        limit = self.adapter.max_sequence_length

        def key(i: int, image: str | None) -> Key:
            # The image is a part of a prompt's key only where the family encodes them together.
            return {**self._key, "max_sequence_length": limit, "prompt": prompts[i], "image": image}

        def encode(rows: range, pixels: Tensor | None) -> Iterator[Entry]:
            references = None if pixels is None else [pixels]
            return _text_entries(self.adapter.encode_prompts([prompts[i] for i in rows], references))

        rows = range(len(prompts))
        # An entry is one prompt, [L, D] and so on; the table pads them to the longest.
        return TextTable(self._encode("prompts", rows, images, key, encode, lambda i: f"prompt {prompts[i]!r}"))

    def sources(self, pictures: Pictures, folder: str = "the pictures") -> LatentTable:
        """Encoded images to edit ``[N, S, C]``; messages name their folder."""
        return self._images("sources", pictures, folder, lambda images: self.adapter.encode_sources([images])[0])

    def results(self, pictures: Pictures, folder: str = "the pictures") -> LatentTable:
        """Encoded results ``[N, T, C]``; messages name their folder."""
        return self._images("results", pictures, folder, self.adapter.encode_images)

    def _images(self, kind: str, pictures: Pictures, folder: str, encode: Callable[[Tensor], Tensor]) -> LatentTable:
        def key(i: int, image: str | None) -> Key:
            return {**self._key, "image": image}

        def entries(rows: range, pixels: Tensor | None) -> Iterator[Entry]:
            return ({"latents": row} for row in encode(pixels))

        def describe(i: int) -> str:
            return f"picture {i + 1} of {folder}"

        rows = range(len(pictures.pixels))
        images = [Picture(pictures, i) for i in rows]
        return LatentTable([self._encode(kind, rows, images, key, entries, describe)])

    def _encode(
        self,
        kind: str,
        rows: range,
        images: Sequence[Picture] | None,
        key: Callable[[int, str | None], Key],
        encode: Callable[[range, Tensor | None], Iterator[Entry]],
        describe: Callable[[int], str],
    ) -> Entries:
        """Entries of all rows, a chunk at a time; only the images of one chunk are in memory.

        Args:
            kind: of the entries.
            rows: the numbers of the rows.
            images: the image of each row, None where there are none.
            key: of a row and the hash of its image.
            encode: yields the entries of a chunk, of which it gets the pixels ``[N, 3, H, W]``.
            describe: names a row, for messages.
        """
        entries = self.cache.entries(kind)
        for chunk in chunked(len(rows), PROMPTS_AT_ONCE if kind == "prompts" else IMAGES_AT_ONCE):
            shown = None if images is None else Decoded([images[i] for i in chunk])
            digests = [None] * len(chunk) if shown is None else shown.digests()

            def make(chunks: list[range], chunk: range = chunk, shown: Decoded | None = shown) -> Iterator[Entry]:
                self._bring()
                return encode(chunk, None if shown is None else shown.pixels())

            entries.extend(
                [key(i, image) for i, image in zip(chunk, digests, strict=True)],
                [range(len(chunk))],
                lambda i, chunk=chunk: describe(chunk[i]),
                make,
            )
        return entries

    def _bring(self) -> None:
        """Moves the encoders to the device, unless they are there."""
        if self.device is None or self._homes:
            return
        for name, part in self.adapter.pipeline.components.items():
            if isinstance(part, nn.Module) and name not in OTHER_PARTS:
                self._homes[name] = part.device
                move(part, self.device)


def _text_entries(text: Text) -> Iterator[Entry]:
    """Each prompt's tensors without the padding at its end, which depends on the prompts encoded beside it."""
    positions = torch.arange(1, text.embeds.shape[1] + 1)
    for row in range(len(text)):
        # Up to the last token: in the middle of a prompt masked positions may separate its segments.
        length = len(positions) if text.mask is None else int((positions * text.mask[row]).max())
        parts = {name: part for name, part in vars(text[row]).items() if part is not None}
        yield {name: part if name == "pooled" else part[:length] for name, part in parts.items()}


@dataclass(frozen=True)
class Pictures:
    """A set of images to edit or to learn.

    Attributes:
        name: of the set.
        pixels: ``[N, 3, H, W]``; they may stay in their files.
        digests: hash of each image that was decoded so far (`Decoded`), by its position.
    """

    name: str
    pixels: Tensor | ImageFolder
    digests: dict[int, str] = field(default_factory=dict)


class Picture(NamedTuple):
    """An image of a set."""

    pictures: Pictures
    position: int


class Decoded:
    """Images of one chunk, each decoded when it is first needed, and once."""

    def __init__(self, images: Sequence[Picture]):
        self._images = images
        self._pixels: dict[tuple[str, int], Tensor] = {}

    def digests(self) -> list[str]:
        """A hash of each image's pixels; those that are known need no decoding."""
        for image in self._images:
            if image.position not in image.pictures.digests:
                self._decode(image)
        return [image.pictures.digests[image.position] for image in self._images]

    def pixels(self) -> Tensor:
        """All of them, ``[N, 3, H, W]``."""
        return torch.stack([self._decode(image) for image in self._images])

    def _decode(self, image: Picture) -> Tensor:
        pictures, position = image
        key = pictures.name, position
        if key not in self._pixels:
            self._pixels[key] = pictures.pixels[position]
            found = tensor_digest({"pixels": self._pixels[key]})
            # An entry of other pixels under the known hash would be believed by every later run.
            if pictures.digests.setdefault(position, found) != found:
                raise CloraError(
                    f"picture {position + 1} of {pictures.name or 'data.sources'} has changed while pictures were read; start "
                    "the same command again"
                )
        return self._pixels[key]


class PromptTable:
    """Collects prompts, then encodes each different one once.

    A row is a prompt, or a prompt and the image it is about where the family encodes them together.

    Attributes:
        text_sees_image: `ModelAdapter.text_sees_image`.
        prompts: the prompt of each row.
        images: the image of each row, where prompts are encoded together with it.
    """

    def __init__(self, text_sees_image: bool):
        self.prompts: list[str] = []
        self.images: list[Picture] = []
        self.text_sees_image = text_sees_image
        self._rows: dict[tuple[object, ...], int] = {}

    def rows(self, prompt: str, pictures: Pictures, indices: Tensor) -> Tensor:
        """Rows of one prompt about some of the pictures, int64 like ``indices``; new ones are added."""
        rows = []
        for index in indices.tolist():
            key = (prompt, pictures.name, index) if self.text_sees_image else (prompt,)
            if key not in self._rows:
                self._rows[key] = len(self.prompts)
                self.prompts.append(prompt)
                self.images.append(Picture(pictures, index))
            rows.append(self._rows[key])
        return torch.tensor(rows, dtype=torch.int64)

    def encode(self, encoders: Encoders) -> TextTable:
        """The encoded table. Raises CloraError for a prompt of too many tokens."""
        return encoders.prompts(self.prompts, self.images if self.text_sees_image else None)
