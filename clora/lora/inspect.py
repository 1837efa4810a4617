"""What is in a LoRA file, for people: ``clora inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clora.errors import CloraError
from clora.lora.adapters import Adapter, Strength, find_strength, read_adapter
from clora.lora.algebra import MAX_ERROR, MAX_RANK
from clora.lora.families import Route, families_with, family_of, routes
from clora.lora.keys import FileKeys, sort_keys, split_prefix
from clora.lora.layers import linear_shapes, pipeline_shapes, transformer_of
from clora.lora.load import check_error, check_fit, updates
from clora.lora.source import LoRASource, content_hash, open_lora

_SHOWN_KEYS = 5


def inspect(path: str | Path, pipeline: Any = None) -> dict[str, Any]:
    """Describes a LoRA file of any common format, and all that is wrong with it.

    Args:
        path: a ``.safetensors`` file, or a folder with one.
        pipeline: the model that it is for, to find which of its layers the LoRA changes: the folder of a saved
            pipeline (its configs are enough), a diffusers pipeline or a transformer.

    Returns:
        What `inspect_lora` does.

    Raises:
        CloraError: an unreadable file, or no such pipeline.
    """
    if pipeline is None:
        return inspect_lora(path)
    is_folder = isinstance(pipeline, (str, Path))
    return inspect_lora(path, pipeline_shapes(pipeline) if is_folder else linear_shapes(transformer_of(pipeline)))


def inspect_lora(path: str | Path, target_modules: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Describes a LoRA; its tensors are read one module at a time, to see that all values are finite.

    Args:
        path: a LoRA file or folder.
        target_modules: from `clora.lora.layers.linear_shapes`, to tell which modules of a model it fits.

    Returns:
        A dictionary that can be written as JSON: ``file, sha256, format, bytes, parameters, dtypes`` (count by type),
        ``types, ranks, alphas, scales`` (count by value), ``modules`` (one entry each: ``name, type, targets, rank,
        alpha, alpha_from, scale, loads_as_rank, error``), ``max_error`` (of the factors that stand for dense changes;
        None where all is exact), ``families`` (that know all of its names; the model's own one where a model is
        given), ``matched`` (target modules that it changes; None without a target), ``unmatched`` (module names),
        ``problems`` and ``notes`` (one message each), ``unknown_keys``, ``unsupported`` (reason to keys) and
        ``metadata``.

    Raises:
        CloraError: a missing, corrupt or pickled file, or a broken adapter config.
    """
    source = open_lora(path)
    keys = sort_keys(source.shapes)
    table = None if target_modules is None else routes(target_modules)
    adapters, problems = _whole_modules(source, keys)
    modules = []
    for adapter, strength in adapters:
        targets = () if table is None else table.get(split_prefix(adapter.stem)[1], ())
        entry, found = _describe(source, adapter, strength, targets, target_modules or {})
        modules.append(entry)
        problems += found
    twice = [f"{first} and {second} are the same tensor by two names" for first, second in keys.twice]
    return _totals(source, keys) | {
        "modules": modules,
        **{f"{name}s": _counts(modules, name) for name in ("type", "rank", "alpha", "scale")},
        "max_error": max((entry["error"] for entry in modules if entry["error"]), default=None),
        "families": _families(keys, target_modules),
        "matched": None if table is None else sum(len(entry["targets"]) for entry in modules),
        "unmatched": [] if table is None else [entry["name"] for entry in modules if not entry["targets"]],
        "problems": problems + twice + _given_twice(modules),
        "notes": _notes(modules),
    }


def render(info: Mapping[str, Any]) -> Group:
    """Lays out the result of `inspect_lora` for the terminal; a hash fits into 80 columns whole."""
    table = Table.grid(padding=(0, 1))
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for label, value in _rows(info):
        # Text, not str: names from a file must not be read as markup.
        table.add_row(label, Text(value))
    return Group(Text(info["file"], style="bold", no_wrap=True, overflow="ignore"), table)


def _whole_modules(source: LoRASource, keys: FileKeys) -> tuple[list[tuple[Adapter, Strength]], list[str]]:
    """The modules whose own tensors agree, and what is wrong with the others."""
    whole, problems = [], []
    for stem, parts in keys.modules.items():
        try:
            adapter = read_adapter(source, stem, parts)
            source.read_finite({part: key for part, key in parts.items() if part != "alpha"})
            whole.append((adapter, find_strength(source, adapter)))
        except CloraError as error:
            problems.append(str(error))
    return whole, problems


