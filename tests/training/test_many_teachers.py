"""An update costs the same whatever the number of teachers: only those of its batch are computed with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clora.bank.bank import AdapterBank
from clora.testing import random_data, random_lora, tiny_config
from clora.training.faults import raise_first
from clora.training.steps import CRITIC
from clora.training.trainer import DistillTrainer


class Operators(TorchDispatchMode):
    """Counts operators by name and by the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.seen[str(function), shapes] += 1
        return result


def operators_of_updates(adapter, count, pages, monkeypatch):
    """Those of an anchoring and a matching update whose effects are the first two of ``count``."""
    transformer = adapter.pipeline.transformer
    teachers = {f"effect_{i}": random_lora(transformer, 3, i) for i in range(count)}
    student = random_lora(transformer, 4, 101)
    train = {"critic_ratio": 1, "ema_decay": 0.9, "batch_size": 4}
    config = tiny_config(list(teachers), train=train, objective={"switch_probability": 1.0})
    with AdapterBank(transformer, {CRITIC: student, **teachers}, pages=pages, fixed=1) as bank:
        trainer = DistillTrainer(config, adapter, bank, random_data(adapter, list(teachers)), student, student)
        rows = trainer.sampler._effect_rows

        def rows_of_two():
            data = trainer.data
            trainer.sampler.data = replace(data, effects=data.effects[:2])
            found = rows()
            trainer.sampler.data = data
            return found

        monkeypatch.setattr(trainer.sampler, "_effect_rows", rows_of_two)
        scored = []
        routed = trainer.steps._routed
        monkeypatch.setattr(trainer.steps, "_routed", lambda ids, *rest: scored.append(ids) or routed(ids, *rest))
        with Operators() as operators:
            for progress in (0.0, 0.5):
                trainer.anchor_share = 0.25
                raise_first(trainer._iterate(progress))
                trainer.average.step(trainer.student.parameters())
                trainer._is_calm()
    assert {1, 2} <= set(torch.cat(scored).tolist()), "two teachers score"
    return operators.seen


@pytest.mark.parametrize("pages", [None, 2], ids=["resident", "paged"])
def test_an_update_with_2_12_and_50_teachers_runs_the_same_operators(adapter, pages, monkeypatch):
    # The first run fills what diffusers keeps from pass to pass, such as positions.
    _, few, *more = (operators_of_updates(adapter, count, pages, monkeypatch) for count in (2, 2, 12, 50))
    assert sum(few.values()) > 1000
    for many in more:
        assert many - few == few - many == Counter()
