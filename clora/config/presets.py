"""Presets: recipes that a config file starts from. Each is a YAML file of ``clora/templates``, the only place that has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clora.config.reading import read_tree
from clora.errors import CloraError, nearest
from clora.files import TEMPLATES

if TYPE_CHECKING:
    from clora.config.settings import DistillConfig


def read_preset(name: str) -> dict[str, Any]:
    """Reads a preset's settings.

    Raises:
        CloraError: no preset has this name.
    """
    known = sorted(file.stem.removeprefix("preset-") for file in TEMPLATES.glob("preset-*.yaml"))
    if name not in known:
        raise CloraError(f"preset: expected {' or '.join(known)}, found {name!r}{nearest(name, known)}")
    return read_tree(TEMPLATES / f"preset-{name}.yaml")


def merged(preset: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fills a config's tree with what it leaves out; a list or a value of its own replaces the preset's whole."""
    both = {**preset, **tree}
    for key, value in preset.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            both[key] = merged(value, tree[key])
    return both


def describe_preset(name: str, config: DistillConfig) -> str:
    """States what a preset sets, and which of it the config's file or overrides replaced."""
    kept, replaced = [], []
    settings = dict(_leaves(config.model_dump(mode="json")))
    for key, value in _leaves(read_preset(name)):
        found = settings[key]
        if found == value:
            kept.append(f"{key}={_shown(value)}")
        else:
            replaced.append(f"{key}={_shown(found)} instead of {_shown(value)}")
    lines = [f"preset {name} sets", *kept, *(["your own settings are", *replaced] if replaced else [])]
    return "\n".join(line if line in (lines[0], "your own settings are") else f"  {line}" for line in lines)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree, ``train.updates`` and its value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
