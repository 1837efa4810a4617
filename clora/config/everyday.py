"""Everyday edits by topic, which keep the base model's own abilities; the general stream uses them by default."""

from __future__ import annotations

from functools import cache
from itertools import chain, zip_longest

import yaml

from clora.files import TEMPLATES


@cache
def everyday_topics() -> dict[str, tuple[str, ...]]:
    """Returns the instructions about each topic, as they ship in ``templates/everyday_edits.yaml``."""
    text = (TEMPLATES / "everyday_edits.yaml").read_text("utf-8")
    return {topic: tuple(lines) for topic, lines in yaml.safe_load(text).items()}


def everyday_instructions() -> tuple[str, ...]:
    """Returns all instructions: the first of every topic, then the second, so that any first few are varied."""
    # Topics differ in length, so that the shorter ones are filled with None.
    return tuple(line for line in chain(*zip_longest(*everyday_topics().values())) if line is not None)
