"""The report of a run that is trained, or was: one self-contained page from its history and its previews."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clora.errors import CloraError
from clora.files import user_path, write_atomic
from clora.report.curves import Curve
from clora.report.history import HISTORY, Record, read_history
from clora.report.html import data_uri, drawn_curves, render_page
from clora.report.previews import PREVIEWS, picture_file, read_previews

RUN_REPORT = "report.html"
MOST_PREVIEWS = 6
"""Of an effect on the page."""


def write_run_report(folder: str | Path) -> Path:
    """Writes ``report.html`` of a run's folder anew from its history and previews; returns its path.

    Raises:
        CloraError: the folder holds no history, or one or an index of previews that cannot be read.
    """
    folder = user_path(folder)
    records = read_history(folder / HISTORY)
    if not records:
        raise CloraError(f"{folder}: expected the folder of a run with a {HISTORY}, found no record in it")
    page = render_page(
        "run.html.j2",
        name=folder.resolve().name,
        figures=_figures(records),
        effects=_effects(folder / PREVIEWS),
        curves=drawn_curves(_curves(records), _phases(records)),
    )
    write_atomic(folder / RUN_REPORT, page)
    return folder / RUN_REPORT


class Watched(NamedTuple):
    """What the page shows of an effect.

    Attributes:
        name: the effect.
        psnr: in dB, of the newest preview against the target.
        gain: by which that has grown since the first preview, in dB.
        source, target: pictures.
        growth: the student's picture after an update: (update, picture), the newest last.
    """

    name: str
    psnr: float
    gain: float
    source: str
    target: str
    growth: list[tuple[int, str]]


def _effects(folder: Path) -> list[Watched]:
    """Returns every effect of the previews, those first that lag: whose pictures are furthest from their targets."""
    previews = read_previews(folder)
    if not previews:
        return []
    # The first, the newest and others evenly between.
    chosen = sorted({round(i) for i in np.linspace(0, len(previews) - 1, MOST_PREVIEWS)})
    shown = [previews[i] for i in chosen]
    effects = []
    for number, name in enumerate(previews[-1].psnr):

        def picture(of: str | int, number: int = number, name: str = name) -> str:
            return data_uri((folder / picture_file(number, name, of)).read_bytes(), "webp")

        last = previews[-1].psnr[name]
        gain = last - previews[0].psnr.get(name, last)
        growth = [(preview.update, picture(preview.update)) for preview in shown if name in preview.psnr]
        effects.append(Watched(name, last, gain, picture("source"), picture("target"), growth))
    return sorted(effects, key=lambda effect: effect.psnr)


def _figures(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the state of a run in a few figures: (figure, its meaning)."""
    last = records[-1]
    hours, minutes = divmod(round(last.seconds / 60), 60)
    figures = [(str(last.update), "updates"), (last.phase, "phase"), (f"{hours}:{minutes:02d}", "hours of training")]
    if "loss" in last.values:
        figures.append((f"{last.values['loss']:.3g}", "loss"))
    return figures


def _curves(records: Sequence[Record]) -> dict[str, Curve]:
    """Returns each number by update, and the updates a second."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.values.items():
            curves.setdefault(name, []).append((record.update, value))
    for before, after in pairwise(records):
        if after.seconds > before.seconds:
            speed = (after.update - before.update) / (after.seconds - before.seconds)
            curves.setdefault("updates_per_second", []).append((after.update, speed))
    return curves


def _phases(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Returns each phase with its last update, in the order in which they began."""
    return list({record.phase: record.update for record in records}.items())
