"""The optimizers, and their states in a checkpoint."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from clora.errors import CloraError
from clora.training.checkpoint import load_state, save_state
from clora.training.optimizers import make_average, make_optimizer

SIZE = (1, 64, 128)  # bitsandbytes leaves states of less than 4096 numbers in 32 bits
eight_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, generator=generator).requires_grad_() for _ in range(2)]


def step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(SIZE, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "bits"), [("adamw", 32), ("muon", 32), ("muon", 8), pytest.param("adamw", 8, marks=eight_bits)]
)
def test_a_restored_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, name, bits):
    parameters = start()
    optimizer = make_optimizer(name, parameters, 0.1, bits)
    for seed in (1, 2):
        step(parameters, optimizer, seed)
    tensors = {str(i): parameter for i, parameter in enumerate(parameters)}
    save_state(tmp_path / "state.safetensors", tensors, {"it": optimizer}, torch.Generator(), {})
    step(parameters, optimizer, 3)
    again = start()
    restored = make_optimizer(name, again, 0.1, bits)
    tensors, _ = load_state(tmp_path / "state.safetensors", {"it": restored}, torch.Generator())
    for i, parameter in enumerate(again):
        parameter.data.copy_(tensors[str(i)])
    step(again, restored, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, parameters, strict=True))
    kinds = [[{k: type(v) for k, v in state.items()} for state in o.state.values()] for o in (optimizer, restored)]
    assert kinds[0] == kinds[1], "a count is a number again, not a tensor"
    forgetful = start()
    other = make_optimizer(name, forgetful, 0.1, bits)
    for i, parameter in enumerate(forgetful):
        parameter.data.copy_(tensors[str(i)])
    step(forgetful, other, 3)
    assert not torch.equal(forgetful[0], parameters[0]), "the state changes nothing here"


@pytest.mark.parametrize(("name", "bits"), [("adamw", 32), ("muon", 32), pytest.param("adamw", 8, marks=eight_bits)])
def test_weight_decay_is_decoupled(name, bits):
    """Factors shrink by learning rate times decay, apart from the step that the gradient makes."""
    plain, decayed = start(), start()
    step(plain, make_optimizer(name, plain, 0.1, bits), 1)
    step(decayed, make_optimizer(name, decayed, 0.1, bits, weight_decay=0.5), 1)
    for before, without, with_decay in zip(start(), plain, decayed, strict=True):
        torch.testing.assert_close(with_decay, without - 0.1 * 0.5 * before)


def test_the_average_is_that_of_its_definition():
    (parameter, _), decay = start(), 0.4
    average, expected = make_average([parameter], decay), parameter.detach().clone()
    for k in range(6):
        with torch.no_grad():
            parameter.add_(1.0)
        average.step([parameter])
        d = min(decay, (1 + k) / (10 + k)) if k else 0.0
        expected = d * expected + (1 - d) * parameter.detach()
        torch.testing.assert_close(average.shadow_params[0], expected)
    assert make_average([parameter], None) is None


@eight_bits
def test_states_of_8_bits_follow_those_of_32(tmp_path):
    found = []
    for bits in (32, 8):
        parameters = start()
        optimizer = make_optimizer("adamw", parameters, 0.01, bits)
        for seed in range(20):
            step(parameters, optimizer, seed)
        found.append(torch.cat(parameters).detach() - torch.cat(start()).detach())
    exact, eight = found
    assert 0 < (eight - exact).norm() < 0.1 * exact.norm()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(value.numel() for value in states if value.dtype == torch.uint8) == 2 * 2 * parameters[0].numel()


def test_without_bitsandbytes_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        CloraError, match=r"optimizer_bits: 8 needs bitsandbytes; pip install bitsandbytes, or choose 32"
    ):
        make_optimizer("adamw", start(), 0.1, 8)


@eight_bits
def test_a_device_that_bitsandbytes_cannot_use_is_named(monkeypatch):
    def fail(self):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", fail)
    with pytest.raises(CloraError, match=r"cannot train on cpu \(no kernel\)"):
        make_optimizer("adamw", start(), 0.1, 8)
