"""The studio's photographs: the table of a folder and its pictures by split.

A folder has a ``photographs.csv`` with one row for each picture, and the pictures. No photograph is in two splits, and a
cut-out is in the split of the photograph that it was cut from.
"""

from __future__ import annotations

import csv
import io
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from clora.errors import CloraError, nearest
from clora.files import read_text
from clora.hashing import file_digest

PHOTOGRAPHS = Path(__file__).parent / "assets" / "photographs"  # the shipped folder
TABLE = "photographs.csv"
KINDS = ("background", "cutout")
SPLITS = ("train", "validation", "held_out")
LICENCE = re.compile(r"PD|CC0-1\.0|CC-BY(-SA)?(-\d\.\d(-[A-Z]{2})?)?")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        file: the picture, relative to the folder.
        kind: ``background`` or ``cutout``.
        noun: what a sentence calls a cut-out; empty for a background.
        split: ``train``, ``validation`` or ``held_out``.
        licence: ``PD`` (public domain), ``CC0-1.0``, or a ``CC-BY`` or ``CC-BY-SA`` with its version where that is known.
        author: who made it; empty where that is not known and the licence does not ask for it.
        source: where the original is.
        package: the package that it was taken from; empty where it is from no package.
        path: the file in that package.
        changes: what was done to the original.
    """

    file: str
    kind: str
    noun: str
    split: str
    licence: str
    author: str
    source: str
    package: str = ""
    path: str = ""
    changes: str = ""


class Cutout(NamedTuple):
    """An object: what a sentence calls it, and the picture, uint8 ``[H, W, 4]`` with its opacity last."""

    noun: str
    image: np.ndarray


class Photographs:
    """A folder whose table has been checked. Pictures are read when their split is first asked for."""

    def __init__(self, folder: Path, rows: tuple[Row, ...]):
        self.folder = folder
        self.rows = rows
        self._backgrounds: dict[str, list[np.ndarray]] = {}
        self._cutouts: dict[str, list[Cutout]] = {}

    def digest(self) -> str:
        """Returns the hash of the table, by which a run knows its pictures."""
        return file_digest(self.folder / TABLE)

    def backgrounds(self, split: str) -> list[np.ndarray]:
        """Returns the photographs of a split, in the table's order: uint8 ``[H, W, 3]``, not writable.

        Raises:
            CloraError: unknown split, or a picture that cannot be read.
        """
        if split not in self._backgrounds:
            rows = self._rows_of(split, "background")
            self._backgrounds[split] = [_read_picture(self.folder / row.file, "RGB") for row in rows]
        return self._backgrounds[split]

    def cutouts(self, split: str) -> list[Cutout]:
        """Returns the cut-outs of a split, in the table's order; the pictures are not writable.

        Raises:
            CloraError: unknown split, or a picture that cannot be read.
        """
        if split not in self._cutouts:
            rows = self._rows_of(split, "cutout")
            self._cutouts[split] = [Cutout(row.noun, _read_picture(self.folder / row.file, "RGBA")) for row in rows]
        return self._cutouts[split]

    def background(self, split: str, name: str) -> np.ndarray:
        """Returns the photograph of a split whose file has this name, such as ``kingfisher``.

        Raises:
            CloraError: there is none, or it cannot be read.
        """
        names = [Path(row.file).stem for row in self._rows_of(split, "background")]
        if name not in names:
            raise CloraError(f"{self.folder / TABLE}: expected a background {name!r} of the split {split}, found none")
        return self.backgrounds(split)[names.index(name)]

    def _rows_of(self, split: str, kind: str) -> list[Row]:
        if split not in SPLITS:
            raise CloraError(f"unknown split {split!r}; the splits are {list(SPLITS)}{nearest(split, SPLITS)}")
        return [row for row in self.rows if (row.split, row.kind) == (split, kind)]


def load_photographs(folder: Path = PHOTOGRAPHS) -> Photographs:
    """Reads and checks a folder of photographs; a second call with the same folder returns the same object.

    Raises:
        CloraError: the table or a picture is missing or cannot be read, or the table has an unknown column, kind, split or
            licence, a cut-out without noun, a photograph in two splits, or no backgrounds or no cut-outs to train on.
    """
    return _load(Path(folder).resolve())


@lru_cache(maxsize=4)
def _load(folder: Path) -> Photographs:
    rows = read_table(folder / TABLE)
    for row in rows:
        _check_picture(folder / row.file, row.kind)
    return Photographs(folder, rows)


def read_table(path: Path) -> tuple[Row, ...]:
    """Reads and checks a table of photographs.

    Raises:
        CloraError: as of :func:`load_photographs`, without looking at the pictures.
    """
    text = read_text(path, "a table of photographs, as python -m clora.studio.making.photographs writes it")
    try:
        reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
        columns = list(reader.fieldnames or [])
        _check_columns(columns, path)
        lines = list(reader)
    except csv.Error as error:
        raise CloraError(f"{path} cannot be read as CSV ({error}); mend it or make the folder anew") from error
    rows = []
    for number, values in enumerate(lines, start=1):
        if None in values or None in values.values():
            raise CloraError(f"{path}, picture {number}: expected {len(columns)} values, as the first line has")
        rows.append(Row(**values))
        _check_row(rows[-1], f"{path}, picture {number} ({rows[-1].file!r})")
    _check_rows(rows, path)
    return tuple(rows)


def _check_columns(columns: list[str], path: Path) -> None:
    for name in columns:
        if name not in Row._fields:
            raise CloraError(
                f"{path}: unknown column {name!r}; the columns are {list(Row._fields)}{nearest(name, Row._fields)}"
            )
        if columns.count(name) > 1:
            raise CloraError(f"{path}: the column {name!r} is there twice; remove one of them")
    required = [name for name in Row._fields if name not in Row._field_defaults]
    missing = [name for name in required if name not in columns]
    if missing:
        raise CloraError(f"{path}: expected the columns {required}, found none named {missing}")


def _check_row(row: Row, where: str) -> None:
    file = PurePosixPath(row.file)
    if not row.file or file.is_absolute() or ".." in file.parts:
        raise CloraError(f"{where}: expected a file in the table's folder")
    for name, allowed in (("kind", KINDS), ("split", SPLITS)):
        value = getattr(row, name)
        if value not in allowed:
            raise CloraError(f"{where}: expected {name} to be one of {list(allowed)}, found {value!r}")
    if not LICENCE.fullmatch(row.licence):
        raise CloraError(
            f"{where}: expected a licence such as PD, CC0-1.0, CC-BY-4.0 or CC-BY-SA-4.0, found {row.licence!r}; "
            "leave pictures under other licences out"
        )
    if row.licence.startswith("CC-BY") and not row.author:
        raise CloraError(f"{where}: {row.licence} asks for the author's name, found none")
    if (row.kind == "cutout") != bool(row.noun) or row.noun != row.noun.lower().strip():
        raise CloraError(f"{where}: expected a noun in lower case for a cut-out and none for a background")


def _check_rows(rows: list[Row], path: Path) -> None:
    files: set[str] = set()
    split_of: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.file in files:
            raise CloraError(f"{path}: {row.file!r} is listed twice; remove one of the rows")
        files.add(row.file)
        if row.path and split_of.setdefault((row.package, row.path), row.split) != row.split:
            raise CloraError(f"{path}: the photograph {row.path!r} is in two splits; give its rows the same one")
    for kind in KINDS:
        if not any((row.kind, row.split) == (kind, "train") for row in rows):
            raise CloraError(f"{path}: expected pictures of the kind {kind!r} in the split 'train', found none")


def _check_picture(path: Path, kind: str) -> None:
    """Reads the picture's header only."""
    try:
        with Image.open(path) as image:
            transparent = image.has_transparency_data
    except (OSError, Image.DecompressionBombError) as error:
        raise CloraError(
            f"expected a picture in {path}, which cannot be read ({error}); make the folder anew"
        ) from error
    if kind == "cutout" and not transparent:
        raise CloraError(f"{path}: expected a cut-out with an alpha channel, found none; save it as RGBA")


def _read_picture(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CloraError(
            f"expected a picture in {path}, which cannot be read ({error}); make the folder anew"
        ) from error
    pixels.flags.writeable = False
    return pixels
