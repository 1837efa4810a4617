"""Rank reduction, errors and merges against dense SVDs, dense norms and PEFT's merges on the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from clora.errors import CloraError
from clora.lora.algebra import (
    MERGE_METHODS,
    balanced,
    merge_states,
    reduce_to_energy,
    reduce_to_rank,
    relative_error,
    stored_as,
    sum_svd,
)
from clora.lora.save import save_lora
from clora.lora.state import LoRAModule, LoRAState

ATTENTION = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]


@pytest.fixture
def state():
    """Modules of ranks 6 and 3 with singular values that fall by half, and one that is zero."""
    generator = torch.Generator().manual_seed(0)

    def module(out, inner, rank):
        u, _ = torch.linalg.qr(torch.randn(out, rank, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(inner, rank, generator=generator))
        return LoRAModule(v.T.contiguous(), u * 2.0 ** -torch.arange(rank))

    zero = LoRAModule(torch.randn(2, 5, generator=generator), torch.zeros(7, 2))
    return LoRAState({"a": module(20, 12, 6), "b": module(9, 30, 3), "zero": zero})


def test_the_best_approximation_of_a_rank(state):
    reduced = reduce_to_rank(state, 4)
    left, values, right = torch.linalg.svd(state.modules["a"].delta().double(), full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(reduced.modules["a"].delta().double(), best, rtol=0, atol=1e-6)
    assert reduced.modules["a"].rank == 4
    assert reduced.modules["b"] is state.modules["b"], "a rank that is low enough stays as it is"


def shares(module):
    """The share of energy that each rank keeps."""
    squares = torch.linalg.svdvals(module.delta().double()).square()
    return squares.cumsum(0) / squares.sum()


@pytest.mark.parametrize("energy", [0.5, 0.76, 0.99, 1.0])
def test_the_lowest_rank_that_keeps_the_energy(state, energy):
    reduced = reduce_to_energy(state, energy, uniform=False)
    for name in ("a", "b"):
        full = shares(state.modules[name])
        rank = reduced.modules[name].rank
        assert full[rank - 1] >= energy - 1e-12
        assert rank == 1 or full[rank - 2] < energy
        lost = relative_error(state.modules[name], reduced.modules[name]) ** 2
        assert lost <= 1 - energy + 1e-9
    assert reduced.modules["zero"].rank == 1
    assert reduced.modules["zero"].delta().abs().max() == 0


def test_a_uniform_rank_is_the_largest_that_a_module_needs(state):
    ranks = {name: m.rank for name, m in reduce_to_energy(state, 0.99, uniform=False).modules.items()}
    uniform = {name: m.rank for name, m in reduce_to_energy(state, 0.99, uniform=True).modules.items()}
    assert ranks == {"a": 4, "b": 3, "zero": 1}  # 1 - 4 ** -4 is above 0.99, 1 - 4 ** -3 is not
    assert uniform == {"a": 4, "b": 3, "zero": 2}, "at most 4, and none above what it had"


@pytest.mark.parametrize("change", [lambda s: reduce_to_rank(s, 0), lambda s: reduce_to_energy(s, 0.0, True)])
def test_nothing_left_to_keep(state, change):
    with pytest.raises(CloraError, match="expected a"):
        change(state)
    with pytest.raises(CloraError, match="at most 1, found 1.5"):
        reduce_to_energy(state, 1.5, uniform=True)


def test_the_error_is_that_of_the_dense_updates(state):
    before, after = state.modules["a"], reduce_to_rank(state, 2).modules["a"]
    expected = (after.delta() - before.delta()).norm() / before.delta().norm()
    assert relative_error(before, after) == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(before, before) < 1e-12
    zero = state.modules["zero"]
    assert (relative_error(zero, zero), relative_error(zero, LoRAModule(zero.lora_A, zero.lora_B + 1))) == (
        0.0,
        float("inf"),
    )


def test_stored_as_is_what_a_reader_finds():
    module = LoRAModule(torch.tensor([[1.0, 1.03]]), torch.tensor([[0.3]]))
    read = stored_as(module, torch.float8_e4m3fn)
    assert (read.lora_A.tolist(), read.lora_B.tolist()) == ([[1.0, 1.0]], [[0.3125]])  # three bits of mantissa
    assert read.lora_A.dtype == torch.float32


def test_balanced_factors_are_the_same_update_and_survive_fp8():
    """A factor of 1e-4 is below the smallest number of fp8."""
    generator = torch.Generator().manual_seed(0)
    module = LoRAModule(torch.randn(3, 40, generator=generator), torch.randn(50, 3, generator=generator) * 1e-4)
    module.lora_A[1] = 0
    even = balanced(module)
    assert torch.equal(even.delta(), module.delta())
    assert relative_error(module, stored_as(module, torch.float8_e4m3fn)) == pytest.approx(1)
    assert relative_error(module, stored_as(even, torch.float8_e4m3fn)) < 0.1


@pytest.fixture
def states(random_state):
    """Three LoRAs of different ranks; the last lacks most modules."""
    return [random_state(0, (2, 3)), random_state(1, (4,)), random_state(2, (5,), ATTENTION)]


def with_zeros(state, shapes):
    """The state with its missing modules written out as zeros."""
    zeros = {name: LoRAModule(torch.zeros(1, inner), torch.zeros(out, 1)) for name, (out, inner) in shapes.items()}
    return LoRAState({name: state.modules.get(name, zero) for name, zero in zeros.items()})


def dense_sum(states, weights, name):
    parts = [w * state.modules[name].delta() for state, w in zip(states, weights, strict=True) if name in state.modules]
    return sum(parts)


def truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_merge_states_equals_peft_on_the_model(tmp_path, transformer, shapes, states, method):
    weights = [1.0, 0.5, 2.0]
    merged = merge_states(states, shapes, method, rank=4, weights=weights)
    for index, state in enumerate(states):
        save_lora(state, tmp_path / str(index), "peft")
    model = PeftModel.from_pretrained(copy.deepcopy(transformer), tmp_path / "0", adapter_name="0")
    for name in ("1", "2"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    model.base_model.add_weighted_adapter(
        ["0", "1", "2"], weights, "merged", combination_type=method, svd_rank=4, density=0.5
    )
    assert set(merged.modules) == set(shapes)
    for name, module in merged.modules.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("merged")
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_missing_modules_count_as_zero(shapes, states, method, assert_same_deltas):
    written_out = [*states[:2], with_zeros(states[2], shapes)]
    merged = [merge_states(given, shapes, method, 4, [1.0] * 3) for given in (states, written_out)]
    assert_same_deltas(*merged, atol=1e-5)


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_merge_states_is_seeded(shapes, states, method, assert_same_deltas):
    before = torch.random.get_rng_state()
    first = merge_states(states, shapes, method, 3, [1.0] * 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert_same_deltas(merge_states(states, shapes, method, 3, [1.0] * 3), first)
    assert first.max_rank == 3
    assert all(torch.isfinite(m.delta()).all() for m in first.modules.values())


def test_sum_svd_is_the_truncated_sum(shapes, states):
    weights = [1.0, -0.5, 2.0]
    merged = sum_svd(states, rank=4, weights=weights)
    assert set(merged.modules) == set(shapes)
    for name, module in merged.modules.items():
        expected = truncated(dense_sum(states, weights, name), 4)
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.lora_A.norm(dim=1), module.lora_B.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_sum_svd_of_full_rank_is_exact(states):
    merged = sum_svd(states, 64, [1.0] * 3)
    for name, module in merged.modules.items():
        torch.testing.assert_close(module.delta(), dense_sum(states, [1.0] * 3, name), rtol=1e-4, atol=1e-5)


def test_merges_refuse_bad_arguments(shapes, states):
    with pytest.raises(CloraError, match="did you mean 'ties_svd'"):
        merge_states(states, shapes, "tie_svd", 4, [1.0] * 3)
    with pytest.raises(CloraError, match="not a linear layer"):
        merge_states(states, {"x_embedder": shapes["x_embedder"]}, "svd", 4, [1.0] * 3)
    with pytest.raises(CloraError, match="2 weights for 3"):
        sum_svd(states, rank=4, weights=[1.0, 1.0])
    with pytest.raises(CloraError, match="at least one LoRA"):
        sum_svd([], 4, [])
    with pytest.raises(CloraError, match="at least 1, found 0"):
        sum_svd(states, 0, [1.0] * 3)
