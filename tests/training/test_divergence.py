"""Runs that explode without NaN: they stop, and what was kept is from before."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.trainers import make_trainer, same, slots
from torch import nn

from clora.bank.slots import Slots, Stack
from clora.config.training import ObjectiveWeights
from clora.errors import CloraError
from clora.training.checkpoint import stated_values
from clora.training.divergence import WINDOW, LossLevels, base_size, relative_change
from clora.training.resume import Checkpoints
from clora.training.steps import STUDENT


def fed(readings, term="anchor"):
    levels = LossLevels(ObjectiveWeights())
    for value in readings:
        levels.add({term: value})
    return levels


@pytest.mark.parametrize("rate", [1.0, 10.0, 1e3])
@pytest.mark.parametrize(("name", "step"), [("learning_rate", "student"), ("critic_learning_rate", "critic")])
def test_weights_that_explode_stop_the_run(adapter, tmp_path, rate, name, step):
    """The run goes on from before, at a lower rate, as if it had been run so from there."""
    train = {
        "updates": 8,
        "checkpoint_every": 1,
        "schedule": "constant",
        "learning_rate": 1e-4,
        "critic_learning_rate": 1e-4,
    }
    with make_trainer(adapter, train={**train, "updates": 2}) as trainer:
        trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
    run = Checkpoints(tmp_path)
    with make_trainer(adapter, train={**train, "updates": 40}) as trainer:
        rates = trainer.rates.at
        index = ["student", "critic"].index(step)
        trainer.rates.at = lambda *args: tuple(rate if i == index else r for i, r in enumerate(rates(*args)))
        with pytest.raises(CloraError, match=f"update \\d+: the {step}'s weights have exploded.* effect") as caught:
            trainer.fit(lambda update, values: None, run)
    kept = run.last_update()
    assert f"The checkpoint of update {kept} is kept" in str(caught.value)
    assert stated_values(run.path(kept))["calm"]
    with make_trainer(adapter, train={**train, "updates": kept + 2, "learning_rate": 1e-5}) as trainer:
        trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
        assert trainer.update == kept + 2
        assert all(module.lora_A.isfinite().all() for module in trainer.student.state(STUDENT).modules.values())


def test_a_run_that_explodes_at_once_keeps_nothing(adapter, tmp_path):
    with make_trainer(adapter, train={"updates": 8, "checkpoint_every": 1, "learning_rate": 1e3}) as trainer:
        with pytest.raises(CloraError, match=r"update 1: .*weights have exploded.*No checkpoint is from before it"):
            trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_explodes_names_its_term_and_goes_back_to_before(adapter, tmp_path, monkeypatch):
    """Slowly: of the last two checkpoints both are from within the explosion."""
    train = {"updates": 200, "checkpoint_every": 10, "learning_rate": 1e-5, "critic_learning_rate": 1e-5}
    run = Checkpoints(tmp_path)
    with make_trainer(adapter, train={**train, "anchor_share": 1.0}) as trainer:
        real = trainer.steps.student_step

        def rising(*args):
            check = real(*args)
            check.values["anchor"] = torch.tensor(0.1 * 1.05 ** max(0, trainer.update - 60))
            return check

        monkeypatch.setattr(trainer.steps, "student_step", rising)
        states = {}
        with pytest.raises(
            CloraError, match="the student's loss has exploded: its term anchor is .*; the strongest.*effect"
        ):
            trainer.fit(lambda update, values: states.update({update: slots(trainer)}), run)
        assert trainer.update > 110
    (kept,) = run.files()
    update = run.last_update()
    assert 60 <= update <= 90
    with make_trainer(adapter, train={**train, "anchor_share": 1.0}) as trainer:
        trainer.load(kept)
        assert same(slots(trainer)[STUDENT], states[update][STUDENT])


def test_levels_are_those_of_an_uninterrupted_run_after_a_resume():
    readings = [random.Random(0).uniform(0.5, 1.5) * 1.02**i for i in range(120)]
    for stop in (3, 30, 90):
        resumed = LossLevels(ObjectiveWeights())
        resumed.load_state(fed(readings[:stop]).state())
        for value in readings[stop:]:
            resumed.add({"anchor": value})
        assert resumed.rises() == fed(readings).rises()
        resumed.load_state(fed(readings[:stop]).state())
        assert resumed.state() == fed(readings[:stop]).state(), "what was loaded before leaves nothing"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_noisy_losses_are_no_explosion(scale):
    """Batches of one sample have losses many times their median; some have no row of a term."""
    draw = random.Random(0)
    levels = LossLevels(ObjectiveWeights())
    for _ in range(3000):
        distribution_matching = scale * draw.lognormvariate(0, 1.5)
        flow_matching = draw.lognormvariate(0, 0.7)  # much of it as bad as predicting nothing
        levels.add({"dmd_ts": distribution_matching, "critic": flow_matching, "dmd_bs": draw.choice([0.0, 1.0])})
        assert not levels.exploded()


def test_distribution_matching_may_begin_near_zero():
    readings = [1e-6] * WINDOW + [1.0] * WINDOW
    assert fed(readings, "dmd_ts").rises()["dmd_ts"] == 1
    assert fed([*readings, *[20.0] * WINDOW], "dmd_ts").exploded() == {"dmd_ts": 20.0}


@pytest.mark.parametrize("term", ["anchor", "critic"])
def test_flow_matching_that_becomes_worse_than_predicting_nothing_has_exploded(term):
    """Of a ruined transformer it stays near 2, less than ten times where it came from."""
    assert fed([0.4] * WINDOW + [2.0] * WINDOW, term).exploded() == {term: pytest.approx(5)}
    assert not fed([0.2] * WINDOW + [0.9] * WINDOW, term).exploded(), "not yet worse"
    assert not fed([0.8] * WINDOW + [2.0] * WINDOW, term).exploded(), "never much better"


def test_the_change_is_that_of_all_layers_by_the_size_of_the_base(adapter):
    with make_trainer(adapter) as trainer:
        transformer = trainer.bank.transformer
        state = trainer.student.state(STUDENT)
        deltas = torch.cat([module.delta().double().flatten() for module in state.modules.values()])
        weights = [transformer.get_submodule(name).weight for name in state.modules]
        size = base_size(transformer, trainer.student)
        expected = sum(max(float(weight.double().square().sum()), len(weight)) for weight in weights) ** 0.5
        assert size == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(
            relative_change(trainer.student, size).double(), deltas.norm() / size, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(6, 4), torch.zeros(12, 1, dtype=torch.uint8), torch.zeros(6, 4, device="meta")],
    ids=["zero", "packed", "meta"],
)
def test_a_base_without_weights_to_read_has_a_size(weight):
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    stack = Stack({"layer": (torch.ones(1, 2, 4), torch.ones(1, 6, 2))}, torch.ones(1))
    slots = Slots(("student",), (stack,), {0: (0, 0)})
    assert base_size(nn.ModuleDict({"layer": layer}), slots) == pytest.approx(6**0.5)
