"""Pictures of a report: the labelled grid and the sheet of one picture's edits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL = 192  # pixels that a small picture is enlarged to
_GAP = 6
_FONT_SIZE = 17
_SHEET_CELL = 256
_SHEET_MOST = 384  # pixels that a large picture is scaled down to
_SMALLEST_FONT = 12


def draw_grid(columns: Sequence[str], rows: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Lays pictures out with a label over each column and before each row.

    Args:
        columns: C labels, broken into lines where they are wide.
        rows: R labels.
        pixels: uint8 ``[R, C, H, W, 3]``.

    Returns:
        uint8 ``[H', W', 3]``.
    """
    factor = max(1, _CELL // max(pixels.shape[2:4]))
    height, width = (factor * side for side in pixels.shape[2:4])
    font = ImageFont.load_default(_FONT_SIZE)
    titles = [_wrap(label, font, width) for label in columns]
    names = [_wrap(label.replace("_", " "), font, 150) for label in rows]
    top = (max(title.count("\n") for title in titles) + 1) * (_FONT_SIZE + 5) + 2 * _GAP
    left = 2 * _GAP + round(max(map(font.getlength, "\n".join(names).split("\n"))))
    size = (left + len(columns) * (width + _GAP), top + len(rows) * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        # Titles end at one height above their columns, whatever their number of lines.
        centre = left + c * (width + _GAP) + width // 2
        draw.multiline_text((centre, top - _GAP), title, "black", font, anchor="md", align="center")
    for r, name in enumerate(names):
        y = top + r * (height + _GAP)
        draw.multiline_text((left - _GAP, y + height // 2), name, "black", font, anchor="rm", align="right")
        for c in range(len(columns)):
            canvas.paste(_enlarged(Image.fromarray(pixels[r, c]), factor), (left + c * (width + _GAP), y))
    return np.asarray(canvas)


def draw_sheet(labels: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Lays pictures out in three or four columns, each above its label, so that a phone shows them legibly.

    Args:
        labels: N labels, broken into lines where they are wide.
        pixels: uint8 ``[N, H, W, 3]``.

    Returns:
        uint8 ``[H', W', 3]``.
    """
    cells = [_sheet_cell(Image.fromarray(picture)) for picture in pixels]
    width, height = cells[0].size
    columns = min(len(cells), 3 if len(cells) <= 12 else 4)
    font_size = max(_SMALLEST_FONT, width // 9)  # in proportion to the pictures: the whole sheet is scaled to a screen
    font = ImageFont.load_default(font_size)
    names = [_wrap(label.replace("_", " "), font, width) for label in labels]
    gap = font_size // 2
    line = font_size * 5 // 4
    below = (max(name.count("\n") for name in names) + 1) * line + gap
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + below)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (cell, name) in enumerate(zip(cells, names, strict=True)):
        x = gap + i % columns * (width + gap)
        y = gap + i // columns * (height + below)
        canvas.paste(cell, (x, y))
        draw.multiline_text((x + width // 2, y + height), name, "black", font, "ma", line - font_size, "center")
    return np.asarray(canvas)


def _sheet_cell(picture: Image.Image) -> Image.Image:
    """Enlarges a small picture by a whole number; scales a large one down."""
    longest = max(picture.size)
    if longest > _SHEET_MOST:
        picture.thumbnail((_SHEET_MOST, _SHEET_MOST), Image.Resampling.LANCZOS)
        return picture
    return _enlarged(picture, max(1, _SHEET_CELL // longest))


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    """Enlarges smoothly: of a photograph nobody wants to see the squares."""
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Breaks a label into lines of at most `width` pixels, between words, and within a word that is wider."""
    lines: list[str] = []
    for word in label.split():
        longer = " ".join([*lines[-1:], word])
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += _pieces(word, font, width)
    return "\n".join(lines)


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Cuts a word into pieces of at most `width` pixels, or of one letter."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
