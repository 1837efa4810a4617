"""The checks of an update's steps: their numbers, and which fault is reported."""

from __future__ import annotations

import pytest
import torch

from clora.errors import CloraError
from clora.training.faults import LOSSES, StepCheck, raise_first


def check(step, nonfinite=(), norm=1.0, **values):
    """A step of three rows, those in ``nonfinite`` with a loss that is not finite; row 1 is the strongest."""
    flags = torch.tensor([row in nonfinite for row in range(3)])
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    strength = torch.tensor([0.5, 2.0, 1.0])
    return StepCheck(
        step,
        tensors,
        flags,
        torch.tensor(norm),
        torch.tensor(0.0),
        strength,
        "strongest",
        "its rate",
        lambda row: f"row {row}",
    )


def test_the_numbers_of_all_steps_are_read():
    found = raise_first(
        [check("critic", critic=1.0), check("critic", critic=2.0), check("student", loss=3.0, anchor=0.5)]
    )
    losses = {name: found[name] for name in LOSSES if name in found}
    assert losses == {"critic": 2.0, "loss": 3.0, "anchor": 0.5}, "of two with the same name the later one"
    assert found["student_gradient"] == found["critic_gradient"] == 1.0
    assert found["student_change"] == 0.0


def test_they_are_read_in_one_go(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    raise_first([check("critic", critic=1.0), check("student", loss=3.0)])
    assert reads == [(8,)]


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ([check("a"), check("b", nonfinite=(1, 2), norm=torch.nan)], r"b's loss is not finite \(row 1\)"),
        (
            [check("a", norm=torch.inf), check("b", nonfinite=(0,))],
            "a's gradient is not finite; the strongest comes from row 1",
        ),
        ([check("a", nonfinite=(2,)), check("b", nonfinite=(0,))], r"a's loss is not finite \(row 2\)"),
    ],
    ids=["loss before gradient", "gradient before the next step", "first step"],
)
def test_the_first_fault_is_reported(checks, message):
    with pytest.raises(CloraError, match=message):
        raise_first(checks)
