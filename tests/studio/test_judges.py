"""Judges against exact results of every effect, clean and degraded like a VAE round trip."""

import numpy as np
import pytest

from clora.studio import judges
from clora.studio.effects import EFFECTS
from clora.studio.effects.filters import cell_mean, gaussian_blur, upsample
from clora.studio.judges import UNCHANGED, Judge, features, psnr, ssim
from clora.studio.scenes import make_scene, render

SCENES = (21, 22, 23)
JUDGE_SEED, OUTPUT_SEED = 0, 1


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    return [render(make_scene(seed)) for seed in SCENES]


@pytest.fixture(scope="module")
def judged(sources) -> list[Judge]:
    return [Judge.for_source(source, JUDGE_SEED) for source in sources]


def exact(name: str, source: np.ndarray) -> np.ndarray:
    return EFFECTS[name].apply(source, np.random.default_rng(OUTPUT_SEED))


def degraded(image: np.ndarray) -> np.ndarray:
    """A mild blur and noise at 30 dB stand in for a VAE round trip."""
    noise = np.random.default_rng(2).standard_normal(image.shape)
    return np.clip(gaussian_blur(image, 0.6) + 0.0316 * noise, 0, 1).astype(np.float32)


@pytest.mark.parametrize("degrade", [np.copy, degraded], ids=["clean", "vae_like"])
def test_fresh_exact_results_are_recognised(sources, judged, degrade):
    wrong = []
    for source, judge in zip(sources, judged, strict=True):
        verdicts = {name: judge.score(degrade(exact(name, source)), name) for name in EFFECTS}
        wrong += [(name, verdict.nearest) for name, verdict in verdicts.items() if not verdict.accurate]
    assert len(wrong) <= 0.01 * len(SCENES) * len(EFFECTS), wrong


def test_fresh_draws_of_stochastic_effects_count_as_strong(sources, judged):
    strengths = [
        judge.score(exact(name, source), name).strength
        for source, judge in zip(sources, judged, strict=True)
        for name, effect in EFFECTS.items()
        if effect.stochastic
    ]
    assert np.median(strengths) >= 0.6
    assert np.mean(np.array(strengths) >= judges.STRENGTH_FLOOR) >= 0.95


def test_exact_deterministic_result_is_perfect(sources, judged):
    verdict = judged[0].score(exact("thermal", sources[0]), "thermal")
    assert verdict.nearest == "thermal"
    assert verdict.accurate
    assert not verdict.bad_case
    assert verdict.strength == pytest.approx(1.0, abs=1e-3)
    assert verdict.psnr > 60
    assert verdict.subject_alignment == pytest.approx(5.0, abs=1e-3)


@pytest.mark.parametrize("name", EFFECTS)
def test_unchanged_source_is_a_bad_case(name, sources, judged):
    verdict = judged[0].score(sources[0], name)
    assert verdict.nearest == UNCHANGED
    assert verdict.bad_case
    assert not verdict.accurate
    assert verdict.strength == 0.0
    assert verdict.subject_alignment == 0.0


def test_another_effect_is_a_bad_case(sources, judged):
    verdict = judged[0].score(exact("sepia", sources[0]), "negative")
    assert verdict.nearest == "sepia"
    assert verdict.bad_case


@pytest.mark.parametrize("name", ["negative", "scanlines", "cartoon", "snow", "rain", "confetti"])
def test_weak_and_blurred_versions_lose_strength(name, sources, judged):
    full = exact(name, sources[0])
    strengths = [
        judged[0].score(output, name).strength for output in (full, gaussian_blur(full, 1.5), gaussian_blur(full, 4.0))
    ]
    assert strengths[0] > strengths[1]
    # Of confetti nothing is left after either.
    assert strengths[1] > strengths[2] or strengths[1] == 0
    weak = judged[0].score(sources[0] + 0.3 * (full - sources[0]), name)
    assert weak.strength < strengths[0]


def test_psnr_is_for_deterministic_effects_only(sources, judged):
    assert judged[0].score(sources[0], "snow").psnr is None
    expected = psnr(sources[0], exact("negative", sources[0]))
    assert judged[0].score(sources[0], "negative").psnr == pytest.approx(expected)


