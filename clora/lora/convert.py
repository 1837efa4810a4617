"""``clora export``: a LoRA of any format in another one, at a lower rank or in another type, and the error of that."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from clora.errors import CloraError
from clora.files import user_path
from clora.lora import algebra, families
from clora.lora.adapters import read_adapter
from clora.lora.keys import UNDERSCORED, split_prefix
from clora.lora.layers import LayerShapes, pipeline_shapes, pipeline_weights
from clora.lora.load import read_lora
from clora.lora.save import FORMATS, NAME_THE_MODEL, check_choice, save_lora
from clora.lora.source import LoRASource, open_lora
from clora.lora.state import LoRAState

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
# The same, as safetensors' headers name them.
_STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E4M3": "fp8"}
_SHOWN_MODULES = 20

# Metadata that stays true in another format: clora's own but for the digest of the weights, and the licence. Ranks and
# alphas of trainers do not.
_KEPT_METADATA = re.compile(r"clora\.(?!weights_sha256$).*|(modelspec\.)?license")


def convert_lora(
    path: str | Path,
    output: str | Path,
    format: str = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    pipeline: str | Path | None = None,
    max_error: float = algebra.MAX_ERROR,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a LoRA in another format.

    Args:
        path: a LoRA file or folder, or a collection.
        output: the ``.safetensors`` file, or the folder for PEFT.
        format: one of `FORMATS`. diffusers' files have one rank, the others a rank for each module.
        rank: the largest rank to keep.
        energy: instead, the share of every module's energy to keep (`clora.lora.algebra.reduce_to_energy`).
        dtype: one of `DTYPES`; by default the type that the file is stored in.
        pipeline: folder of the LoRA's pipeline, where the file's names do not show its layers. DoRA needs it with its
            weights.
        max_error, ignore: as in `clora.lora.load.read_lora`.

    Returns:
        A dictionary that can be written as JSON: ``file, output, format, dtype, bytes, rank, max_error, load_error`` (the
        largest ones) and ``modules`` (see `_compared`).

    Raises:
        CloraError: an unknown format or type, both `rank` and `energy`, a file that cannot be read or written, or
            one whose model has to be given.
    """
    _check_choices(format, dtype, rank, energy)
    source = open_lora(path, ignore)
    output = user_path(output)
    if output.resolve() in (source.file.resolve(), source.file.resolve().parent):
        raise CloraError(f"output {output} is the input itself; choose another name")
    shapes = None if pipeline is None else pipeline_shapes(pipeline)
    weights = None if pipeline is None else pipeline_weights(pipeline)
    state = read_lora(path, shapes or _shapes_in_file(source), weights, max_error=max_error, ignore=ignore)
    dtype = dtype or _stored_dtype(source)
    smaller = _reduced(state, format, rank, energy, dtype)
    metadata = {key: value for key, value in state.metadata.items() if _KEPT_METADATA.fullmatch(key)}
    family = _family(state, format, shapes)
    save_lora(smaller, output, format, dtype=DTYPES[dtype], family=family, shapes=shapes, metadata=metadata)
    modules = _compared(state, smaller, DTYPES[dtype])
    return {
        "file": str(source.file),
        "output": str(output),
        "format": format,
        "dtype": dtype,
        "bytes": sum(file.stat().st_size for file in ([output] if output.is_file() else output.iterdir())),
        "rank": smaller.max_rank,
        "max_error": max(entry["error"] for entry in modules),
        "load_error": max(entry["load_error"] for entry in modules),
        "modules": modules,
    }


def _reduced(state: LoRAState, format: str, rank: int | None, energy: float | None, dtype: str) -> LoRAState:
    """Returns the LoRA at the wanted rank or energy, with factors that the wanted type can hold."""
    if rank is not None:
        state = algebra.reduce_to_rank(state, rank)
    elif energy is not None:
        state = algebra.reduce_to_energy(state, energy, uniform=format == "diffusers")
    # The update stays the same; only its factors are rescaled to what fp8 can hold.
    if dtype == "fp8":
        state = replace(state, modules={name: algebra.balanced(module) for name, module in state.modules.items()})
    return state


