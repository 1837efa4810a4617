"""The plan of a distillation, as values and as tables.

Only configs and the headers of safetensors files are read. The time of an update follows from the operations of a pass and
a matrix product timed on the device.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.filesize import pick_unit_and_suffix
from rich.table import Column, Table
from rich.text import Text

from clora.commands.checks import Problems, check_layers, check_prompts, find_file_problems
from clora.commands.folder import with_run_dtype
from clora.commands.plan import cost, needs
from clora.config.settings import DistillConfig
from clora.data.prepare import DataCount, count_data, pairs_note
from clora.data.rendering import num_passes
from clora.devices import find_device, find_dtype
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.models.loading import adapt
from clora.models.skeleton import pipeline_folder, skeleton
from clora.training.memory import rows_that_fit
from clora.training.student import student_layers


def make_plan(config: DistillConfig) -> dict[str, Any]:
    """Plans a distillation.

    Returns:
        A dictionary that can be written as JSON: ``problems`` (one message each) and ``notes`` (likewise, no mistakes).
        Where the pipeline can be read and its passes counted, it has these keys too. ``model``: pipeline, parameters,
        dtype, layers, student parameters. ``memory``: bytes by part, ``peak``, ``device`` bytes or None. ``rows``: most
        rows of a pass. ``disk``: bytes by part, ``free``. ``passes`` of one row: rendering, start, per update, all. ``time``:
        measured rate of the device in FLOP/s, and seconds at that rate; ``train.minutes`` bounds training.
    """
    problems = find_file_problems(config)
    plan: dict[str, Any] = {}
    notes: list[str] = []
    with problems.catch():
        device = find_device(config.device)
        try:
            plan = _model_plan(config, device, problems, notes)
        except cost.Uncounted as error:
            notes.append(str(error))
    return {"problems": problems, "notes": notes, **plan}


def _model_plan(config: DistillConfig, device: torch.device, problems: Problems, notes: list[str]) -> dict[str, Any]:
    config, note = with_run_dtype(config, device)
    if note:
        notes.append(note)
    dtype = find_dtype(config.dtype, device)
    folder = pipeline_folder(config.pipeline)
    pipeline = skeleton(str(folder), dtype)
    transformer = getattr(pipeline, "transformer", None)
    # Before the adapter, which may refuse the size or the family: that would hide the layers' problems.
    if getattr(transformer, "_repeated_blocks", None):
        shapes = linear_shapes(transformer)
        ranks = check_layers(config, transformer, shapes, problems)
    config, adapter = adapt(config, pipeline)
    check_prompts(config, adapter, problems)
    layers = student_layers(transformer, config.student.targets)
    parts = [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    facts = needs.Facts(
        transformer=needs.weight_bytes(transformer, folder / "transformer"),
        encoders=sum(needs.weight_bytes(part, folder / name) for name, part in parts if name != "transformer"),
        dtype=dtype,
        shapes=shapes,
        student=layers,
        teachers=ranks,
        blocks=cost.count_blocks(transformer),
        cost=cost.pass_cost(adapter, layers, config.student.rank, cost.text_shape(adapter)),
    )
    try:
        data = count_data(config, adapter.text_sees_image)
        if note := pairs_note(config, adapter.text_sees_image):
            notes.append(note)
    except CloraError:  # among the problems
        notes.append("what is encoded and rendered is not counted: pictures or instructions cannot be read")
        data = DataCount(0, 0, 0)
    # Values of the encoded prompts [tokens, channels], pictures to edit [S, C] and targets [T, C].
    source = cost.source_rows(adapter) * adapter.latent_shape[1]
    encoded = (
        data.prompts * math.prod(cost.text_shape(adapter))
        + data.sources * source
        + data.renders * math.prod(adapter.latent_shape)
    )
    model = {
        "pipeline": type(pipeline).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "dtype": config.dtype,
        "layers": len(layers),
        "student_parameters": needs.trained_values(facts, config.student.rank),
        "tokens": cost.num_tokens(adapter),
    }
    config = _with_rows(config, facts, cost.num_tokens(adapter), device)
    return {"model": model} | _estimates(config, facts, encoded, data.renders, device, problems)


def _with_rows(config: DistillConfig, facts: needs.Facts, tokens: int, device: torch.device) -> DistillConfig:
    """Returns the config with the rows that a run would choose here, if nothing else were on the device."""
    train = config.train
    if train.gradient_rows != "auto":
        return config
    saved = facts.cost.saved_checkpointed if train.gradient_checkpointing else facts.cost.saved
    free = cost.device_memory(device)
    if free is not None:
        # A run chooses when these are loaded.
        parts = needs.memory(facts, config)
        free = max(0, free - sum(parts[name] for name in ("base", "teachers", "student and critic")))
    rows = rows_that_fit(tokens, saved, free, device.type)
    return config.model_copy(update={"train": train.model_copy(update={"gradient_rows": rows})})


def _estimates(
    config: DistillConfig, facts: needs.Facts, encoded: int, renders: int, device: torch.device, problems: Problems
) -> dict[str, Any]:
    """Memory, rows, disk, passes and time; adds a problem where memory or disk do not suffice."""
    train = config.train
    available = cost.device_memory(device)
    parts = needs.memory(facts, config, available)
    if available is not None and needs.peak(parts) > available:
        problems.append(_too_large(parts, available, config))
    files = needs.disk(facts, config, encoded)
    output = Path(config.output).absolute()
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    if sum(files.values()) > free:
        problems.append(f"output {config.output}: needs about {_size(sum(files.values()))}, free are {_size(free)}")
    # Passes of one row, and the seconds of each at the rate of the device.
    passes = {
        "rendering": num_passes(config, renders),
        "start": needs.start_passes(facts, config, needs.start_groups(facts, config, available)),
        "anchoring update": needs.anchoring_passes(config),
        "update": needs.forward_passes(config),
    }
    rate = cost.measure_rate(device, facts.dtype)
    seconds = facts.cost.flops / rate
    anchoring = round(config.anchor_share * train.updates)
    training = anchoring * passes["anchoring update"] + (train.updates - anchoring) * passes["update"]
    # train.minutes bounds the training, never the rendering and the start before it.
    passes["all"] = passes["rendering"] + passes["start"] + min(training, 60 * (train.minutes or math.inf) / seconds)
    return {
        "memory": {**parts, "peak": needs.peak(parts), "device": available},
        "rows": {
            "with gradient": needs.rows_with_gradient(config),
            "scoring": needs.scoring_rows(config),
            "rendering": needs.rendering_rows(config),
        },
        "disk": {**files, "free": free},
        "passes": passes,
        "time": {
            "device": str(device),
            "flops_per_second": rate,
            "minutes": train.minutes,
            **{name.replace(" ", "_"): seconds * count for name, count in passes.items()},
        },
    }


def _too_large(parts: Mapping[str, int], available: int, config: DistillConfig) -> str:
    train = config.train
    learning = needs.rows_with_gradient(config)
    forward = max(needs.scoring_rows(config), needs.rendering_rows(config))
    advice = {
        "train.gradient_checkpointing=true": not train.gradient_checkpointing,
        f"train.gradient_rows below {learning}": learning > 1,
        f"train.forward_rows below {forward}": forward > 2,
        f"student.rank below {config.student.rank}": True,
        "train.teacher_memory_gb": train.teacher_memory_gb is None,
        "train.optimizer_bits=8": train.optimizer_bits == 32,
        "student.init=merge": parts["start"] == needs.peak(parts),
    }
    return (
        f"device memory: about {_size(needs.peak(parts))} are needed, the device has {_size(available)}; the largest part is "
        f"{max(parts, key=lambda name: parts[name])}. Try {', '.join(text for text, helps in advice.items() if helps)}"
    )


def render(plan: Mapping[str, Any]) -> Group:
    """Lays out a plan for the terminal."""
    found = plan["problems"]
    heading = f"{len(found)} problem{'s' * (len(found) != 1)}" if found else "no problem found"
    return Group(
        *(_tables(plan) if "model" in plan else ()),
        *(Text(note, style="yellow") for note in plan["notes"]),
        Text(heading, style="bold red" if found else "bold green"),
        *(Text(f"- {problem}") for problem in found),
    )


def _tables(plan: Mapping[str, Any]) -> Iterator[Table]:
    model, passes, time = plan["model"], plan["passes"], plan["time"]
    rows = ", ".join(f"{count} {kind}" for kind, count in plan["rows"].items())
    size = {name: "unknown" if value is None else _size(value) for name, value in plan["memory"].items()}
    before = {f"{name}, before the others": size.pop(name) for name in needs.BEFORE}
    if not plan["memory"]["start"]:
        del before["start, before the others"]
    rate = f"{time['flops_per_second'] / 1e12:.3g} TFLOP/s of a matrix product, measured on {time['device']}"
    bound = "all" if time["minutes"] is None else f"all, train.minutes = {time['minutes']:g}"
    yield _table(
        "what is trained",
        {
            "pipeline": model["pipeline"],
            "transformer": f"{_parameters(model['parameters'])}, {model['dtype']}",
            "student": f"{_parameters(model['student_parameters'])} on {model['layers']} layers",
            "tokens of a row": f"{model['tokens']}",
            "rows of a pass": rows,
        },
    )
    yield _table("device memory", before | size)
    yield _table("disk", {name: _size(value) for name, value in plan["disk"].items()})
    yield _table(
        f"passes of one row, and time at {rate}; everything else is extra",
        {
            name: f"{passes[count]:.4g} passes, {_duration(time[seconds])}"
            for name, count, seconds in (
                ("rendering of targets", "rendering", "rendering"),
                ("least-squares start", "start", "start"),
                ("update while anchoring", "anchoring update", "anchoring_update"),
                ("update after it", "update", "update"),
                (bound, "all", "all"),
            )
            if count != "start" or passes["start"]
        },
    )


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table("name", Column("value", justify="right"), title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def _size(count: int) -> str:
    return _in_unit(count, ["bytes", "kB", "MB", "GB", "TB"])


def _parameters(count: int) -> str:
    return _in_unit(count, ["parameters", "K parameters", "M parameters", "B parameters"])


def _in_unit(count: int, units: list[str]) -> str:
    """A count in the largest of these units, each a thousand of the one before, that it fills."""
    size, unit = pick_unit_and_suffix(count, units, 1000)
    return f"{count / size:.4g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
