"""Describes a LoRA file to people: ``clora inspect``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clora.errors import CloraError, printable
from clora.lora.adapters import Adapter, find_strength, read_adapter
from clora.lora.algebra import MAX_ERROR, MAX_RANK
from clora.lora.families import Route, families_with, family_of, routes
from clora.lora.keys import format_of, module_name, split_prefix
from clora.lora.layers import LayerShapes, linear_shapes, pipeline_shapes, transformer_of
from clora.lora.load import NOTHING, excess, misfit, second_time, several_adapters, updates
from clora.lora.source import LoRASource, open_lora, weights_digest

# A collection's entry (`clora.collection.metadata`), which holds the effects' prompts.
_EFFECTS = "clora.effects"
_SHOWN_KEYS = 5
_SHOWN_PROBLEMS = 2
_SHOWN_CHARACTERS = 80


def inspect(path: str | Path, pipeline: Any = None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Describes a LoRA file of any common format, and all that is wrong with it.

    Its tensors are read one module at a time, to see that all values are finite.

    Args:
        path: a ``.safetensors`` file, or a folder with one.
        pipeline: the model that it is for, to find which of its layers the LoRA changes: the folder of a saved
            pipeline (its configs are enough), a diffusers pipeline or a transformer.
        ignore: the beginnings of the tensor names to leave out (see `clora.load_lora`).

    Returns:
        A dictionary that can be written as JSON: ``file, sha256, format, bytes, parameters, dtypes`` (count by type),
        ``types, ranks, alphas, scales`` (count by value), ``modules`` (see `_describe`), ``max_error`` (of the factors
        that stand for dense changes; None where all is exact), ``families`` (that have all of its names; the model's
        own one where a model is given), ``matched`` (layers that it changes; None without a model), ``unmatched``
        (module names), ``problems`` and ``notes`` (one message each), ``unknown_keys``, ``unsupported`` (reason to
        keys), ``ignored`` (keys), ``effects`` (of a collection, name to prompts) and ``metadata``.

    Raises:
        CloraError: a missing, corrupt or pickled file, a broken adapter config, or no such pipeline.
    """
    shapes: LayerShapes = {}
    if pipeline is not None:
        is_folder = isinstance(pipeline, (str, Path))
        shapes = pipeline_shapes(pipeline) if is_folder else linear_shapes(transformer_of(pipeline))
    source = open_lora(path, ignore)
    table = routes(shapes)
    modules: list[dict[str, Any]] = []
    problems: list[str] = []
    layers: dict[str, list[str]] = {}
    for stem, parts in source.keys.modules.items():
        try:
            adapter = read_adapter(source, stem, parts)
            entry, found = _describe(adapter, table.get(module_name(stem, table), ()), shapes)
        except CloraError as error:
            problems.append(str(error))
        else:
            modules.append(entry)
            problems += found
            for layer in entry["targets"]:
                layers.setdefault(layer, []).append(stem)
    problems += [f"{first} and {second} are the same tensor by two names" for first, second in source.keys.twice]
    problems += [second_time(layer, stems) for layer, stems in layers.items() if len(stems) > 1]
    problems += [problem for problem in [several_adapters(source)] if problem]
    if modules and not problems and all(entry["is_zero"] for entry in modules):
        problems.append(NOTHING)
    names = [split_prefix(stem)[1] for stem in source.keys.modules]
    families = families_with(names) if pipeline is None else [family_of(shapes)]
    return _totals(source) | {
        "modules": modules,
        **{f"{name}s": _counts(modules, name) for name in ("type", "rank", "alpha", "scale")},
        "max_error": max((entry["error"] for entry in modules if entry["error"]), default=None),
        "families": [family.name for family in families if family is not None],
        "matched": None if pipeline is None else sum(map(len, layers.values())),
        "unmatched": [] if pipeline is None else [entry["name"] for entry in modules if not entry["targets"]],
        "problems": problems,
        "notes": _notes(modules, source),
    }


