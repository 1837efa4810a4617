"""General edits are judged against their alternatives; rows sum up verdicts, with intervals that scenes decide."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clora.studio.effects import EFFECTS
from clora.studio.evaluation import general_cases, general_results, held_out_sources, judge_effects
from clora.studio.judges import Verdict
from clora.studio.results import Measured, interval

CASES = 8
SCENES = 2


def verdict(accurate=True, psnr=20.0):
    return Verdict(
        distance=0.1,
        nearest="thermal",
        accurate=accurate,
        strength=0.9,
        bad_case=not accurate,
        psnr=psnr,
        subject_alignment=4.0,
    )


def test_exact_results_are_correct_and_those_of_other_edits_are_not():
    cases = general_cases(CASES, 64)
    exact = np.stack([case.edit.result for case in cases])
    assert general_results(exact) == [True] * CASES
    assert general_results(np.roll(exact, 1, axis=0)) == [False] * CASES
    changed = [case for case in cases if np.abs(case.edit.result - case.edit.source).mean() > 0.01]
    assert len(changed) > CASES // 2
    assert not any(case.is_correct(case.edit.source) for case in changed)


def test_exact_effects_are_right_for_every_noise():
    rng = np.random.default_rng(8)
    # Every scene once for each of two noises, in the order of an evaluation.
    sources = np.tile(held_out_sources(SCENES, 64), (2, 1, 1, 1))
    outputs = {name: np.stack([EFFECTS[name].apply(s, rng) for s in sources]) for name in ("thermal", "snow")}
    row = Measured(judge_effects(outputs, SCENES), SCENES, [True, False], {}).row()
    assert row["outputs"] == 8
    assert row["effect_accuracy"] == 1
    assert row["bad_case_rate"] == row["bad_case_rate_stochastic"] == 0
    assert row["psnr"] == pytest.approx(100)  # of thermal only: snow has no PSNR
    assert row["per_effect"] == {"thermal": 1, "snow": 1}
    assert row["general_accuracy"] == 0.5
    assert row["intervals"]["effect_accuracy"] == [1, 1]
    assert row["intervals"]["general_accuracy"] == [0, 1]


def test_unchanged_pictures_are_bad_cases():
    outputs = {"thermal": held_out_sources(SCENES, 64), "snow": held_out_sources(SCENES, 64)}
    row = Measured(judge_effects(outputs, SCENES), SCENES, None, {}).row()
    assert row["effect_accuracy"] == row["subject_alignment"] == 0
    assert row["bad_case_rate"] == 1
    assert row["general_accuracy"] is None
    assert "general_accuracy" not in row["intervals"]


def test_differences_are_paired_by_scene():
    # Each is wrong on the same scene for all noises and effects: unpaired intervals would overlap.
    first = Measured({"thermal": [verdict(), verdict(False, 10.0)] * 2}, SCENES, [True, True], {})
    second = Measured({"thermal": [verdict(psnr=18.0), verdict(False, 8.0)] * 2}, SCENES, [True, False], {})
    found = first.difference(second)
    assert found["effect_accuracy"] == {"mean": 0, "interval": [0, 0]}
    assert found["psnr"] == {"mean": pytest.approx(2), "interval": [pytest.approx(2)] * 2}
    assert found["general_accuracy"]["mean"] == 0.5
    assert "bad_case_rate_stochastic" not in found
    assert first.row()["intervals"]["effect_accuracy"] == [0, 1]


def test_intervals_cover_the_mean_about_as_often_as_they_claim():
    rng = np.random.default_rng(0)
    bounds = [interval((rng.random(48) < 0.8).astype(float)) for _ in range(200)]
    assert 0.9 < np.mean([low <= 0.8 <= high for low, high in bounds]) < 0.99


def test_rows_are_kept_as_json():
    pictures = {"thermal": np.zeros((64, 64, 3), np.uint8)}
    measured = Measured({"thermal": [verdict(), verdict(False, None)]}, SCENES, [True, False], pictures, 1.5)
    found = Measured.from_json(json.loads(json.dumps(measured.to_json())), pictures)
    assert found.verdicts == measured.verdicts
    assert found.row() == measured.row()
    assert found.precomputed
    assert found.megabytes == 1.5
