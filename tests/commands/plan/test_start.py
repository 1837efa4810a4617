"""What `clora plan` counts of a least-squares start, against one that runs."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from clora.commands.plan import needs
from clora.commands.plan.make import make_plan, render
from clora.data.prepare import encode_data
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.load import read_lora
from clora.models.loading import load_pipeline, with_guidance
from clora.testing import random_teachers, tiny_adapter, tiny_pipeline
from clora.training import least_squares as module
from clora.training.least_squares import Moments, least_squares_start

STUDENT = {"rank": 4, "init": "least_squares"}


def shown(plan):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(plan))
    return capture.get()


def test_its_passes_are_those_of_a_run(job, tiny_folder, monkeypatch):
    config = job(student=STUDENT, data={"general_targets": 5})
    plan = make_plan(config)
    passes = plan["passes"]
    adapter = tiny_adapter(load_pipeline(str(tiny_folder), "cpu"))
    config = with_guidance(config, adapter)
    shapes = linear_shapes(adapter.pipeline.transformer)
    teachers = {effect.name: read_lora(effect.lora, shapes) for effect in config.effects}
    data = encode_data(config, adapter, teachers)
    layers = block_layers(adapter.pipeline.transformer)
    products = []  # which the counter passes over, since they are added in place
    add = Moments.add
    monkeypatch.setattr(
        Moments, "add", lambda own, effect, x: products.append(2 * x.numel() * x.shape[-1]) or add(own, effect, x)
    )
    with FlopCounterMode(display=False) as counter:
        least_squares_start(config, adapter, teachers, data, layers)
    needed = counter.get_total_flops() + sum(products)
    flops = plan["time"]["rendering"] / passes["rendering"] * plan["time"]["flops_per_second"]
    assert passes["start"] == pytest.approx(needed / flops, rel=0.2)
    assert passes["start"] > 4 * module.ROWS, "two effects, as many general rows, and the moments"
    assert passes["all"] == passes["rendering"] + passes["start"] + 2 * passes["update"]
    assert "least-squares start" in shown(plan)
    assert "start, before the others" in shown(plan)


@pytest.mark.parametrize("init", ["zero", "merge"])
def test_other_starts_cost_nothing(job, init):
    plan = make_plan(job(student={"rank": 4, "init": init}))
    assert plan["passes"]["start"] == plan["time"]["start"] == plan["memory"]["start"] == 0
    assert "start" not in shown(plan)


def test_its_memory_is_that_of_base_teachers_and_moments(job, monkeypatch):
    sizes = []
    monkeypatch.setattr(needs, "start_bytes", lambda facts, config, groups: sizes.append(groups) or 1000)
    parts = make_plan(job(student=STUDENT))["memory"]
    assert parts["start"] > parts["base"] + parts["merged weight"] + 1000
    assert len(sizes[0]) == 1, "all layers of the tiny transformer at once"


def test_a_start_that_needs_more_than_the_device_has_is_a_problem(job, monkeypatch):
    monkeypatch.setattr(needs, "start_bytes", lambda *_: 10**15)
    (problem,) = make_plan(job(student=STUDENT))["problems"]
    assert "the largest part is start. Try " in problem
    assert "student.init=merge" in problem


def test_its_passes_are_repeated_where_memory_is_short(job, monkeypatch):
    plenty = make_plan(job(student=STUDENT))["passes"]["start"]
    monkeypatch.setattr("clora.commands.plan.cost.device_memory", lambda device: 1)
    layers = len(block_layers(tiny_pipeline().transformer))
    assert make_plan(job(student=STUDENT))["passes"]["start"] == plenty + (layers - 1) * 2 * module.ROWS


def test_moments_take_what_is_counted(adapter):
    shapes = linear_shapes(adapter.pipeline.transformer)
    states = random_teachers(adapter.pipeline.transformer, 2).values()
    for layer in block_layers(adapter.pipeline.transformer):
        loras = {i: state.modules[layer] for i, state in enumerate(states) if layer in state.modules}
        moments = Moments(loras, shapes[layer][1], torch.device("cpu"))
        held = [moments.inputs, *moments._lora_A.values(), *moments._changed.values()]
        assert sum(t.nbytes for t in held) == module.moment_bytes(shapes[layer], [m.rank for m in loras.values()])
