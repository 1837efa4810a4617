"""A whole run: anchoring first, resuming, divergence, the learning rate, the time limit."""

from __future__ import annotations

import pytest
import torch
from helpers.trainers import changed, make_trainer, rolled, same, slots

from clora.errors import CloraError
from clora.testing import random_data, tiny_config
from clora.training import steps
from clora.training import trainer as training
from clora.training.faults import StepCheck, raise_first
from clora.training.resume import Checkpoints
from clora.training.steps import CRITIC, STUDENT

SCHEDULED = {"schedule": "cosine", "warmup_updates": 2, "weight_decay": 0.1, "ema_decay": 0.5}


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, SCHEDULED], ids=["adamw", "muon", "scheduled"])
def test_resuming_equals_an_uninterrupted_run_bitwise(adapter, tmp_path, settings):
    """Interrupted between two draws of the streams, so that these must be kept too."""
    train = {"updates": 3, "checkpoint_every": 1, **settings}
    sections = {"train": train, "objective": {"switch_every": 4}}
    checkpoint = Checkpoints(tmp_path)
    whole, resumed = {}, {}

    def stop(update, values):
        if update == 2:
            raise KeyboardInterrupt

    with make_trainer(adapter, **sections) as trainer:
        trainer.fit(lambda update, values: whole.update({update: dict(values)}))
        expected, exported = slots(trainer), trainer.exported()
        moments = trainer.optimizers[STUDENT].state_dict()["state"]
    with make_trainer(adapter, **sections) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.fit(stop, checkpoint)
    checkpoint = Checkpoints(tmp_path)
    with make_trainer(adapter, **sections) as trainer:
        torch.randn(5, generator=trainer.generator)  # the checkpoint's state must win
        trainer.fit(lambda update, values: resumed.update({update: dict(values)}), checkpoint)
        assert not changed(trainer, expected)
        assert same(trainer.exported(), exported)
        for i, state in trainer.optimizers[STUDENT].state_dict()["state"].items():
            assert all(torch.equal(value, moments[i][key]) for key, value in state.items())
    assert resumed == {2: whole[2], 3: whole[3]}
    assert {file.name for file in tmp_path.iterdir()} == {"00000002.safetensors", "00000003.safetensors"}


@pytest.mark.parametrize("anchor_share", [0.0, 0.5])
def test_a_lengthened_run_at_constant_rates(adapter, tmp_path, anchor_share):
    """It equals a run that was as long from the start; anchoring, a share of the length, does not come back."""
    train = {"schedule": "constant", "anchor_share": anchor_share}
    with make_trainer(adapter, train={"updates": 2, **train}) as trainer:
        trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
    reports = []
    with make_trainer(adapter, train={"updates": 8, **train}) as trainer:
        trainer.fit(lambda update, values: reports.append(values), Checkpoints(tmp_path))
        lengthened = slots(trainer)
    assert len(reports) == 6
    assert all("critic" in values for values in reports)
    with make_trainer(adapter, train={"updates": 8, **train}) as trainer:
        trainer.fit(lambda update, values: None)
        assert bool(changed(trainer, lengthened)) == (anchor_share > 0)


def test_a_lengthened_run_follows_the_longer_fall(adapter, tmp_path):
    rates = []
    for updates in (2, 8):
        with make_trainer(adapter, train={"updates": updates, "critic_learning_rate": 3e-2}) as trainer:

            def note(update, values, optimizers=trainer.optimizers):
                rates.append([optimizers[name].param_groups[0]["lr"] for name in (STUDENT, CRITIC)])

            trainer.fit(note, Checkpoints(tmp_path))
    factors = [1, 0.51, *(0.02 + 0.98 * (8 - k) / 8 for k in range(2, 8))]
    assert [student for student, _ in rates] == pytest.approx([1e-2 * factor for factor in factors])
    assert [critic for _, critic in rates] == pytest.approx([3e-2 * factor for factor in factors])


def test_the_exported_lora_is_the_student_or_its_average(adapter, tmp_path):
    """One checkpoint has both."""
    plain, both = {}, []
    with make_trainer(adapter, train={"updates": 3}) as trainer:
        trainer.fit(lambda update, values: plain.update({update: trainer.student.state(STUDENT)}))
        assert same(trainer.exported(), plain[3])
    for export in ("ema", "student"):
        with make_trainer(adapter, train={"updates": 3, "ema_decay": 0.15, "export": export}) as trainer:
            trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
            both.append(trainer.exported())
            assert same(trainer.student.state(STUDENT), plain[3]), "the average has no part in training"
    average, student = both
    assert same(student, plain[3])
    # diffusers' decays of the first three updates are 0, 2 / 11 and 3 / 12, at most the setting.
    for name, module in average.modules.items():
        for factor in ("lora_A", "lora_B"):
            first, second, third = (getattr(plain[k].modules[name], factor) for k in (1, 2, 3))
            expected = 0.15 * (0.15 * first + 0.85 * second) + 0.85 * third
            torch.testing.assert_close(getattr(module, factor), expected)