def render(info: Mapping[str, Any]) -> Group:
    """Lays out the result of `inspect` for the terminal; a hash fits into 80 columns whole."""
    unmatched = "no model given: --pipeline shows which of its layers they change"
    matched = unmatched if info["matched"] is None else f"{info['matched']} layers of the model"
    ranks = _counts([entry for entry in info["modules"] if entry["loads_as_rank"]], "loads_as_rank")
    rows = [
        ("format", info["format"]),
        ("model family", " or ".join(info["families"]) or "unknown"),
        ("modules", f"{len(info['modules'])} in the file; {matched}"),
        ("adapter type", _by_count(info["types"])),
        ("rank", _by_count(info["ranks"])),
        ("alpha", _by_count(info["alphas"])),
        ("effective scale", _by_count(info["scales"])),
        ("loads as rank", _by_count(ranks)),
        ("largest error", "exact" if info["max_error"] is None else f"{info['max_error']:.3%} of a module's change"),
        ("parameters", f"{info['parameters']:,}"),
        ("stored as", _by_count(info["dtypes"])),
        ("size", f"{info['bytes'] / 1e6:.2f} MB"),
        ("sha256", info["sha256"]),
    ]
    if info["effects"]:
        rows.append(
            ("effects", "\n".join(f"{name}: {prompt}" for name, texts in info["effects"].items() for prompt in texts))
        )
    metadata = []
    for key, value in info["metadata"].items():
        if key == _EFFECTS and info["effects"]:
            continue  # shown whole
        more = " ..." if len(value) > _SHOWN_CHARACTERS else ""
        metadata.append(f"{key} = {value[:_SHOWN_CHARACTERS]}{more}")
    # Lists have a line only where there is something to list.
    for label, names in (
        ("not supported", [f"{len(keys)} key(s) {reason} ({keys[0]})" for reason, keys in info["unsupported"].items()]),
        ("not in model", info["unmatched"]),
        ("problems", info["problems"]),
        ("notes", info["notes"]),
        ("unknown keys", info["unknown_keys"]),
        ("ignored", info["ignored"]),
        ("metadata", metadata),
    ):
        if names:
            more = f"\n... {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            rows.append((label, "\n".join(names[:_SHOWN_KEYS]) + more))
    table = Table.grid(padding=(0, 1))
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for label, value in rows:
        # Text, not str: names from a file must not be read as markup.
        table.add_row(label, Text(printable(value)))
    return Group(Text(printable(info["file"]), style="bold", no_wrap=True, overflow="ignore"), table)


