"""The base's training: its pool, its schedule, and a run that is cut off."""

from __future__ import annotations

import pytest
import torch

from clora.errors import CloraError
from clora.studio.assets import studio_adapter
from clora.studio.edits import FAMILIES
from clora.studio.making import base
from clora.testing import tiny_pipeline


@pytest.fixture(scope="module")
def pool():
    done = []
    pool = base.make_pool(studio_adapter(tiny_pipeline()), range(4), 10, done.append)
    assert sum(done) == 4
    return pool


def train(pool, tmp_path, updates, monkeypatch, stop=None, seed=0):
    """Trains a fresh tiny transformer; returns its weights and the losses."""
    for name, value in {"BATCH": 2, "CHECKPOINT_EVERY": 1, "FIXED_UPDATES": 1, "FOCUS_UPDATES": 2}.items():
        monkeypatch.setattr(base, name, value)
    adapter, losses = studio_adapter(tiny_pipeline()), {}

    def report(update, values):
        losses[update] = values["loss"]
        if update == stop:
            raise KeyboardInterrupt

    base.train_base(adapter, pool, updates, seed, tmp_path / "base.safetensors", report)
    transformer = adapter.pipeline.transformer
    assert not any(p.requires_grad for p in transformer.parameters())
    return {name: p.clone() for name, p in transformer.named_parameters()}, losses


def test_entries_are_the_edits_of_their_families(pool):
    everything = pool.entries(FAMILIES)
    assert len(everything) == 40
    part = pool.entries({"recolour", "remove"})
    assert 0 < len(part) < 40
    assert {pool.families[i] for i in part.tolist()} <= {"recolour", "remove"}
    assert {"keep", "grey"} <= base.families_without_slots()
    assert not {"recolour", "tint"} & base.families_without_slots()


def test_the_learning_rate_decays_twice():
    factors = [base.learning_rate_factor(update, 4800) for update in range(4800)]
    assert factors[0] == pytest.approx(1 / 50)
    assert factors[1000] == 1.0
    assert factors[3999] < 1e-3
    assert factors[4000] == pytest.approx(0.4)
    assert factors[-1] < 1e-3


def test_a_resumed_base_equals_an_uninterrupted_one_bitwise(pool, tmp_path, monkeypatch):
    whole, losses = train(pool, tmp_path / "whole", 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(pool, tmp_path / "cut", 4, monkeypatch, stop=3)
    resumed, rest = train(pool, tmp_path / "cut", 4, monkeypatch)
    assert rest == {k: losses[k] for k in rest}
    assert 1 <= len(rest) < 4
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert len(set(losses.values())) == 4


def test_a_checkpoint_of_another_recipe_is_refused(pool, tmp_path, monkeypatch):
    train(pool, tmp_path, 4, monkeypatch)
    with pytest.raises(CloraError, match=r"another run \(updates was \d+, is \d+\)"):
        train(pool, tmp_path, 5, monkeypatch)