def test_a_checkpoint_of_another_configuration_is_refused(adapter, tmp_path):
    checkpoint = Checkpoints(tmp_path).path(0)
    with make_trainer(adapter) as trainer:
        trainer.save(checkpoint)
    with make_trainer(adapter, sampler={"guidance": 3.0}) as trainer:
        with pytest.raises(CloraError, match=r"00000000\.safetensors .*another run \(sampler\.guidance was 1\.0, is"):
            trainer.fit(lambda update, values: None, Checkpoints(tmp_path))
    free = {
        "updates": 1,
        "checkpoint_every": 7,
        "keep_checkpoints": 5,
        "stop_after": 9.0,
        "gradient_checkpointing": True,
    }
    with make_trainer(adapter, train=free) as trainer:
        trainer.load(checkpoint)
        other_cache = tiny_config([e.name for e in trainer.config.effects], data={"cache": "elsewhere"})
    assert Checkpoints(tmp_path).start(other_cache) == (checkpoint, 0)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_refused(adapter, tmp_path, content):
    checkpoint = tmp_path / "state.safetensors"
    with make_trainer(adapter) as trainer:
        trainer.save(checkpoint)
        checkpoint.write_bytes(checkpoint.read_bytes()[:-9] if content is None else content)
        with pytest.raises(CloraError, match="is damaged .* remove it"):
            trainer.load(checkpoint)


def finite_step(values):
    """The check of a step that went well."""
    row = torch.zeros(1)
    return StepCheck("a step", values, row > 0, row[0], row[0], row, "strongest", "its rate", str)


def test_no_critic_is_trained_where_nothing_is_scored(adapter):
    off = {"backward_simulation": False, "target_simulation": False}
    with make_trainer(adapter, objective=off) as trainer:
        before, reports = slots(trainer), []
        trainer.fit(lambda update, values: reports.append(values))
        assert changed(trainer, before) == {STUDENT}
    assert all("critic" not in values for values in reports)


@pytest.mark.parametrize(("objective", "term"), [({}, "dmd_ts"), ({"target_simulation": False}, "anchor")])
def test_a_nan_target_stops_naming_update_effect_and_term(adapter, objective, term):
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.targets[1] = torch.nan
    objective = {"dual_stream": False, **objective}
    with make_trainer(adapter, data, objective=objective, train={"batch_size": 16}) as trainer:
        with pytest.raises(CloraError, match=f"update 1: the student's loss.*effect 'effect_1', term {term}"):
            trainer.fit(lambda update, values: None)


def test_a_nan_source_stops_the_critic(adapter):
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.general_sources[:] = torch.nan
    with make_trainer(adapter, data) as trainer:
        with pytest.raises(CloraError, match="the critic's loss.*effect of the general stream"):
            raise_first([trainer.steps.critic_step(*rolled(trainer))])


def test_a_fault_never_reaches_a_checkpoint(adapter, tmp_path, monkeypatch):
    """The later steps of an update are computed with the fault; the file on disk is from before."""
    checkpoint = Checkpoints(tmp_path)
    with make_trainer(adapter, train={"updates": 5, "checkpoint_every": 1, "critic_ratio": 2}) as trainer:
        real, states = trainer.steps.simulate, []

        def simulate(batch):
            x, sigma = real(batch)
            return (x * torch.nan if trainer.update == 2 else x), sigma

        monkeypatch.setattr(trainer.steps, "simulate", simulate)
        with pytest.raises(CloraError, match="update 3: the critic's loss"):
            trainer.fit(lambda update, values: states.append(slots(trainer)), checkpoint)
        assert any(not module.lora_A.isfinite().all() for module in trainer.student.state(STUDENT).modules.values())
    with make_trainer(adapter, train={"updates": 5, "checkpoint_every": 1, "critic_ratio": 2}) as trainer:
        trainer.load(checkpoint.path(2))
        assert trainer.update == len(states) == 2
        assert all(same(state, states[-1][name]) for name, state in slots(trainer).items())


@pytest.mark.parametrize(
    ("loss_name", "step", "message"),
    [
        (
            "coarse_to_fine_loss",
            "student_step",
            r"the student's gradient.*strongest comes from effect .*, term (dmd_bs|dmd_ts|anchor);",
        ),
        ("critic_loss", "critic_step", "the critic's gradient.*largest loss comes from effect"),
    ],
)
def test_an_infinite_gradient_names_where_it_comes_from(adapter, monkeypatch, loss_name, step, message):
    real = getattr(steps, loss_name)

    def infinite(velocity, *args):
        loss, terms = real(velocity, *args)
        if loss_name == "critic_loss":
            return loss * torch.inf, terms
        return loss, terms | {"velocity_gradient": torch.full_like(velocity, torch.inf)}

    monkeypatch.setattr(steps, loss_name, infinite)
    with make_trainer(adapter) as trainer:
        batch, rollout = rolled(trainer)
        with pytest.raises(CloraError, match=message):
            raise_first([getattr(trainer.steps, step)(batch, rollout)])


