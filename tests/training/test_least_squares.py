"""The student's start by least squares, against dense solutions in fp64 on what single passes see."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.trainers import plain_velocity, same, stop_at

from clora.bank.pages import stack_bytes
from clora.bank.slots import ranks_of
from clora.data.batches import GENERAL
from clora.errors import CloraError
from clora.flow.matching import add_noise
from clora.lora.algebra import least_squares
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning
from clora.testing import merge_lora, random_data, random_lora, random_teachers, tiny_config
from clora.training import least_squares as module
from clora.training.least_squares import _batches, layer_groups, least_squares_start, start_rows
from clora.training.resume import Checkpoints
from clora.training.student import first_student, train_student

TO_Q, TO_OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out"
FULL = 512
"""A rank that nothing is cut to."""


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 5)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)


def job(adapter, teachers, rank=FULL, general=True, **sections):
    """The arguments of a start."""
    config = tiny_config(list(teachers), student={"rank": rank, "init": "least_squares"}, **sections)
    data = random_data(adapter, list(teachers))
    if not general:
        data = replace(data, general_pairs=data.general_pairs[:0])
    else:
        targets = torch.randn(
            len(data.general_pairs), *adapter.latent_shape, generator=torch.Generator().manual_seed(1)
        )
        data = replace(data, general_targets=targets)
    return config, adapter, teachers, data, block_layers(adapter.pipeline.transformer)


def inputs_of(config, adapter, teachers, data, layers):
    """What torch's own hooks see of each layer, as (effect, x [N, in] fp64) of passes of merged transformers, row by row."""
    seen = {layer: [] for layer in layers}
    for effect, rows, sigma, noise in _batches(config, data, *start_rows(config, data.general_targets is not None)):
        teacher = None if effect == GENERAL else list(teachers.values())[effect]
        merged = merge_lora(adapter.pipeline.transformer, teacher)
        for layer in layers:
            merged.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, own=seen[layer], effect=effect: own.append((effect, args[0].flatten(0, -2).double()))
            )
        for i in range(len(sigma)):
            x = add_noise(rows.target[i : i + 1], noise[i : i + 1], sigma[i : i + 1])
            conditioning = Conditioning(data.text[rows.student[i : i + 1]], rows.source[i : i + 1])
            plain_velocity(adapter, merged, x, sigma[i : i + 1], conditioning)
    return seen


def dense(teachers, inputs, layer, ridge=1e-2):
    """The matrix [out, in] that minimises the squared errors on these inputs and on the ridge's, and all these: [N + in, in]."""
    states = list(teachers.values())
    shape = next(state.modules[layer].delta().shape for state in states if layer in state.modules)
    wanted = []
    for effect, x in inputs:
        changes = effect != GENERAL and layer in states[effect].modules
        delta = states[effect].modules[layer].delta().double() if changes else torch.zeros(shape, dtype=torch.float64)
        wanted.append(x @ delta.T)
    x = torch.cat([x for _, x in inputs])
    mean = x.square().sum(0).mean()
    penalty = (ridge * mean).sqrt() * torch.eye(shape[1], dtype=torch.float64)
    y = torch.cat([*wanted, torch.zeros(shape[1], shape[0], dtype=torch.float64)])
    x = torch.cat([x, penalty])
    return torch.linalg.lstsq(x, y).solution.T, x


@pytest.mark.parametrize("general", [True, False])
def test_every_layer_is_the_dense_solution(adapter, general):
    """Of teachers of several ranks; the second one leaves most layers as they are."""
    arguments = job(adapter, random_teachers(adapter.pipeline.transformer, 3), general=general)
    found = least_squares_start(*arguments)
    inputs = inputs_of(*arguments)
    assert set(found.modules) == set(arguments[-1])
    for layer, own in inputs.items():
        expected, _ = dense(arguments[2], own, layer)
        torch.testing.assert_close(found.modules[layer].delta().double(), expected, rtol=1e-3, atol=1e-4)


def test_one_teacher_is_found_again(adapter, monkeypatch):
    """On its inputs it is the solution whatever they are, but for the ridge."""
    monkeypatch.setattr(module, "least_squares", lambda *a: least_squares(*a, ridge=1e-9))
    teachers = {"only": random_lora(adapter.pipeline.transformer, 3, 7)}
    arguments = job(adapter, teachers, rank=4, general=False)
    found = least_squares_start(*arguments)
    for layer, own in inputs_of(*arguments).items():
        x = torch.cat([x for _, x in own])
        wanted = x @ teachers["only"].modules[layer].delta().double().T
        torch.testing.assert_close(x @ found.modules[layer].delta().double().T, wanted, rtol=1e-3, atol=1e-3)
        assert found.modules[layer].rank == 3


