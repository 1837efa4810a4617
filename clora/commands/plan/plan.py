"""``clora plan``: what a distillation will need and do, and what is wrong with its input, before anything heavy is loaded.

Only configs and the headers of safetensors files are read. The transformer runs once on fake tensors, which count
operations and bytes and hold nothing; the time of an update follows from a matrix product timed on the device.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from clora.commands.checks import Problems, find_file_problems, find_layer_problems, find_prompt_problems
from clora.commands.plan.cost import (
    Uncounted,
    count_blocks,
    device_memory,
    measure_rate,
    num_tokens,
    pass_cost,
    source_rows,
    text_shape,
)
from clora.commands.plan.memory import (
    Facts,
    anchoring_passes,
    disk,
    forward_passes,
    memory,
    peak,
    rendering_rows,
    rows_with_gradient,
    scoring_rows,
    trained_values,
    weight_bytes,
)
from clora.config.settings import DistillConfig
from clora.data.prepare import DataCount, count_data
from clora.devices import find_device, find_dtype
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.models import adapter_for
from clora.models.loading import pipeline_folder, skeleton, with_guidance
from clora.training.student import student_layers


def make_plan(config: DistillConfig) -> dict[str, Any]:
    """Plans a distillation.

    Returns:
        A dictionary that can be written as JSON: ``problems`` (one message each), ``notes`` (likewise, no mistakes)
        and, as far as the pipeline can be read and its passes counted, ``model`` (pipeline, parameters, dtype, layers, student parameters), ``memory`` (bytes by part, ``peak``,
        ``device`` bytes or None), ``disk`` (bytes by part, ``free``), ``passes`` (of one row: rendering, per update,
        total) and ``time`` (measured rate of the device in FLOP/s, seconds at that rate; ``train.minutes`` bounds training).
    """
    problems = find_file_problems(config)
    plan: dict[str, Any] = {}
    notes: list[str] = []
    with problems.catch():
        device = find_device(config.device)
        try:
            plan = _model_plan(config, device, problems, notes)
        except Uncounted as error:
            notes.append(str(error))
    return {"problems": list(dict.fromkeys(problems)), "notes": notes, **plan}


def _model_plan(config: DistillConfig, device: torch.device, problems: Problems, notes: list[str]) -> dict[str, Any]:
    dtype = find_dtype(config.dtype, device)
    folder = pipeline_folder(config.pipeline)
    pipeline = skeleton(str(folder), dtype)
    transformer = getattr(pipeline, "transformer", None)
    if getattr(transformer, "_repeated_blocks", None):  # before the adapter, which may refuse a size
        shapes = linear_shapes(transformer)
        found, ranks = find_layer_problems(config, transformer, shapes)
        problems += found
    adapter = adapter_for(
        pipeline, config.data.size, config.data.max_sequence_length, config.sampler.guidance_embedding
    )
    config = with_guidance(config, adapter)
    problems += find_prompt_problems(config, adapter)
    student = student_layers(transformer, config.student.targets)
    facts = Facts(
        transformer=weight_bytes(transformer, folder / "transformer"),
        encoders=sum(
            weight_bytes(part, folder / name)
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module) and name != "transformer"
        ),
        dtype=dtype,
        shapes=shapes,
        student=student,
        teachers=ranks,
        blocks=count_blocks(transformer),
        cost=pass_cost(adapter, student, config.student.rank, text_shape(adapter)),
    )
    try:
        data = count_data(config, adapter.text_sees_image)
    except CloraError:  # among the problems
        notes.append("what is encoded and rendered is not counted: pictures or instructions cannot be read")
        data = DataCount(0, 0, 0)
    source = adapter.latent_shape[1] * source_rows(adapter)
    encoded = (
        data.prompts * prod(text_shape(adapter)) + data.sources * source + data.renders * prod(adapter.latent_shape)
    )
    model = {
        "pipeline": type(pipeline).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": len(student),
        "student_parameters": trained_values(facts, config.student.rank),
        "tokens": num_tokens(adapter),
    }
    return {"model": model} | _estimates(config, facts, encoded, data.renders, device, problems)


def _estimates(
    config: DistillConfig, facts: Facts, encoded: int, pictures: int, device: torch.device, problems: Problems
) -> dict[str, Any]:
    parts, files = memory(facts, config), disk(facts, config, encoded)
    free, available = shutil.disk_usage(_existing(Path(config.output))).free, device_memory(device)
    if available is not None and peak(parts) > available:
        problems.append(_too_large(parts, available, config))
    if sum(files.values()) > free:
        problems.append(f"output {config.output}: needs about {_size(sum(files.values()))}, free are {_size(free)}")
    sampler, train = config.sampler, config.train
    rendering = pictures * sampler.teacher_steps * sampler.passes_per_teacher_step
    anchoring = round(config.anchor_share * train.updates)
    training = anchoring * anchoring_passes(config) + (train.updates - anchoring) * forward_passes(config)
    rate = measure_rate(device, facts.dtype)
    seconds = facts.cost.flops / rate
    total = rendering + (training if train.minutes is None else min(training, 60 * train.minutes / seconds))
    return {
        "memory": {**parts, "peak": peak(parts), "device": available},
        "rows": {
            "with gradient": rows_with_gradient(config),
            "scoring": scoring_rows(config),
            "rendering": rendering_rows(config),
        },
        "disk": {**files, "free": free},
        "passes": {
            "rendering": rendering,
            "anchoring update": anchoring_passes(config),
            "update": forward_passes(config),
            "all": total,
        },
        "time": {
            "device": str(device),
            "flops_per_second": rate,
            "anchoring_update": seconds * anchoring_passes(config),
            "update": seconds * forward_passes(config),
            "rendering": seconds * rendering,
            "minutes": train.minutes,
            "all": seconds * total,
        },
    }


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _too_large(parts: Mapping[str, int], available: int, config: DistillConfig) -> str:
    advice = [
        None if config.train.gradient_checkpointing else "train.gradient_checkpointing=true",
        f"train.gradient_rows below {rows}" if (rows := rows_with_gradient(config)) > 1 else None,
        f"train.forward_rows below {rows}" if (rows := max(scoring_rows(config), rendering_rows(config))) > 2 else None,
        f"student.rank below {config.student.rank}",
        "train.teacher_memory_gb" if config.train.teacher_memory_gb is None else None,
        "train.optimizer_bits=8" if config.train.optimizer_bits == 32 else None,
    ]
    return (
        f"device memory: about {_size(peak(parts))} are needed, the device has {_size(available)}; the largest part is "
        f"{max(parts, key=lambda name: parts[name])}. Try {', '.join(filter(None, advice))}"
    )


def _size(count: float) -> str:
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _parameters(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} B parameters"
    return f"{count / 1e6:.1f} M parameters" if count >= 1e6 else f"{count / 1e3:.1f} K parameters"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def render(plan: Mapping[str, Any]) -> Group:
    """Lays out a plan for the terminal."""
    tables = [_table(title, rows) for title, rows in _sections(plan)] if "model" in plan else []
    found = plan["problems"]
    heading = f"{len(found)} problem{'s' * (len(found) != 1)}" if found else "no problem found"
    tables += [Text(note, style="yellow") for note in plan["notes"]]
    lines = [Text(heading, style="bold red" if found else "bold green"), *(Text(f"- {text}") for text in found)]
    return Group(*tables, *lines)


def _all_of(time: Mapping[str, Any]) -> str:
    """What bounds the training: its updates, or its minutes."""
    return "all" if time["minutes"] is None else f"all, train.minutes = {time['minutes']:g}"


def _table(title: str, rows: list[tuple[str, str]]):
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _sections(plan: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    model, passes, time = plan["model"], plan["passes"], plan["time"]
    size = {name: "unknown" if value is None else _size(value) for name, value in plan["memory"].items()}
    trained = [
        ("pipeline", model["pipeline"]),
        ("transformer", f"{_parameters(model['parameters'])}, {model['dtype']}"),
        ("student", f"{_parameters(model['student_parameters'])} on {model['layers']} layers"),
        ("tokens of a row", f"{model['tokens']}"),
        ("rows of a pass", ", ".join(f"{count} {what}" for what, count in plan["rows"].items())),
    ]
    before = ("encoders", "rendering")
    memory_rows = [(f"{name}, before the others", size.pop(name)) for name in before] + list(size.items())
    rows = [
        ("rendering of targets", f"{passes['rendering']:.4g} passes", time["rendering"]),
        ("update while anchoring", f"{passes['anchoring update']:.4g} passes", time["anchoring_update"]),
        ("update after it", f"{passes['update']:.4g} passes", time["update"]),
        (_all_of(time), f"{passes['all']:.4g} passes", time["all"]),
    ]
    rate = f"{time['flops_per_second'] / 1e12:.3g} TFLOP/s of a matrix product, measured on {time['device']}"
    return [
        ("what is trained", trained),
        ("device memory", memory_rows),
        ("disk", [(name, _size(value)) for name, value in plan["disk"].items()]),
        (
            f"passes of one row, and time at {rate}; all else comes on top",
            [(name, f"{count}, {_duration(seconds)}") for name, count, seconds in rows],
        ),
    ]
