"""The previews that a run keeps: where their pictures lie, and how near each effect's came to its teacher's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from clora.errors import CloraError

PREVIEWS = "previews"
"""Folder of the pictures, in that of the run."""
INDEX = "index.json"


class Preview(NamedTuple):
    """One drawing of all effects: the update that it was drawn after, and each effect's PSNR in dB against its target."""

    update: int
    psnr: Mapping[str, float]


def picture_file(number: int, effect: str, name: str | int) -> str:
    """Returns the path of an effect's picture in the folder of previews: ``source``, ``target``, or that of an update."""
    # Names come out of files that anyone may have made. Numbers keep the order, and apart what becomes the same.
    safe = re.sub(r"[^\w-]+", "_", effect)[:60]
    stem = name if isinstance(name, str) else f"{name:07d}"
    return f"{number:03d}_{safe}/{stem}.webp"


def read_previews(folder: Path) -> list[Preview]:
    """Reads the index of a folder of previews, in the order of the updates; none where there is no index.

    Raises:
        CloraError: it is not such an index.
    """
    file = folder / INDEX
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text("utf-8"))
        return [
            Preview(int(entry["update"]), {str(name): float(psnr) for name, psnr in entry["psnr"].items()})
            for entry in found
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CloraError(f"{file}: expected an index of previews ({error}); remove the folder {folder}") from error