def test_the_cut_keeps_what_changes_the_inputs_most(adapter):
    teachers = random_teachers(adapter.pipeline.transformer, 3)
    arguments = job(adapter, teachers, rank=2)
    found = least_squares_start(*arguments)
    generator = torch.Generator().manual_seed(0)
    for layer, own in inputs_of(*arguments).items():
        full, x = dense(teachers, own, layer)
        values = torch.linalg.svdvals(x @ full.T)
        error = (x @ (found.modules[layer].delta().double() - full).T).norm()
        assert found.modules[layer].rank == 2
        torch.testing.assert_close(error, values[2:].norm(), rtol=1e-3, atol=1e-5)  # the least that two ranks can have
        U, S, Vh = torch.linalg.svd(full)  # cut by the weights' own norm it is worse
        by_weight = U[:, :2] @ (S[:2, None] * Vh[:2])
        assert error <= (x @ (by_weight - full).T).norm() * (1 + 1e-6)
        for _ in range(20):
            other = found.modules[layer].delta().double()
            other = other + 0.01 * other.norm() * random_rank(*other.shape, 2, generator)
            U, S, Vh = torch.linalg.svd(other)
            assert error < (x @ (U[:, :2] @ (S[:2, None] * Vh[:2]) - full).T).norm()


def random_rank(rows, columns, rank, generator):
    """A random matrix of this rank and of norm 1."""
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    product = draw(rows, rank) @ draw(rank, columns)
    return product / product.norm()


def test_layers_that_no_teacher_changes_are_left_out(adapter):
    transformer = adapter.pipeline.transformer
    teachers = {"a": random_lora(transformer, 2, 1, [TO_Q]), "b": random_lora(transformer, 2, 2, [TO_Q, TO_OUT])}
    arguments = job(adapter, teachers)
    found = least_squares_start(*arguments)
    assert set(found.modules) == {TO_Q, TO_OUT}
    inputs = inputs_of(*arguments)
    for layer in found.modules:
        expected, _ = dense(teachers, inputs[layer], layer)
        torch.testing.assert_close(found.modules[layer].delta().double(), expected, rtol=1e-3, atol=1e-4)
    config, adapter, teachers, data, _ = arguments
    student = first_student(
        tiny_config(["a", "b"], student={"rank": 3, "init": "least_squares"}), adapter, teachers, data
    )
    assert {m.rank for m in student.modules.values()} == {3}
    assert all(m.lora_A.any(dim=1).all() for m in student.modules.values()), "a rank of zeros never learns"
    assert {layer for layer, m in student.modules.items() if m.delta().any()} == {TO_Q, TO_OUT}


def test_a_layer_that_no_pass_calls_stays_fresh(adapter):
    """As one beside a fused projection would."""
    transformer = copy.deepcopy(adapter.pipeline.transformer)
    transformer.transformer_blocks[0].spare = torch.nn.Linear(8, 8)
    own = copy.copy(adapter)
    own.pipeline = copy.copy(adapter.pipeline)
    own.pipeline.transformer = transformer
    config, _, teachers, data, _ = job(adapter, {"a": random_lora(transformer, 2, 1)}, rank=4)
    student = first_student(config, own, teachers, data)
    assert not student.modules["transformer_blocks.0.spare"].delta().any()
    assert student.modules[TO_Q].delta().any()


def test_the_seed_decides_and_rows_groups_and_pages_do_not(adapter, monkeypatch):
    transformer = adapter.pipeline.transformer
    teachers = {name: random_lora(transformer, 2, i, [TO_Q, TO_OUT]) for i, name in enumerate("abc")}
    first = least_squares_start(*job(adapter, teachers, rank=4))
    assert same(first, least_squares_start(*job(adapter, teachers, rank=4)))
    assert not same(first, least_squares_start(*job(adapter, teachers, rank=4, seed=1)))
    passes = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *a: passes.append(a[-1].effect) or run(*a))
    with monkeypatch.context() as patch:
        patch.setattr(module, "free_memory", lambda device: 1)
        assert same(first, least_squares_start(*job(adapter, teachers, rank=4)))
    assert passes == 2 * [0, 0, 1, 1, 2, 2, *[GENERAL] * 5], (
        "3 rows at once: 5 of each effect, 15 of the general stream"
    )
    pair = 2.2e-9 * stack_bytes(linear_shapes(transformer), ranks_of(teachers["a"]), torch.float32)
    for train in ({"forward_rows": 2}, {"teacher_memory_gb": pair}):
        found = least_squares_start(*job(adapter, teachers, rank=4, train=train))
        for layer, update in found.modules.items():
            torch.testing.assert_close(update.delta(), first.modules[layer].delta(), rtol=1e-3, atol=1e-4)