def test_judge_is_reproducible_and_its_draws_do_not_depend_on_the_library(sources, judged):
    small = {name: EFFECTS[name] for name in ("snow", "negative")}
    judge = Judge.for_source(sources[0], JUDGE_SEED, effects=small)
    output = exact("snow", sources[0])
    assert judge.score(output, "snow").distance == judged[0].score(output, "snow").distance
    assert judge.names == ("snow", "negative", UNCHANGED)


def test_distances_are_those_of_the_verdicts(sources, judged):
    names = ["negative", "snow", "confetti"]
    outputs = np.stack([exact(name, sources[0]) for name in names])
    distances = judged[0].distances(outputs)
    assert distances.shape == (len(names), len(EFFECTS) + 1)
    for output, name, row in zip(outputs, names, distances, strict=True):
        verdict = judged[0].score(output, name)
        assert row[judged[0].names.index(name)] == pytest.approx(verdict.distance, abs=1e-6)
        assert judged[0].names[row.argmin()] == verdict.nearest


def test_features_do_not_depend_on_the_batch(sources):
    batch = np.stack([exact(name, sources[0]) for name in list(EFFECTS)[: judges.CHUNK + 3]])
    one_by_one = np.concatenate([features(image[None]) for image in batch])
    np.testing.assert_allclose(features(batch), one_by_one, atol=1e-5)


def test_features_average_down_to_64_pixels(sources):
    large = np.random.default_rng(3).random((judges.CHUNK + 1, 128, 128, 3), dtype=np.float32)
    small = np.stack([cell_mean(image, 64) for image in large])
    np.testing.assert_allclose(features(large), features(small), atol=1e-5)
    np.testing.assert_allclose(judges.low_frequency(large), judges.low_frequency(small), atol=1e-6)


def test_a_judge_of_128_pixels_scores_as_one_of_64(sources):
    # Of scattered marks a larger picture has more, not larger ones.
    effects = {name: EFFECTS[name] for name in ("negative", "sepia", "mirror")}
    large, small = upsample(sources[0], 128), sources[0]
    for name in effects:
        verdicts = [
            Judge.for_source(image, JUDGE_SEED, effects).score(exact(name, image), name) for image in (large, small)
        ]
        assert all(verdict.accurate and not verdict.bad_case for verdict in verdicts)
        assert verdicts[0].distance == pytest.approx(verdicts[1].distance, abs=0.02)
        assert verdicts[0].subject_alignment == pytest.approx(verdicts[1].subject_alignment, abs=0.2)


def test_every_effect_moves_the_features_more_than_noise_does(sources, judged):
    noise = np.linalg.norm(features(degraded(sources[0])[None]) - judged[0].vectors[-1])
    nearest = np.linalg.norm(judged[0].vectors[:-1] - judged[0].vectors[-1], axis=1).min()
    assert nearest > noise


def test_an_effect_without_effect_has_no_strength():
    flat = np.full((64, 64, 3), 0.5, np.float32)
    judge = Judge.for_source(flat, 0, effects={"mirror": EFFECTS["mirror"]})
    verdict = judge.score(flat, "mirror")
    assert verdict.strength == 0.0
    assert verdict.bad_case


def test_ssim_bounds(sources):
    assert ssim(sources[0], sources[0]) == pytest.approx(1.0, abs=1e-4)
    assert ssim(sources[0], gaussian_blur(sources[0], 3.0)) < 0.95
    assert ssim(sources[0], 1 - sources[0]) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda judge: judge.score(np.zeros((64, 64, 3)), "snwo"), "unknown effect 'snwo'.*snow"),
        (lambda judge: judge.score(np.zeros((8, 8, 3)), "snow"), r"\[1, 8, 8, 3\]"),
        (lambda judge: judge.score(np.zeros((96, 96, 3)), "snow"), r"multiple of 64, got \[1, 96, 96, 3\]"),
        (lambda judge: judge.score(np.zeros((128, 128, 3)), "negative"), r"shape \[64, 64, 3\], got \[128, 128, 3\]"),
        (lambda judge: judge.score(np.full((64, 64, 3), np.nan), "snow"), "NaN"),
    ],
    ids=["name", "shape", "side", "other_size", "nan"],
)
def test_bad_input_is_a_clear_error(call, message, judged):
    with pytest.raises(ValueError, match=message):
        call(judged[0])
