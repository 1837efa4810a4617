"""The steps of an update never make the host wait for the device; only their readings do, once."""

from __future__ import annotations

import copy

import pytest
import torch
from host_waits import DEVICE, host_waits
from trainers import make_trainer

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
    table, rows = torch.zeros(3, 2, device=DEVICE), torch.tensor([0, 2])
    with host_waits() as waits:
        table[rows]
        torch.zeros(3).to(DEVICE)
        torch.zeros(3).to(table)
        table.copy_(torch.zeros(3, 2))
        torch.tensor([1], device=DEVICE)
        table * torch.tensor(2.0)
        torch.zeros(3).to(DEVICE, non_blocking=True)
        torch.zeros(3, device=DEVICE)
    assert len(waits) == 5, waits
    for read in (bool, float, torch.Tensor.tolist, torch.nonzero, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(table[0, 0])


@pytest.mark.parametrize(
    ("pages", "train"), [(None, {}), (2, {"optimizer": "muon", "forward_rows": 3})], ids=["resident", "paged"]
)
def test_an_update(parts, pages, train):
    adapter, data = parts
    with make_trainer(adapter, data, pages, train=train) as trainer:
        for matching in (False, True):
            trainer.anchor_share = 0.0 if matching else 1.0
            trainer._iterate(0.5)  # states of the optimizers are made
            with host_waits() as waits:
                readings = trainer._iterate(0.5)
            assert waits == []
            assert {value.device for value in readings.values.values()} == {DEVICE}
            assert {fault.happened.device for fault in readings.faults} == {DEVICE}
