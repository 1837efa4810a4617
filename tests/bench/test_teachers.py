"""The benchmark of the number of teachers: equal losses, one ratio per number, the bank's bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from bench import teachers
from bench.teachers import CASE, main, measure

SMALL = replace(CASE, layers=1, heads=2, axes=(8, 12, 12), grid=2, samples=2, student_rank=2, teacher_rank=2)


def test_updates_of_every_number_are_timed_on_equal_losses():
    found = measure(SMALL, rounds=2, counts=(2, 3))["teachers"]
    assert list(found) == [2, 3]
    assert found[2]["ratio"] == 1.0
    assert found[3]["ratio"] > 0
    # The critic and each teacher have the same ranks here.
    assert found[3]["bank_mb"] / found[2]["bank_mb"] == pytest.approx(4 / 3)


def test_updates_with_other_losses_are_refused(monkeypatch):
    losses = iter(range(100))
    monkeypatch.setattr(teachers, "update", lambda trainer: {"loss": next(losses)})
    with pytest.raises(RuntimeError, match="expected equal losses"):
        measure(SMALL, rounds=1, counts=(2, 3))


@pytest.mark.parametrize(("ratio", "code"), [(1.02, 0), (1.04, 1)])
def test_the_exit_code_follows_the_goal(tmp_path, monkeypatch, capsys, ratio, code):
    figures = {"bank_mb": 1.0, "median_ms": 2.0, "ratio": ratio}
    monkeypatch.setattr(teachers, "measure", lambda case, rounds: {"teachers": {50: figures}})
    assert main(["--out", str(tmp_path)]) == code
    assert f"50 teachers      1.0 MB      2.0 ms an update  +{ratio - 1:.1%}" in capsys.readouterr().out
    assert json.loads((tmp_path / "teachers.json").read_text())["teachers"]["50"] == figures
