"""The report of an evaluation: ``report.html`` (one offline page), ``grid.png`` and ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clora.data.images import encode_png
from clora.files import write_atomic
from clora.report.curves import Curve, Phases
from clora.report.drawing import draw_grid
from clora.report.html import data_uri, drawn_curves, plain_json, render_page
from clora.studio.pixels import to_bytes


@dataclass(frozen=True)
class Column:
    """One column of the table of results; ``best`` chooses the value to mark, if any."""

    key: str
    title: str
    meaning: str
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None = None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COLUMNS = (
    Column("files", "LoRA files", "LoRA files to keep for all the effects.", "{:g}".format),
    Column("megabytes", "MB", "Size of these files together.", "{:.2f}".format),
    Column("nfe", "passes", "Forward passes of the transformer for one image; time is in proportion.", "{:g}".format),
    Column(
        "effect_accuracy",
        "effect accuracy",
        "Share of images in which the requested effect is the nearest among the whole effect library and 'unchanged'.",
        _percent,
        max,
    ),
    Column(
        "bad_case_rate",
        "bad cases",
        "Share of images in which the effect is missing, wrong or less than half as strong as it should be.",
        _percent,
        min,
    ),
    Column(
        "bad_case_rate_stochastic",
        "bad cases, stochastic",
        "The same for the stochastic effects only, where few steps tend to blur.",
        _percent,
        min,
    ),
    Column(
        "psnr",
        "PSNR",
        "Likeness to the exact result in dB, over the effects that have a single exact result.",
        "{:.1f} dB".format,
        max,
    ),
    Column(
        "subject_alignment",
        "subject alignment",
        "0 for a bad case, otherwise 1 to 5: how well the picture's own content is kept.",
        "{:.2f}".format,
        max,
    ),
    Column(
        "general_accuracy",
        "general accuracy",
        "Share of everyday edits (recolour, remove, brighten) that still succeed with the LoRA loaded.",
        _percent,
        max,
    ),
)


@dataclass(frozen=True)
class Shown:
    """One effect for the page's first screen: the prompt that asks for it, and uint8 ``[H, W, 3]`` before and after."""

    effect: str
    prompt: str
    source: np.ndarray
    result: np.ndarray


METHODS = {
    "teachers_80": "one LoRA each, 80 passes",
    "teachers_8": "one LoRA each, 8 passes",
    "merge_svd": "merged LoRA, SVD",
    "merge_ties_svd": "merged LoRA, TIES + SVD",
    "merge_dare_ties_svd": "merged LoRA, DARE + TIES + SVD",
    "base": "base model, no LoRA",
    "clora": "clora: one LoRA, 8 passes",
}


def write_report(
    folder: str | Path,
    metrics: Mapping[str, Any],
    gallery: Sequence[Shown],
    columns: Sequence[str],
    images: np.ndarray,
    curves: Mapping[str, Curve],
    phases: Phases = (),
) -> Path:
    """Writes ``report.html``, ``grid.png`` and ``metrics.json``, each whole or not at all.

    Args:
        folder: where to; created where it is missing.
        metrics: ``seed, device, threads, dtype, updates, targets_precomputed, seconds, peak_memory_gb, effects, rows``
            as `clora demo` documents them; a row for each of `METHODS`. A value that is not finite is written as null.
            ``intervals`` of a row and ``against_teachers``, the paired differences of clora's from theirs, may be missing.
        gallery: what the first screen shows.
        columns: titles of the C columns of pictures.
        images: ``[E, C, H, W, 3]`` in [0, 1], a row for each of the metrics' effects.
        curves: name to (update, value) pairs.
        phases: name and last update of each part of the training.

    Returns:
        The path of ``report.html``.

    Raises:
        CloraError: a file cannot be written.
        ValueError: images of another shape.
    """
    folder = Path(folder)
    metrics = plain_json(metrics)
    effects = metrics["effects"]
    if images.ndim != 5 or images.shape[:2] != (len(effects), len(columns)) or images.shape[4] != 3:
        raise ValueError(f"expected images [{len(effects)}, {len(columns)}, H, W, 3], found {images.shape}")
    pixels = to_bytes(images)
    pictures = [[_embedded(image) for image in row] for row in pixels]
    # The page is complete before the first file is written.
    page = render_page(
        "report.html.j2",
        metrics=metrics,
        headline=_headline(metrics["rows"]),
        gallery=[(shown.effect, shown.prompt, *map(_embedded, (shown.source, shown.result))) for shown in gallery],
        columns=COLUMNS,
        differences=_differences(metrics.get("against_teachers", {})),
        best=_best(metrics["rows"]),
        methods=METHODS,
        grid_columns=columns,
        grid=list(zip(effects, pictures, strict=True)),
        curves=drawn_curves(curves, phases),
    )
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    write_atomic(folder / "grid.png", encode_png(draw_grid(columns, effects, pixels)))
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _embedded(picture: np.ndarray) -> str:
    return data_uri(encode_png(picture))


def _differences(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Returns the title of each column, clora's value minus the teachers', and its interval."""
    shown = []
    for column in COLUMNS:
        if column.key in found:
            low, high = found[column.key]["interval"]
            shown.append(
                (column.title, column.show(found[column.key]["mean"]), f"{column.show(low)} to {column.show(high)}")
            )
    return shown


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the best value of each column as text, so that values that look equal are marked alike."""
    best = {}
    for column in COLUMNS:
        known = [row[column.key] for row in rows if row[column.key] is not None]
        if column.best and known:
            best[column.key] = column.show(column.best(known))
    return best


def _headline(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns the result in a few figures: (figure, its meaning)."""
    by_method = {row["method"]: row for row in rows}
    clora = by_method["clora"]
    teachers = by_method["teachers_80"]
    best_merge = max(row["effect_accuracy"] for row in rows if row["method"].startswith("merge"))
    return [
        (_percent(clora["effect_accuracy"]), "effect accuracy of the one LoRA"),
        (_percent(teachers["effect_accuracy"]), f"with {teachers['files']:g} separate LoRAs"),
        (f"{teachers['files']:g} → {clora['files']:g}", "LoRA files"),
        (f"{teachers['nfe']:g} → {clora['nfe']:g}", "passes for one image"),
        (_percent(best_merge), "effect accuracy of the best merge"),
    ]
