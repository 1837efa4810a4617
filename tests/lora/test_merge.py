"""Merges: PEFT's on bare layers equals PEFT's on the model; the factored SVD equals the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from clora.errors import CloraError
from clora.lora.algebra import MERGE_METHODS, merge_states, sum_svd
from clora.lora.save import save_peft_folder
from clora.lora.state import LoRAModule, LoRAState

ATTENTION = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]


@pytest.fixture
def states(random_state):
    """Three LoRAs of different ranks; the last lacks most modules."""
    return [random_state(0, (2, 3)), random_state(1, (4,)), random_state(2, (5,), ATTENTION)]


def with_zeros(state, targets):
    """The state with its missing modules written out as zeros."""
    zeros = {name: LoRAModule(torch.zeros(1, inner), torch.zeros(out, 1)) for name, (out, inner) in targets.items()}
    return LoRAState({name: state.modules.get(name, zero) for name, zero in zeros.items()})


def dense_sum(states, weights, name):
    parts = [w * state.modules[name].delta() for state, w in zip(states, weights, strict=True) if name in state.modules]
    return sum(parts)


def truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_merge_states_equals_peft_on_the_model(tmp_path, transformer, targets, states, method):
    weights = [1.0, 0.5, 2.0]
    merged = merge_states(states, targets, method, rank=4, weights=weights)
    for index, state in enumerate(states):
        save_peft_folder(state, tmp_path / str(index))
    model = PeftModel.from_pretrained(copy.deepcopy(transformer), tmp_path / "0", adapter_name="0")
    for name in ("1", "2"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    model.base_model.add_weighted_adapter(
        ["0", "1", "2"], weights, "merged", combination_type=method, svd_rank=4, density=0.5
    )
    assert set(merged.modules) == set(targets)
    for name, module in merged.modules.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("merged")
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_missing_modules_count_as_zero(targets, states, method, assert_same_deltas):
    written_out = [*states[:2], with_zeros(states[2], targets)]
    assert_same_deltas(
        merge_states(states, targets, method, rank=4), merge_states(written_out, targets, method, rank=4), atol=1e-5
    )


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_merge_states_is_seeded(targets, states, method, assert_same_deltas):
    before = torch.random.get_rng_state()
    first = merge_states(states, targets, method, rank=3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert_same_deltas(merge_states(states, targets, method, rank=3, seed=7), first)
    assert first.max_rank == 3
    assert all(torch.isfinite(m.delta()).all() for m in first.modules.values())


def test_sum_svd_is_the_truncated_sum(targets, states):
    weights = [1.0, -0.5, 2.0]
    merged = sum_svd(states, rank=4, weights=weights)
    assert set(merged.modules) == set(targets)
    for name, module in merged.modules.items():
        expected = truncated(dense_sum(states, weights, name), 4)
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.lora_A.norm(dim=1), module.lora_B.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_sum_svd_of_full_rank_is_exact(states):
    merged = sum_svd(states, rank=64)
    for name, module in merged.modules.items():
        torch.testing.assert_close(module.delta(), dense_sum(states, [1.0] * 3, name), rtol=1e-4, atol=1e-5)


def test_bad_arguments(targets, states):
    with pytest.raises(CloraError, match="did you mean 'ties_svd'"):
        merge_states(states, targets, "tie_svd", rank=4)
    with pytest.raises(CloraError, match="no linear layer"):
        merge_states(states, {"x_embedder": targets["x_embedder"]}, "svd", rank=4)
    with pytest.raises(CloraError, match="2 weights for 3"):
        sum_svd(states, rank=4, weights=[1.0, 1.0])
    with pytest.raises(CloraError, match="at least one LoRA"):
        sum_svd([], rank=4)
    with pytest.raises(CloraError, match="at least 1, found 0"):
        sum_svd(states, rank=0)
