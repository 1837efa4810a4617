"""General edits are judged against their alternatives; rows sum up verdicts."""

import numpy as np
import pytest

from clora.studio.baselines import Measured
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import general_accuracy, general_cases, held_out_sources, judge_effects, judges

CASES = 18


def test_exact_results_are_correct_and_unchanged_sources_are_not():
    cases = general_cases(CASES)
    assert general_accuracy([case.edit.result for case in cases]) == 1.0
    visible = [case for case in cases if np.abs(case.edit.result - case.source).mean() > 0.01]
    assert len(visible) > CASES // 2
    assert not any(case.is_correct(case.source) for case in visible)


def test_another_edit_is_not_correct():
    cases = general_cases(CASES)
    others = [cases[(i + 1) % CASES].edit.result for i in range(CASES)]
    assert general_accuracy(others) == 0.0


def test_summary_of_exact_effects():
    rng = np.random.default_rng(8)
    outputs = {
        name: np.stack([EFFECTS[name].apply(s, rng) for s in held_out_sources(2)]) for name in ("thermal", "snow")
    }
    row = Measured({}, judge_effects(outputs), 0.5).row()
    assert row["effect_accuracy"] == 1.0
    assert row["bad_case_rate"] == row["bad_case_rate_stochastic"] == 0.0
    assert row["psnr"] == pytest.approx(100)  # of thermal only: snow has no PSNR
    assert row["per_effect"] == {"thermal": 1.0, "snow": 1.0}
    assert row["general_accuracy"] == 0.5


def test_unchanged_outputs_are_bad_cases():
    outputs = {"thermal": held_out_sources(2), "snow": held_out_sources(2)}
    row = Measured({}, judge_effects(outputs), None).row()
    assert row["effect_accuracy"] == 0.0
    assert row["bad_case_rate"] == 1.0
    assert row["subject_alignment"] == 0.0
    assert len(judges(2)) == 2