def test_anchoring_first_is_skipped_where_anchoring_is_off(adapter):
    """Switching anchoring off takes one flag, whatever share of the run it would have had."""
    with make_trainer(adapter, objective={"trajectory_anchoring": False}, train={"anchor_share": 0.9}) as trainer:
        reports = []
        trainer.fit(lambda update, values: reports.append(values))
    assert reports
    assert all("critic" in values for values in reports)


def test_the_student_learns_from_the_rollout_of_its_last_critic_update(adapter, monkeypatch):
    with make_trainer(adapter, train={"updates": 1, "critic_ratio": 3}) as trainer:
        rollouts, used = [], []
        simulate, student_rows = trainer.steps.simulate, trainer.steps._student_rows
        monkeypatch.setattr(trainer.steps, "simulate", lambda batch: rollouts.append(simulate(batch)) or rollouts[-1])
        monkeypatch.setattr(trainer.steps, "_student_rows", lambda *args: used.append(args) or student_rows(*args))
        trainer.fit(lambda update, values: None)
    assert len(rollouts) == 3
    ((_, rollout),) = used
    assert rollout is rollouts[-1]


def test_gradients_are_clipped(adapter, monkeypatch):
    norms = []
    with make_trainer(adapter, train={"clip": 0.5}) as trainer:
        parameters, step = trainer.student.parameters(), trainer.optimizers[STUDENT].step
        (100 * sum(p.sum() for p in parameters)).backward()
        expected = torch.stack([p.grad.norm() for p in parameters]).norm()

        def stepping():
            norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
            step()

        monkeypatch.setattr(trainer.optimizers[STUDENT], "step", stepping)
        torch.testing.assert_close(trainer.steps._step(trainer.optimizers[STUDENT], trainer.student), expected)
        assert all(p.grad is None for p in parameters), "the critic's would lie beside them"
    assert norms == [pytest.approx(0.5, rel=1e-3)]


def test_anchor_updates_come_first_and_learn_the_targets(adapter):
    losses, data = [], random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.targets[:] = 3 * data.targets[0, 0, 0]  # one colour: soon learned
    train = {"updates": 60, "anchor_share": 1.0, "learning_rate": 3e-2}
    with make_trainer(adapter, data, train=train) as trainer:
        before = trainer.critic.state(CRITIC)
        trainer.fit(lambda update, values: losses.append(values))
        assert same(trainer.critic.state(CRITIC), before)
    assert all(values["dmd_bs"] == values["dmd_ts"] == 0 and "critic" not in values for values in losses)
    first, last = (sum(values["anchor"] for values in part) / 5 for part in (losses[:5], losses[-5:]))
    assert last < 0.8 * first


def test_the_critic_starts_from_the_anchored_student(adapter, monkeypatch):
    train = {"updates": 4, "anchor_share": 0.5, "learning_rate": 3e-2}
    with make_trainer(adapter, train=train) as trainer:
        equal = []

        def compare(*args):
            pairs = zip(trainer.critic.parameters(), trainer.student.parameters(), strict=True)
            equal.append(all(torch.equal(critic, student) for critic, student in pairs))
            return finite_step({})

        monkeypatch.setattr(trainer.steps, "critic_step", compare)
        trainer.fit(lambda update, values: None)
    assert len(equal) == 4, "two critic updates before each of the last two"
    assert equal[0]
    assert not equal[2], "the critic is set once"


def test_a_time_limit_ends_the_run(adapter):
    with make_trainer(adapter, train={"updates": 10**6, "minutes": 0.001}) as trainer:
        trainer.fit(lambda update, values: None)
        assert trainer.update < 1000


def test_a_resumed_run_has_only_the_time_that_was_left(adapter, tmp_path, monkeypatch):
    """Each update takes five seconds of a minute; the learning rate goes on falling where it was."""
    clock = iter(range(1000, 10**6, 5))
    monkeypatch.setattr(training.DistillTrainer, "_check_complete", lambda *arguments: None)  # no step is made
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    train = {"updates": 10**6, "minutes": 1.0, "checkpoint_every": 1}
    monkeypatch.setattr(
        training.DistillTrainer, "_iterate", lambda self, progress: [finite_step({"progress": torch.tensor(progress)})]
    )
    seen = []

    def stop(update, values):
        seen.append(values["progress"])
        if update == 4:
            raise KeyboardInterrupt

    with make_trainer(adapter, train=train) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.fit(stop, Checkpoints(tmp_path))
    with make_trainer(adapter, train=train) as trainer:
        trainer.fit(lambda update, values: seen.append(values["progress"]), Checkpoints(tmp_path))
    assert seen == sorted(seen)
    assert len(seen) <= 14, "both parts together take the minute, five seconds an update, and the one that was lost"


def test_both_optimizers_have_their_settings(adapter):
    rates = {"learning_rate": 0.1, "critic_learning_rate": 0.2, "weight_decay": 0.3}
    with make_trainer(adapter, train={"updates": 1, **rates}) as trainer:
        groups = [optimizer.param_groups[0] for optimizer in trainer.optimizers.values()]
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.3), (0.2, 0.3)]
