"""``clora studio check``: a built studio on held-out pictures, against its floors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from clora.errors import CloraError
from clora.progress import say
from clora.studio import quality
from clora.studio.assets import ASSETS, load_studio
from clora.studio.edits import tones
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import held_out_sources
from clora.studio.precision import ReducedAdapter
from clora.studio.ranking import measure_judges
from clora.studio.scenes import SIZE, SIZES
from clora.studio.teacher_files import load_teachers
from clora.studio.teachers import TEACHERS

JUDGED = 4
"""Held-out pictures on which the judges are measured with every effect."""
FLOORS = {
    "vae_psnr_64": 30.0,
    "vae_psnr_128": 33.0,
    "judge_auroc": 0.99,
    "second_opinion_auroc": 0.99,
    **{f"base_colour_psnr_{size}": 28.0 for size in SIZES},
    **{f"base_spatial_psnr_{size}": 22.0 for size in SIZES},
    **{f"base_general_accuracy_{size}": 0.92 for size in SIZES},
}


class Row(NamedTuple):
    """A measured number and the least that it should be."""

    name: str
    value: float
    floor: float

    @property
    def is_low(self) -> bool:
        return not self.value >= self.floor  # also a value that is not a number


def check(folder: Path | None = None, device: str = "auto") -> None:
    """Measures a built studio (default: the one that ships) on held-out pictures and shows it against its floors.

    Raises:
        CloraError: a measured number is below its floor, or unknown device.
    """
    folder = folder or ASSETS
    adapter = load_studio(folder, device)
    loras = load_teachers(adapter, folder, TEACHERS)
    vae = adapter.pipeline.vae
    ranked, lines = measure_judges(
        held_out_sources(JUDGED, SIZE), EFFECTS, lambda images: quality.round_trip(vae, images), device
    )
    measured = quality.vae_quality(vae) | ranked
    for size in SIZES:
        found = quality.base_quality(ReducedAdapter(adapter.pipeline, size))
        measured |= base_numbers(found, size)
    teachers = quality.teacher_quality(ReducedAdapter(adapter.pipeline), loras)
    # The second opinion needs an extra.
    names = [name for name in FLOORS if name in measured or name != "second_opinion_auroc"]
    rows = [Row(name, measured[name], FLOORS[name]) for name in names]
    table = Table("measured", "value", "floor", title="studio, held-out pictures")
    for row in rows:
        table.add_row(row.name, f"{row.value:.3f}", f"{row.floor:.3f}", style="red" if row.is_low else "")
    Console().print(table)
    Console().print(quality.teacher_table(teachers))
    for line in lines:
        say(line)
    low = [row.name for row in rows if row.is_low]
    low += [f"teacher {effect}" for effect, found in teachers.items() if quality.is_low(effect, found)]
    if low:
        raise CloraError(f"below the floor: {', '.join(low)}; build it anew with `clora studio build FOLDER`")


def base_numbers(found: Mapping[str, object], size: int) -> dict[str, float]:
    """Returns what `quality.base_quality` found at a size as the numbers that have floors.

    The PSNR is averaged over kinds of edit: tones (and unchanged pictures), and the kinds of drawing and objects that have one
    exact result.
    """
    values: Mapping[str, float] = found["psnr"]
    colour = [value for family, value in values.items() if family in tones.FAMILIES]
    spatial = [value for family, value in values.items() if family not in tones.FAMILIES]
    return {
        f"base_colour_psnr_{size}": float(np.mean(colour)),
        f"base_spatial_psnr_{size}": float(np.mean(spatial)),
        f"base_general_accuracy_{size}": found["general_accuracy"],
    }