def test_groups_of_layers_fit_half_of_the_free_memory():
    sizes = {"a": 3, "b": 2, "c": 9, "d": 1, "e": 1}
    assert layer_groups(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert layer_groups(sizes, None) == [["a", "b", "c", "d", "e"]]
    assert layer_groups({}, 10) == []


@pytest.mark.parametrize(("probability", "general"), [(0.75, 5), (0.5, 15), (0.2, 15), (1.0, 0)])
def test_general_rows_have_their_share(probability, general):
    config = tiny_config(["a", "b", "c"], objective={"switch_probability": probability})
    assert start_rows(config, True) == (5, general)
    assert start_rows(config, False) == (5, 0)
    assert start_rows(tiny_config(["a"], objective={"dual_stream": False}), True) == (5, 0)


def test_layers_that_are_called_as_they_are_have_the_same_inputs(adapter):
    """Quantised or hooked ones (`clora.bank.routing.is_plain`)."""
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    plain = least_squares_start(*job(adapter, teachers, rank=4))
    own = copy.copy(adapter)
    own.pipeline = copy.copy(adapter.pipeline)
    own.pipeline.transformer = copy.deepcopy(adapter.pipeline.transformer)
    called = []
    own.pipeline.transformer.get_submodule(TO_Q).register_forward_hook(lambda *_: called.append(1))
    found = least_squares_start(*job(own, teachers, rank=4))
    assert len(called) == 2 * 2 + 4
    for layer, update in found.modules.items():
        torch.testing.assert_close(update.delta(), plain.modules[layer].delta(), rtol=1e-3, atol=1e-4)


def test_a_transformer_in_16_bits_has_moments_in_32(adapter):
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    exact = least_squares_start(*job(adapter, teachers))
    own = copy.copy(adapter)
    own.pipeline = copy.copy(adapter.pipeline)
    own.pipeline.transformer = copy.deepcopy(adapter.pipeline.transformer).to(torch.bfloat16)
    found = least_squares_start(*job(own, teachers))
    inputs = inputs_of(*job(adapter, teachers))
    for layer, update in found.modules.items():
        assert update.lora_A.dtype == update.lora_B.dtype == torch.float32
        x = torch.cat([x for _, x in inputs[layer]])
        expected = x @ exact.modules[layer].delta().double().T
        assert (x @ update.delta().double().T - expected).norm() < 0.1 * expected.norm()


def test_a_pass_that_is_not_finite_names_its_effect(adapter):
    config, adapter, teachers, data, layers = job(adapter, random_teachers(adapter.pipeline.transformer, 2))
    data.targets[1] = torch.nan
    with pytest.raises(CloraError, match=r"least_squares: effect 'effect_1' gives values that are not finite"):
        least_squares_start(config, adapter, teachers, data, layers)
    data.targets[1] = 0
    data.general_targets[:] = torch.nan
    with pytest.raises(CloraError, match="the base, in the general stream"):
        least_squares_start(config, adapter, teachers, data, layers)


def test_a_run_that_goes_on_fits_nothing(adapter, tmp_path, monkeypatch):
    """Stopped before its first checkpoint it fits again; the result is that of a run that was not stopped."""
    fitted = []
    monkeypatch.setattr(
        "clora.training.student.least_squares_start", lambda *a: fitted.append(1) or least_squares_start(*a)
    )
    train = {"updates": 3, "checkpoint_every": 1}

    def run(checkpoints=None) -> LoRAState:
        config, _, teachers, data, _ = job(
            adapter, random_teachers(adapter.pipeline.transformer, 2), rank=4, train=train
        )
        return train_student(config, adapter, teachers, data, lambda u, v: None, checkpoints)

    expected = run()
    for update in (0, 2):
        with monkeypatch.context() as patch:
            stop_at(update, patch)
            with pytest.raises(KeyboardInterrupt):
                run(Checkpoints(tmp_path))
    assert len(fitted) == 3
    assert same(run(Checkpoints(tmp_path)), expected)
    assert len(fitted) == 3
