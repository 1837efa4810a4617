"""Image files to tensors and back; whatever is wrong with a file is an error before training starts."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clora.errors import CloraError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "PPM")
"""Formats that are read, as Pillow names them. Of the others EPS would start Ghostscript, whatever the file is called."""
_IGNORED = frozenset({"thumbs.db", "desktop.ini"})


class ImageFolder:
    """The images of a folder, read from their files whenever they are asked for; see `load_images`.

    Args:
        folder: as in `load_images`.
        size: height and width.
        chosen: which of them, in the order of `list_images`.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], chosen: slice = slice(None)):
        self._files = list_images(folder)[chosen]
        self._size = size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Tensor:
        """Reads one image ``[3, H, W]``."""
        return load_image(self._files[i], self._size)


def load_images(folder: str | Path, size: tuple[int, int], limit: int | None = None) -> Tensor:
    """Reads the images of a folder, cropped around their centre to the wanted shape and resized.

    Args:
        folder: a folder of images and nothing else; hidden files and subfolders are passed over.
        size: height and width.
        limit: at most this number, the first by name; None for all.

    Returns:
        fp32 images ``[N, 3, H, W]`` in [-1, 1], in the order of `list_images`.

    Raises:
        CloraError: a missing or empty folder, or a file that is empty, damaged, enormous or no image.
    """
    return torch.stack([load_image(file, size) for file in list_images(folder)[:limit]])


def list_images(folder: str | Path) -> list[Path]:
    """The files of an image folder in order of their names. Raises CloraError where there are none."""
    folder = Path(folder)
    try:
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise CloraError(f"{folder}: expected a folder of images, found {found}")
        # By stem first, so that a.png and a.jpg come at the same place of two folders.
        entries = sorted(folder.iterdir(), key=lambda entry: (entry.stem, entry.suffix))
    except OSError as error:
        raise CloraError(f"{folder} cannot be read: {error}") from error
    files = [e for e in entries if e.is_file() and not e.name.startswith(".") and e.name.lower() not in _IGNORED]
    if not files:
        raise CloraError(f"{folder} holds no images; put at least one PNG, JPEG or WebP file in it")
    return files


def load_image(file: str | Path, size: tuple[int, int]) -> Tensor:
    """One image as fp32 ``[3, H, W]`` in [-1, 1]; see `load_images`."""
    # From uint8 [H, W, 3] to [3, H, W], 0 and 255 to -1 and 1.
    pixels = torch.from_numpy(np.array(fit(read_image(file), size).image)).permute(2, 0, 1)
    return pixels.float().div(127.5).sub(1).contiguous()


def read_image(file: str | Path) -> Image.Image:
    """Reads an image in its own size: upright, RGB of 8 bits, on white where it is transparent.

    Raises:
        CloraError: as for `load_images`.
    """
    with _opened(Path(file)) as opened:
        return _to_rgb(ImageOps.exif_transpose(opened))  # upright, whatever way the camera was held


class Fitted(NamedTuple):
    """An image that was cropped and scaled.

    Attributes:
        image: the result.
        change: what was done, in pixels of width x height: "cropped 1200x800 to 800x800, scaled to 64x64"; empty if nothing.
    """

    image: Image.Image
    change: str


def fit(image: Image.Image, size: tuple[int, int]) -> Fitted:
    """Crops an image around its centre to the proportion of ``size`` (height, width), and scales it to that size."""
    height, width = size
    # Cropped first: resizing out of a box (ImageOps.fit) mixes in pixels from beyond the crop.
    cropped = _crop(image, width / height)
    fitted = cropped.resize((width, height), Image.Resampling.LANCZOS)
    before, between, after = (f"{found.width}x{found.height}" for found in (image, cropped, fitted))
    done = [f"cropped {before} to {between}"] if between != before else []
    if after != between:
        done.append(f"scaled to {after}" if done else f"scaled {before} to {after}")
    return Fitted(fitted, ", ".join(done))


def check_image(file: Path) -> None:
    """Reads only an image's header. Raises CloraError where it is not an image, empty, or enormous."""
    with _opened(file):
        pass


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 pixels ``[H, W, 3]``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@cache
def _readable() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads; AVIF came late."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Yields an image file, its header checked and nothing decoded yet; names the file in every error raised inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's limit is above `MAX_PIXELS`
            with Image.open(file, formats=_readable()) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    found = f"{width} x {height} = {width * height / 1e6:.0f} megapixels"
                    raise Image.DecompressionBombError(found)
                yield opened
    except UnidentifiedImageError as error:
        found = "is empty (0 bytes)" if file.stat().st_size == 0 else "is not an image that can be read"
        raise CloraError(f"{file} {found}; expected one of {', '.join(FORMATS)}. Remove or replace it") from error
    except Image.DecompressionBombError as error:
        most = f"at most {MAX_PIXELS // 10**6} megapixels"
        raise CloraError(f"{file} is enormous: {error}; expected {most}. Scale it down") from error
    except Exception as error:
        # Decoders of damaged files raise whatever they run into: errors of struct, of zlib, of values.
        raise CloraError(f"{file} is a damaged image ({error}). Remove or replace it") from error


def _crop(image: Image.Image, aspect: float) -> Image.Image:
    """The largest centred part of an image with `aspect` = width / height."""
    width = min(image.width, max(1, round(image.height * aspect)))
    height = min(image.height, max(1, round(image.width / aspect)))
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, on white where the image is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of 16-bit colours, which Pillow has cut to their high bytes
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits or of floats in 8 bits, with its transparency."""
    # Pillow's own conversion clips at 255, and forgets which grey of a PNG stands for transparent.
    values, clear = np.asarray(image), image.info.get("transparency")
    if not np.isfinite(values).all():
        raise ValueError("its values are not all finite")
    most = values.max()
    if most > 65535:
        raise ValueError(f"its values go up to {most:.6g}, expected at most 65535")
    # TIFF has floats up to 1, which resizing may have passed a little, as well as up to 255; integers have 16 bits.
    white = 65535 if image.mode != "F" or most > 256 else 255 if most > 2 else 1
    grey = Image.fromarray((values.astype(np.float32) * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
