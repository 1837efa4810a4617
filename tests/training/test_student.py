"""The student's start and its layers; training leaves nothing else behind."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from helpers.trainers import same

from clora.bank.bank import RoutedLinear
from clora.errors import CloraError
from clora.lora.algebra import sum_svd
from clora.testing import random_data, random_lora, random_teachers, tiny_config
from clora.training.student import initial_student, train_student


@pytest.mark.parametrize("init", ["zero", "merge"])
def test_one_effect_is_distilled_too(adapter, init):
    transformer = adapter.pipeline.transformer
    teachers = {"only": random_lora(transformer, 2, 0, ["transformer_blocks.0.attn.to_q"])}
    config = tiny_config(["only"], student={"init": init})
    before = initial_student(config, transformer, list(teachers.values()))
    reports = []
    state = train_student(config, adapter, teachers, random_data(adapter, ["only"]), lambda u, v: reports.append(v))
    assert len(reports) == 2
    assert all(torch.isfinite(m.delta()).all() for m in state.modules.values())
    assert {m.rank for m in state.modules.values()} == {4}
    assert not same(state, before)
    assert not any(isinstance(module, RoutedLinear) for module in transformer.modules())


def test_a_run_returns_what_is_to_be_exported(adapter):
    states = {}
    for export in ("student", "ema"):
        teachers = random_teachers(adapter.pipeline.transformer, 1)
        config = tiny_config(["effect_0"], train={"ema_decay": 0.5, "export": export})
        states[export] = train_student(config, adapter, teachers, random_data(adapter, ["effect_0"]), lambda u, v: None)
    assert not same(states["student"], states["ema"])


@pytest.mark.parametrize("padding", [0, 4])
def test_the_student_starts_at_zero_or_at_the_mean_of_the_teachers(adapter, padding):
    transformer = adapter.pipeline.transformer
    teachers = [state.padded(state.max_rank + padding) for state in random_teachers(transformer, 2).values()]
    zero = initial_student(tiny_config(["a", "b"]), transformer, teachers)
    assert all(not module.delta().any() and module.lora_A.any() for module in zero.modules.values())
    merge = initial_student(tiny_config(["a", "b"], student={"init": "merge", "rank": 6}), transformer, teachers)
    mean = sum_svd(teachers, 6, [0.5, 0.5])
    for name, module in merge.modules.items():
        expected = sum(t.modules[name].delta() for t in teachers if name in t.modules) / 2
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)  # rank 2 + 3 fits in 6
        torch.testing.assert_close(module.delta(), mean.modules[name].delta(), rtol=1e-4, atol=1e-5)
        assert (module.lora_A.abs().sum(1) > 0).all(), "a rank with lora_A = lora_B = 0 never learns"


def test_layers_of_the_student(adapter):
    transformer = adapter.pipeline.transformer
    teachers = random_teachers(transformer, 1)
    config = tiny_config(["effect_0"], student={"targets": ("attn.to_q", "attn.to_k")})
    state = train_student(config, adapter, teachers, random_data(adapter, ["effect_0"]), lambda u, v: None)
    assert set(state.modules) == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"}
    wrong = tiny_config(["effect_0"], student={"targets": ("attn.to_x",)})
    with pytest.raises(CloraError, match=r"student\.targets.*attn\.to_x"):
        initial_student(wrong, transformer, list(teachers.values()))


def test_teachers_are_not_held_twice(adapter):
    """Only the bank has them while it trains."""
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    held = [weakref.ref(module.lora_A) for state in teachers.values() for module in state.modules.values()]
    alive = []
    data = random_data(adapter, list(teachers))
    config = tiny_config(list(teachers))
    train_student(config, adapter, teachers, data, lambda u, v: alive.append(sum(ref() is not None for ref in held)))
    assert alive
    assert not any(alive)


def test_a_failed_run_leaves_the_transformer_as_it_was(adapter):
    teachers = random_teachers(adapter.pipeline.transformer, 1)
    data = random_data(adapter, ["effect_0"])
    data = dataclasses.replace(data, targets=data.targets * torch.nan)
    with pytest.raises(CloraError):
        train_student(tiny_config(["effect_0"]), adapter, teachers, data, lambda u, v: None)
    assert not any(isinstance(module, RoutedLinear) for module in adapter.pipeline.transformer.modules())
