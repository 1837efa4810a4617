"""What is in a LoRA file, for people: ``clora inspect``."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clora.errors import CloraError
from clora.lora.files import check_fit, check_pair, find_alpha, linear_shapes, read_finite
from clora.lora.keys import FileKeys, Route, has_flux2_name, routes, sort_keys, split_prefix
from clora.lora.source import LoRASource, content_hash, open_lora
from clora.paths import user_path

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_KEYS = 5


def inspect_lora(path: str | Path, target_modules: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Describes a LoRA; its tensors are read one module at a time, to see that all values are finite.

    Args:
        path: a LoRA file or folder.
        target_modules: from `clora.lora.files.linear_shapes`, to tell which modules of a model it fits.

    Returns:
        A dictionary that can be written as JSON: ``file, sha256, format, bytes, parameters, dtypes`` (count by type),
        ``ranks, alphas, scales`` (count by value), ``modules`` (one entry each: ``name, targets, rank, alpha,
        alpha_from, scale``), ``matched`` (target modules that it changes; None without a target), ``unmatched``
        (module names), ``flux2_modules`` (how many have a name that a FLUX.2 model knows), ``problems`` (one message
        each), ``unknown_keys``, ``unsupported`` (adapter types) and ``metadata``.

    Raises:
        CloraError: a missing, corrupt or pickled file, an adapter config that contradicts the tensors, or none where
            the format keeps alpha there.
    """
    source = open_lora(path)
    keys = sort_keys(source.shapes)
    table = None if target_modules is None else routes(target_modules)
    whole, problems = _whole_modules(source, keys)
    alphas = source.read(parts["alpha"] for parts in whole.values() if "alpha" in parts)
    modules = []
    for stem, parts in whole.items():
        stated = alphas[parts["alpha"]].item() if "alpha" in parts else None
        targets = () if table is None else table.get(split_prefix(stem)[1], ())
        modules.append(_describe(source, stem, source.shapes[parts["lora_A"]][0], stated, targets))
        if target_modules is not None and targets:
            fit = [target_modules[route.module] for route in targets]
            problems += _problem(check_fit, source, parts, fit)
    return _totals(source, keys) | {
        "modules": modules,
        "ranks": _counts(modules, "rank"),
        "alphas": _counts(modules, "alpha"),
        "scales": _counts(modules, "scale"),
        "matched": None if table is None else sum(len(entry["targets"]) for entry in modules),
        "unmatched": [] if table is None else [entry["name"] for entry in modules if not entry["targets"]],
        "flux2_modules": sum(has_flux2_name(stem) for stem in whole),
        "problems": problems,
    }


def render(info: Mapping[str, Any]) -> Table:
    """Lays out the result of `inspect_lora` as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(info["file"]), show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    for label, value in _rows(info):
        # Text, not str: names from a file must not be read as markup.
        table.add_row(label, Text(value))
    return table


def _whole_modules(source: LoRASource, keys: FileKeys) -> tuple[dict[str, Mapping[str, str]], list[str]]:
    """The modules whose own tensors agree, and what is wrong with the others."""
    whole, problems = {}, []
    for stem, parts in keys.modules.items():
        if found := _problem(check_pair, source, stem, parts) or _problem(read_finite, source, parts):
            problems += found
        else:
            whole[stem] = parts
    return whole, problems


def _problem(check: Callable[..., None], *arguments: Any) -> list[str]:
    """The message of a check that fails, in a list; empty where it passes."""
    try:
        check(*arguments)
    except CloraError as error:
        return [str(error)]
    return []


def _describe(
    source: LoRASource, stem: str, rank: int, stated_alpha: float | None, targets: tuple[Route, ...]
) -> dict[str, Any]:
    alpha, origin = find_alpha(source, stem, stated_alpha, rank)
    scale = source.config.scale(alpha, rank)
    names = [route.module for route in targets]
    return {"name": stem, "targets": names, "rank": rank, "alpha": alpha, "alpha_from": origin, "scale": scale}


def _totals(source: LoRASource, keys: FileKeys) -> dict[str, Any]:
    matrices = [key for parts in keys.modules.values() for side, key in parts.items() if side != "alpha"]
    return {
        "file": str(source.file),
        "sha256": content_hash(source.file),
        "format": keys.format if keys.modules else "unknown",
        "bytes": source.file.stat().st_size,
        "parameters": sum(_numel(source.shapes[key]) for key in matrices),
        "dtypes": dict(Counter(source.dtypes[key] for key in matrices)),
        "unknown_keys": list(keys.unknown),
        "unsupported": dict(keys.unsupported),
        "metadata": source.metadata,
    }


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _counts(modules: list[dict[str, Any]], name: str) -> dict[str, int]:
    """How many modules have each value; keys are text because JSON has no other."""
    counts = Counter(entry[name] for entry in modules)
    return {f"{value:g}": counts[value] for value in sorted(counts)}


def _rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = f"{info['flux2_modules']} have names of FLUX.2 (no model given: --pipeline tells which of its layers they change)"
    matched = named if info["matched"] is None else f"{info['matched']} layers of the model"
    rows = [
        ("format", info["format"]),
        ("modules", f"{len(info['modules'])} in the file; {matched}"),
        ("rank", _by_count(info["ranks"])),
        ("alpha", _by_count(info["alphas"])),
        ("effective scale", _by_count(info["scales"])),
        ("parameters", f"{info['parameters']:,}"),
        ("stored as", _by_count(info["dtypes"])),
        ("size", f"{info['bytes'] / 1e6:.2f} MB"),
        ("sha256", info["sha256"]),
    ]
    for label, names in (
        ("not supported", [f"{kind} ({key})" for kind, key in info["unsupported"].items()]),
        ("not in the model", info["unmatched"]),
        ("problems", info["problems"]),
        ("unknown keys", info["unknown_keys"]),
        ("metadata", [f"{key} = {value[:80]}" for key, value in info["metadata"].items()]),
    ):
        if names:
            more = f"\n... {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            rows.append((label, "\n".join(names[:_SHOWN_KEYS]) + more))
    return rows


def _by_count(counts: Mapping[str, int]) -> str:
    """``"8"``, or ``"4 (2 modules), 8 (6 modules)"`` where they differ."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.items()) or "-"


def pipeline_shapes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a pipeline folder's transformer, from its config alone; see `linear_shapes`.

    Raises:
        CloraError: no folder of a diffusers pipeline with a transformer.
    """
    import torch

    file = user_path(folder) / "transformer" / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = getattr(importlib.import_module("diffusers"), config["_class_name"])
        with torch.device("meta"):
            return linear_shapes(kind.from_config(config))
    except Exception as error:  # a class made from a damaged config raises whatever it meets
        message = f"{folder} is not a diffusers pipeline with a transformer ({file}: {error})"
        raise CloraError(f"{message}; expected a folder as save_pretrained writes it") from error