def check_usable(info: Mapping[str, Any]) -> None:
    """Checks the result of `inspect`. Raises CloraError, with all reasons, for a file that `clora distill` would refuse."""
    problems = [problem.removeprefix(f"{info['file']}: ") for problem in info["problems"][:_SHOWN_PROBLEMS]]
    more = len(info["problems"]) - _SHOWN_PROBLEMS
    reasons = {
        "it holds no LoRA module": not info["modules"] and not problems,
        "it holds what is not supported": info["unsupported"],
        "it has unknown keys": info["unknown_keys"],
        "; ".join(problems) + (f"; and {more} more problems" if more > 0 else ""): problems,
        "it has modules that the pipeline lacks": info["unmatched"],
        "its modules are named like those of no model family that clora knows": info["modules"]
        and info["matched"] is None
        and not info["families"],
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        raise CloraError(f"{info['file']} cannot be used as it is: {'; '.join(found)}")


def _describe(adapter: Adapter, places: Sequence[Route], shapes: LayerShapes) -> tuple[dict[str, Any], list[str]]:
    """Returns one module's entry, and what is wrong with it.

    The entry has ``name, type, targets`` (the layers that it changes), ``rank, alpha, alpha_from, scale, loads_as_rank``
    ``error`` (of the factors that it loads as) and ``is_zero`` (the change is zero).
    """
    tensors = adapter.read()  # raises where a value is not finite
    strength = find_strength(adapter)
    rank: int | None = adapter.exact_rank
    error: float | None = 0.0
    # What does not fit is not computed: its size is the file's claim.
    problem = misfit(adapter, places, shapes) if places else None
    problems = [] if problem is None else [problem]
    if adapter.is_dora:
        # The weights of the base decide both.
        rank = None
        error = None
    elif adapter.kind != "LoRA" and adapter.exact_rank > MAX_RANK and not problems:
        # As loading factorises it: each layer's rows by themselves where the model is known.
        loaded = updates(adapter, places or (Route(adapter.stem, 0, adapter.shape[0]),), None, MAX_ERROR)
        rank = max(module.rank for module, _ in loaded.values())
        error = max(missed for _, missed in loaded.values())
        found = [excess(adapter, name, module, missed, MAX_ERROR) for name, (module, missed) in loaded.items()]
        problems = [problem for problem in found if problem]
    return {
        "name": adapter.stem,
        "type": f"DoRA ({adapter.kind})" if adapter.is_dora else adapter.kind,
        "targets": [route.module for route in places],
        "rank": adapter.rank,
        "alpha": strength.alpha,
        "alpha_from": strength.origin,
        "scale": strength.scale,
        "loads_as_rank": rank,
        "error": error,
        "is_zero": adapter.changes_nothing(tensors, strength.scale),
    }, problems


def _notes(modules: list[dict[str, Any]], source: LoRASource) -> list[str]:
    """Returns what is not a problem but should be known."""
    high = sum((entry["loads_as_rank"] or 0) > MAX_RANK for entry in modules)
    dora = sum(entry["loads_as_rank"] is None for entry in modules)
    zero = sum(entry["is_zero"] for entry in modules)
    implied = sum(entry["alpha_from"] == "rank" and format_of(entry["name"]) == "peft" for entry in modules)
    notes = {
        f"{high} module(s) of rank above {MAX_RANK}, the most that the kernels take: eager PyTorch is used": high,
        f"{dora} DoRA module(s): rank and error depend on the weights of the base, which loading needs": dora,
        f"{zero} of {len(modules)} module(s) change nothing: the product of their matrices is zero": zero,
        f"{implied} module(s) in PEFT's prefix without adapter_config.json: alpha = rank, as diffusers reads them": implied,
        f"{len(source.ignored)} key(s) are left out, as asked": len(source.ignored),
    }
    return [note for note, count in notes.items() if count]


def _totals(source: LoRASource) -> dict[str, Any]:
    keys = source.keys
    tensors = []
    for parts in keys.modules.values():
        tensors += [key for part, key in parts.items() if part != "alpha"]
    return {
        "file": str(source.file),
        "sha256": weights_digest(source.file),
        "format": keys.format if keys.modules else "unknown",
        "bytes": source.bytes,
        "parameters": sum(math.prod(source.shapes[key]) for key in tensors),
        "dtypes": dict(Counter(source.dtypes[key] for key in tensors)),
        "unknown_keys": list(keys.unknown),
        "unsupported": {reason: list(names) for reason, names in keys.unsupported.items()},
        "ignored": list(source.ignored),
        "effects": _effects(source.metadata),
        "metadata": source.metadata,
    }


def _effects(metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns a collection's prompts by effect; empty where the file states none that can be read."""
    try:
        return {
            str(effect["name"]): [str(prompt) for prompt in effect["prompts"]]
            for effect in json.loads(metadata.get(_EFFECTS, "[]"))
        }
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}


def _counts(modules: list[dict[str, Any]], name: str) -> dict[str, int]:
    """Counts the modules that have each value; keys are text because JSON has no other."""
    counts: Counter[str] = Counter()
    for value in sorted((entry[name] for entry in modules), key=lambda value: (value is None, value)):
        counts["none" if value is None else value if isinstance(value, str) else f"{value:g}"] += 1
    return dict(counts)


def _by_count(counts: Mapping[str, int]) -> str:
    """Returns ``"8"``, or ``"4 (2), 8 (6)"`` where values differ: each with the number of modules that have it."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.items()) or "-"
