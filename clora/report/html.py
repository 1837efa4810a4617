"""Self-contained pages: templates filled in, pictures and curves embedded, numbers as plain JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clora.files import TEMPLATES
from clora.report.drawing import draw_curve

Curve = Sequence[tuple[int, float]]
"""(update, value) pairs."""


def render_page(template: str, **values: Any) -> str:
    """Fills in a template of ``clora/templates``; values are escaped, and a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def embedded_curves(curves: Mapping[str, Curve]) -> list[tuple[str, str]]:
    """Draws each curve's finite values; returns names and pictures, without the curves that have no such value."""
    pictures = []
    for name, curve in curves.items():
        points = [(x, y) for x, y in curve if math.isfinite(y)]
        if points:
            pictures.append((name.replace("_", " "), data_uri(draw_curve(points))))
    return pictures


def data_uri(png: bytes) -> str:
    """Returns a picture as an address that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def plain_json(value: Any) -> Any:
    """Returns JSON values: numpy and tensor scalars become numbers, what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    # A scalar of numpy or torch; `item` refuses an array of several values.
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