def _compared(state: LoRAState, smaller: LoRAState, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Compares each module that was read with what a reader of the new file gets.

    Returns:
        One entry each: ``name, rank_before, rank, energy`` (the share kept), ``error`` (relative, of the update) and
        ``load_error`` (of the factors that were read, against the file's own change; 0 where that is of low rank).
    """
    modules: list[dict[str, Any]] = []
    for name, before in state.modules.items():
        after = smaller.modules[name]
        modules.append(
            {
                "name": name,
                "rank_before": before.rank,
                "rank": after.rank,
                "energy": 1.0 if after.rank == before.rank else algebra.energy_share(before, after.rank),
                "error": algebra.relative_error(before, algebra.stored_as(after, dtype)),
                "load_error": state.errors.get(name, 0.0),
            }
        )
    return modules


def render(report: Mapping[str, Any]) -> Group:
    """Lays out the result of `convert_lora` for the terminal, the largest errors first; names fit into 80 columns."""
    modules = sorted(report["modules"], key=lambda entry: -entry["error"])
    hidden = len(modules) - _SHOWN_MODULES
    more = f"; {hidden} more modules, all below these, are in --json" if hidden > 0 else ""
    lines = [f"{report['format']}, {report['dtype']}, rank {report['rank']}, {report['bytes'] / 1e6:.2f} MB{more}"]
    dense = sum(entry["load_error"] > 0 for entry in modules)
    if dense:
        lines.append(
            f"{dense} modules of the file are not of low rank: read as factors, error {report['load_error']:.2%}"
        )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("module", "rank", "energy\nkept", "relative\nerror"):
        table.add_column(column, overflow="fold", justify="left" if column == "module" else "right")
    for entry in modules[:_SHOWN_MODULES]:
        ranks = (
            f"{entry['rank_before']} > {entry['rank']}" if entry["rank"] < entry["rank_before"] else str(entry["rank"])
        )
        table.add_row(Text(entry["name"]), ranks, f"{entry['energy']:.2%}", f"{entry['error']:.2e}")
    return Group(Text(report["output"], style="bold", no_wrap=True, overflow="ignore"), table, *map(Text, lines))


def _check_choices(format: str, dtype: str | None, rank: int | None, energy: float | None) -> None:
    check_choice("format", format, FORMATS)
    if dtype is not None:
        check_choice("dtype", dtype, tuple(DTYPES))
    if rank is not None and energy is not None:
        raise CloraError(f"expected a rank or a share of energy, found both ({rank} and {energy:g}); leave one out")


def _shapes_in_file(source: LoRASource) -> LayerShapes:
    """Returns the layers of the model as far as the file shows them. Raises CloraError where it does not."""
    shapes = {}
    for stem, parts in source.keys.modules.items():
        format_name, module = split_prefix(stem)
        if format_name in UNDERSCORED or families.is_original_only(module):
            message = "does not show which layer of the model it changes"
            raise CloraError(f"{source.file}: {stem} {message}; {NAME_THE_MODEL}")
        shapes[module] = read_adapter(source, stem, parts).shape
    if shapes and not families.families_with(shapes):
        message = f"its modules are named like those of no model family that clora knows ({next(iter(shapes))})"
        raise CloraError(f"{source.file}: {message}; {NAME_THE_MODEL}")
    return shapes


def _stored_dtype(source: LoRASource) -> str:
    """Returns the type of the file's matrices, fp32 where they differ or have another."""
    found = {_STORED.get(source.dtypes[key], "fp32") for key, shape in source.shapes.items() if len(shape) == 2}
    return found.pop() if len(found) == 1 else "fp32"


def _family(state: LoRAState, format: str, shapes: LayerShapes | None) -> families.Family | None:
    """Returns the family whose original names kohya and ComfyUI expect; None for the formats with diffusers' names.

    Args:
        shapes: of the pipeline's layers, where one is given.

    Raises:
        CloraError: the names fit several families, which name these modules differently.
    """
    if format not in ("kohya", "comfyui"):
        return None
    if shapes is not None:
        return families.family_of(shapes)
    # A collection names its pipeline.
    family = families.family_of_pipeline(state.metadata.get("clora.pipeline", ""))
    if family is not None:
        return family
    known = families.families_with(state.modules)
    spellings = set()
    for family in known:
        spellings.add(tuple(families.original_part(name, family).name for name in state.modules))
    if len(spellings) > 1:
        raise CloraError(
            f"{' and '.join(family.name for family in known)} have layers like {next(iter(state.modules))}, and these "
            f"formats name them differently; {NAME_THE_MODEL}"
        )
    return known[0] if known else None
