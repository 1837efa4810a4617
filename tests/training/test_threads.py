"""The threads of a training on a CPU: chosen once, kept by the run's checkpoints, given back at its end."""

from __future__ import annotations

import pytest
import torch
from helpers.trainers import make_trainer
from helpers.written import rewrite

from clora import threads
from clora.training.checkpoint import load_values
from clora.training.resume import Checkpoints


@pytest.fixture
def machine(monkeypatch):
    """Sets torch's threads and what is busy, on a machine of four cores; the threads of before are given back."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: set(range(4)))
    monkeypatch.setattr(threads, "is_users", lambda current, cores: current == 3)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)

    def state(number, busy):
        torch.set_num_threads(number)
        monkeypatch.setattr(threads, "busy_cores", lambda cores: busy)

    yield state
    torch.set_num_threads(before)


def run(adapter, folder, updates):
    """Returns the threads of each update, and the student."""
    seen = []
    with make_trainer(adapter, train={"updates": updates, "checkpoint_every": 1}) as trainer:
        trainer.fit(lambda *_: seen.append(torch.get_num_threads()), Checkpoints(folder))
        return seen, [parameter.clone() for parameter in trainer.student.parameters()]


def test_a_run_that_goes_on_has_its_threads_and_bits_whatever_is_busy(adapter, tmp_path, machine, capsys):
    machine(4, 2.0)
    seen, whole = run(adapter, tmp_path / "whole", 2)
    assert seen == [2, 2]
    assert "training runs on 2 threads (4 cores, 2 busy; OMP_NUM_THREADS" in capsys.readouterr().err
    assert torch.get_num_threads() == 4, "given back"
    run(adapter, tmp_path / "parts", 1)
    capsys.readouterr()
    machine(4, 0.0)
    seen, parts = run(adapter, tmp_path / "parts", 2)
    assert seen == [2]
    assert "training runs on 2 threads, as before" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize(("number", "why"), [(1, "there are fewer"), (3, "the user's")])
def test_another_number_is_said_and_kept(adapter, tmp_path, machine, capsys, number, why):
    machine(4, 2.0)
    run(adapter, tmp_path, 1)
    machine(number, 0.0)
    assert run(adapter, tmp_path, 2)[0] == [number], why
    expected = f"training runs on {number} thread{'s' * (number > 1)}; it ran on 2 before: the last digits may differ"
    assert expected in capsys.readouterr().err
    assert load_values(Checkpoints(tmp_path).path(2))["threads"] == number


def test_an_earlier_version_s_checkpoint_has_no_threads(adapter, tmp_path, machine):
    machine(4, 2.0)
    run(adapter, tmp_path, 1)
    file = Checkpoints(tmp_path).path(1)
    rewrite(file, lambda flat, values: {name: value for name, value in values.items() if name != "threads"})
    machine(4, 1.0)
    assert run(adapter, tmp_path, 2)[0] == [3]


def test_threads_are_given_back_where_a_run_fails(adapter, machine):
    machine(4, 3.0)

    def report(*_):
        raise RuntimeError(torch.get_num_threads())

    with make_trainer(adapter) as trainer, pytest.raises(RuntimeError, match="1"):
        trainer.fit(report)
    assert torch.get_num_threads() == 4
