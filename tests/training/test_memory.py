"""The rows of a pass with gradients where nobody states them: chosen once, kept by the run's checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers.trainers import make_trainer
from helpers.written import rewrite

from clora.training import steps
from clora.training.memory import free_memory, kept_bytes, rows_that_fit
from clora.training.resume import Checkpoints

GB = 10**9


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "free", "device_type", "expected"),
    [
        (192, 30e6, 8 * GB, "cpu", 3),
        (192, 30e6, None, "mps", 42),
        (8500, 4 * GB, 80 * GB, "cuda", 1),
        (2000, 10 * GB, 80 * GB, "cuda", 4),
        (2000, 10 * GB, 40 * GB, "cuda", 2),
        (2000, 10 * GB, 1 * GB, "cuda", 1),
        (2000, 0, 1 * GB, "cuda", 4),
    ],
)
def test_rows_fill_the_products_and_fit(tokens, row_bytes, free, device_type, expected):
    assert rows_that_fit(tokens, int(row_bytes), free, device_type) == expected


def test_the_bytes_of_a_graph_are_counted_once():
    weight, x = torch.ones(50, 100, requires_grad=True), torch.ones(10, 100)
    assert kept_bytes(lambda: (x @ weight.T).sin(), [weight]) == 4 * (1000 + 500)
    y = torch.ones(10, 50, requires_grad=True)
    assert kept_bytes(lambda: (y @ weight).sin() + (y @ weight).cos(), []) == 4 * (500 + 5000 + 2 * 1000)


def test_this_machine_has_free_memory():
    free = free_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


def run(adapter, folder, updates, **train):
    with make_trainer(adapter, train={"updates": updates, "checkpoint_every": 1, **train}) as trainer:
        trainer.fit(lambda *_: None, Checkpoints(folder))
        return trainer.steps.gradient_rows, [p.clone() for p in trainer.student.parameters()]


def test_what_was_chosen_stays_with_the_run(adapter, tmp_path, monkeypatch, capsys):
    """A run that goes on where there is less memory has the rows, and so the bits, of one that was not stopped."""
    rows, whole = run(adapter, tmp_path / "whole", 2)
    assert rows > 1
    assert f"takes {rows} rows" in capsys.readouterr().err
    assert run(adapter, tmp_path / "parts", 1)[0] == rows
    monkeypatch.setattr(steps, "free_memory", lambda device: 1)
    assert run(adapter, tmp_path / "other", 1)[0] == 1
    again, continued = run(adapter, tmp_path / "parts", 2)
    assert again == rows
    assert all(torch.equal(a, b) for a, b in zip(continued, whole, strict=True))


@pytest.mark.parametrize("stated", [None, 5])
def test_what_is_stated_stands_over_what_was_chosen(adapter, tmp_path, stated):
    run(adapter, tmp_path, 1)
    assert run(adapter, tmp_path, 2, gradient_rows=stated)[0] == stated


def without_rows(folder, update):
    """Makes a checkpoint one of an earlier version, which did not record the rows."""
    file = Checkpoints(folder).path(update)

    def change(flat, values):
        return {name: value for name, value in values.items() if name != "gradient_rows"}

    rewrite(file, change)


@pytest.mark.parametrize("before", [5, None, "not recorded"])
def test_a_statement_that_is_removed_leaves_its_number_or_a_choice(adapter, tmp_path, before, capsys):
    """Never no bound: nobody asked for it any longer."""
    run(adapter, tmp_path, 1, gradient_rows=5 if before == 5 else None)
    if before == "not recorded":
        without_rows(tmp_path, 1)
    assert "a pass that learns" not in capsys.readouterr().err
    rows, _ = run(adapter, tmp_path, 2)
    if before == 5:
        assert rows == 5
        assert "a pass that learns takes 5 rows, as before" in capsys.readouterr().err
    else:
        assert rows > 1
        assert f"a pass that learns takes {rows} rows (train.gradient_rows: auto)" in capsys.readouterr().err


def test_a_choice_draws_nothing_and_learns_nothing(adapter):
    with make_trainer(adapter) as trainer:
        before = trainer.generator.get_state()
        trainer._choose_rows()
        assert torch.equal(trainer.generator.get_state(), before)
        assert all(p.grad is None for p in trainer.student.parameters())


def test_a_record_does_not_depend_on_what_is_chosen(adapter):
    with make_trainer(adapter) as chosen, make_trainer(adapter, train={"gradient_rows": None}) as unbound:
        assert chosen.config.train.gradient_rows == "auto"
        assert chosen.config.recorded() == unbound.config.recorded()
