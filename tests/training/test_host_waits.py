"""The steps of an update never make the host wait for the device; only the reading of their checks does, once."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from helpers.host_waits import DEVICE, host_waits
from helpers.trainers import make_trainer

from clora.models import adapter_for
from clora.testing import MAX_SEQUENCE_LENGTH, SIZE, random_data


@pytest.fixture
def parts(adapter):
    """An adapter whose transformer is on the device, and data on the CPU."""
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    pipeline = copy.deepcopy(adapter.pipeline)
    pipeline.transformer.to(DEVICE)
    return adapter_for(pipeline, SIZE, MAX_SEQUENCE_LENGTH), data


def test_what_waits_is_found():
    table, rows, number = torch.zeros(3, 2, device=DEVICE), torch.tensor([0, 2]), torch.tensor(2.0)
    waiting = (
        lambda: table[rows],
        lambda: table[torch.tensor([True, False, True])],
        lambda: table[[0, 2]],
        lambda: table[:, [1]].zero_(),
        lambda: torch.zeros(3).to(DEVICE),
        lambda: torch.zeros(3).to(table),
        lambda: table.copy_(torch.zeros(3, 2)),
        lambda: torch.tensor([1], device=DEVICE),
        lambda: table.new_tensor([1]),
        lambda: torch.where(table > 0, number, table),
    )
    free = (
        lambda: table * number,
        lambda: torch.where(table > 0, 2.0, table),
        lambda: table[0],
        lambda: torch.as_tensor(table),
        lambda: torch.zeros(3).to(DEVICE, non_blocking=True),
        lambda: torch.zeros(3, device=DEVICE),
    )
    for call, count in [*((call, 1) for call in waiting), *((call, 0) for call in free)]:
        with host_waits() as waits:
            call()
        assert len(waits) == count, (inspect.getsource(call), waits)
    for read in (bool, float, torch.Tensor.tolist, torch.nonzero, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(table[0, 0])


@pytest.mark.parametrize(
    ("pages", "train"),
    [(None, {}), (2, {"optimizer": "muon", "gradient_rows": 2, "forward_rows": 3})],
    ids=["resident", "paged"],
)
def test_an_update(parts, pages, train):
    adapter, data = parts
    with make_trainer(adapter, data, pages, train={"critic_ratio": 1, "ema_decay": 0.9, **train}) as trainer:
        for matching in (False, True):
            trainer.anchor_share = 0.0 if matching else 1.0
            with host_waits() as waits:
                checks = trainer._iterate(0.5)
                trainer.average.step(trainer.student.parameters())
            assert waits == []
            for check in checks:
                read = (*check.values.values(), check.nonfinite, check.gradient_norm, check.strength)
                assert {tensor.device for tensor in read} == {DEVICE}