def _describe(
    source: LoRASource,
    adapter: Adapter,
    strength: Strength,
    targets: tuple[Route, ...],
    target_modules: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Any], list[str]]:
    """One module's entry, and what is wrong with it."""
    rank, error, problems = _factorised(source, adapter, targets)
    try:
        if targets:
            check_fit(source, adapter, [target_modules[route.module] for route in targets])
    except CloraError as misfit:
        problems = [str(misfit)]
    return {
        "name": adapter.stem,
        "type": f"DoRA ({adapter.kind})" if adapter.is_dora else adapter.kind,
        "targets": [route.module for route in targets],
        "rank": adapter.rank,
        "alpha": strength.alpha,
        "alpha_from": strength.origin,
        "scale": strength.scale,
        "loads_as_rank": rank,
        "error": error,
    }, problems


def _factorised(
    source: LoRASource, adapter: Adapter, targets: tuple[Route, ...]
) -> tuple[int | None, float | None, list[str]]:
    """The rank that a module loads as, the error of its factors and problems; None where the base's weights decide."""
    if adapter.is_dora:
        return None, None, []
    if adapter.kind == "LoRA" or adapter.exact_rank <= MAX_RANK:
        return adapter.exact_rank, 0.0, []
    whole = (Route(adapter.stem, 0, adapter.shape[0]),)
    fits = bool(targets) and targets[-1].stop == adapter.shape[0]
    loaded = updates(source, adapter, targets if fits else whole, None, MAX_RANK, MAX_ERROR)
    problems = []
    for name, (module, error) in loaded.items():
        try:
            check_error(source, adapter, name, module, error, MAX_ERROR)
        except CloraError as problem:
            problems.append(str(problem))
    return max(module.rank for module, _ in loaded.values()), max(error for _, error in loaded.values()), problems


def _families(keys: FileKeys, target_modules: Mapping[str, tuple[int, int]] | None) -> list[str]:
    if target_modules is None:
        return families_with(split_prefix(stem)[1] for stem in keys.modules)
    family = family_of(target_modules)
    return [] if family is None else [family.name]


def _given_twice(modules: list[dict[str, Any]]) -> list[str]:
    counts = Counter(target for entry in modules for target in entry["targets"])
    return [
        f"{target} is given {count} times; expected each module once" for target, count in counts.items() if count > 1
    ]


def _notes(modules: list[dict[str, Any]]) -> list[str]:
    """What works all the same but should be known."""
    high = sum((entry["loads_as_rank"] or 0) > MAX_RANK for entry in modules)
    dora = sum(entry["loads_as_rank"] is None for entry in modules)
    found = []
    if high:
        found.append(
            f"{high} module(s) of rank above {MAX_RANK}, the most that the kernels take: eager PyTorch is used"
        )
    if dora:
        found.append(f"{dora} DoRA module(s): rank and error depend on the weights of the base, which loading needs")
    return found


def _totals(source: LoRASource, keys: FileKeys) -> dict[str, Any]:
    matrices = [key for parts in keys.modules.values() for part, key in parts.items() if part != "alpha"]
    return {
        "file": str(source.file),
        "sha256": content_hash(source.file),
        "format": keys.format if keys.modules else "unknown",
        "bytes": source.file.stat().st_size,
        "parameters": sum(_numel(source.shapes[key]) for key in matrices),
        "dtypes": dict(Counter(source.dtypes[key] for key in matrices)),
        "unknown_keys": list(keys.unknown),
        "unsupported": {reason: list(names) for reason, names in keys.unsupported.items()},
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
    ordered = sorted(counts, key=lambda value: (value is None, value))
    return {_text(value): counts[value] for value in ordered}


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, (int, float)) else value


def _rows(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    unmatched = "no model given: --pipeline tells which of its layers they change"
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
    for label, names in (
        ("not supported", [f"{len(keys)} key(s) {reason} ({keys[0]})" for reason, keys in info["unsupported"].items()]),
        ("not in model", info["unmatched"]),
        ("problems", info["problems"]),
        ("notes", info["notes"]),
        ("unknown keys", info["unknown_keys"]),
        ("metadata", [f"{key} = {_start(value)}" for key, value in info["metadata"].items()]),
    ):
        if names:
            more = f"\n... {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            rows.append((label, "\n".join(names[:_SHOWN_KEYS]) + more))
    return rows


def _start(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:80]} ..."


def _by_count(counts: Mapping[str, int]) -> str:
    """``"8"``, or ``"4 (2 modules), 8 (6 modules)"`` where they differ."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.items()) or "-"
