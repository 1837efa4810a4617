"""Self-contained pages: templates filled in, pictures embedded, curves drawn, numbers as plain JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from clora.files import TEMPLATES
from clora.report.curves import Curve, Phases, draw_curve

MEANINGS = {
    "loss": "What the student's update minimises: its terms, weighted.",
    "anchor": "Flow matching on the teachers' renders: how far the student's prediction is from the target.",
    "dmd_bs": "Distribution matching on the student's own few-step samples (backward simulation).",
    "dmd_ts": "Distribution matching on noised renders (target simulation): the last steps of the student's schedule.",
    "critic": "Flow matching of the critic on the student's samples: how well it knows what the student makes.",
    "student_gradient": "Norm of the student's gradient, before it is clipped.",
    "critic_gradient": "Norm of the critic's gradient, before it is clipped.",
    "student_change": "How much the student changes the base's weights, as a share of their size; a run stops at 10.",
    "critic_change": "How much the critic changes the base's weights, as a share of their size; a run stops at 10.",
    "student_rate": "Learning rate of the student.",
    "critic_rate": "Learning rate of the critic.",
    "updates_per_second": "Speed of the training.",
    "memory_gb": "Peak memory of the process (on a GPU: of its tensors there) so far, in GB.",
}
"""What a curve shows, by its name."""


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


class DrawnCurve(NamedTuple):
    """A curve of a page: its title, what it shows, and its ``<svg>`` element."""

    title: str
    meaning: str
    svg: str


def drawn_curves(curves: Mapping[str, Curve], phases: Phases = ()) -> list[DrawnCurve]:
    """Draws each curve's finite values, without the curves that have no such value or only zeros."""
    drawn = []
    for name, curve in curves.items():
        points = [(x, y) for x, y in curve if math.isfinite(y)]
        if any(y for _, y in points):
            drawn.append(DrawnCurve(name.replace("_", " "), MEANINGS.get(name, ""), draw_curve(points, phases)))
    return drawn


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Returns a picture's file as an address that a page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


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
