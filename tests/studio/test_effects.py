"""The library of effects: exact image functions with texts."""

import re

import numpy as np
import pytest

from clora.studio.effects import EFFECTS
from clora.studio.effects.filters import (
    cell_mean,
    clouds,
    gaussian_blur,
    gradients,
    grid,
    outlines,
    sampled,
    smooth_regions,
)
from clora.studio.effects.marks import draw_marks
from clora.studio.scenes import make_scene, render

# Sharp outlines and fine noise: where a pixel's centre lies, hence the size, decides on which side of an outline it is.
HARD_OUTLINES = {
    *("cyanotype", "blueprint", "pencil_sketch", "neon_edges", "cartoon", "chalkboard", "watercolour", "stained_glass"),
    *("lamp_wall", "toy_bricks", "scanlines", "gold_frame", "frost", "torn_paper", "broken_glass", "film_grain"),
    *("laser_beams", "lens_flare", "lightning"),
}
STOCHASTIC = [name for name, effect in EFFECTS.items() if effect.stochastic]
MARKS = [name for name in STOCHASTIC if name not in ("colour_static", "film_grain")]


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return render(make_scene(11))


def test_every_effect_has_its_own_name():
    assert 50 <= len(EFFECTS) <= 60
    assert all(name == effect.name and re.fullmatch(r"[a-z_]+", name) for name, effect in EFFECTS.items())


def test_texts_are_short_plain_english_and_descriptions_unique():
    for effect in EFFECTS.values():
        assert re.fullmatch(r"[a-z ]+", effect.prompt), effect.prompt
        assert re.fullmatch(r"[a-z ,']+", effect.description), effect.description
        assert 6 <= len(effect.prompt.split()) <= 12, effect.prompt
        assert 10 <= len(effect.description.split()) <= 22, effect.description
    assert len({effect.prompt for effect in EFFECTS.values()}) == len(EFFECTS)
    assert len({effect.description for effect in EFFECTS.values()}) == len(EFFECTS)


@pytest.mark.parametrize("name", EFFECTS)
def test_effect_is_a_pure_image_function(name, source):
    effect, before = EFFECTS[name], source.copy()
    first = effect.apply(source, np.random.default_rng(5))
    assert first.dtype == np.float32
    assert first.shape == (64, 64, 3)
    assert np.isfinite(first).all()
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(source, before)
    assert not np.shares_memory(first, source)
    np.testing.assert_array_equal(first, effect.apply(source, np.random.default_rng(5)))
    other_draw = effect.apply(source, np.random.default_rng(6))
    assert np.array_equal(first, other_draw) != effect.stochastic


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """A picture of soft patches, 128x128."""
    noise = np.random.default_rng(0).random((128, 128, 3)).astype(np.float32)
    patches = gaussian_blur(noise, 5.0)
    return np.clip(0.5 + 6 * (patches - patches.mean()), 0, 1).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in EFFECTS if name not in MARKS])
def test_effect_is_the_same_picture_at_twice_the_size(name, smooth):
    effect = EFFECTS[name]
    large = effect.apply(smooth, np.random.default_rng(5))
    assert large.dtype == np.float32
    assert large.shape == (128, 128, 3)
    assert np.isfinite(large).all()
    assert large.min() >= 0
    assert large.max() <= 1
    np.testing.assert_array_equal(large, effect.apply(smooth, np.random.default_rng(5)))
    small = effect.apply(cell_mean(smooth, 64), np.random.default_rng(5))
    difference = np.sqrt(((cell_mean(large, 64) - small) ** 2).mean())
    assert difference < (0.05 if name in HARD_OUTLINES else 0.006)


@pytest.mark.parametrize("name", MARKS)
def test_marks_cover_as_much_of_a_larger_picture(name, smooth):
    # What differs between draws is where the marks lie.
    spread = [
        np.stack([EFFECTS[name].apply(source, np.random.default_rng(seed)) for seed in range(12)]).std(axis=0).mean()
        for source in (cell_mean(smooth, 64), smooth)
    ]
    assert spread[1] == pytest.approx(spread[0], rel=0.15)


@pytest.mark.parametrize("radii", [(1.2, 2.2), (2.4, 3.5)])
def test_marks_lie_within_their_cells(radii):
    marks = draw_marks(128, np.random.default_rng(0), 0.5, radii)
    mask = marks.discs()
    cells = mask.reshape(16, 8, 16, 8).transpose(0, 2, 1, 3).reshape(256, 8, 8)
    there = cells.max(axis=(1, 2)) > 0
    assert 0.35 < there.mean() < 0.65
    # Whole discs: as large as their radius says.
    radius = marks.radius.reshape(16, 8, 16, 8)[:, 0, :, 0].ravel()
    np.testing.assert_array_equal(there, radius > 0)
    np.testing.assert_allclose(cells.sum(axis=(1, 2))[there], np.pi * radius[there] ** 2, rtol=0.1)


def test_marks_turn_by_an_angle_of_their_own():
    marks = draw_marks(64, np.random.default_rng(0), 1.0, (3.0, 3.0))
    turned = marks.turned(np.random.default_rng(1), (0.3, 0.4))
    np.testing.assert_allclose(turned.distance, marks.distance, rtol=1e-4)
    angle = np.angle((marks.x + 1j * marks.y) / (turned.x + 1j * turned.y))
    assert 0.299 < angle.min() < angle.max() < 0.401
    assert len(np.unique(angle.round(4))) > 32  # of 64 marks


def test_marks_are_drawn_in_several_ways():
    marks = draw_marks(64, np.random.default_rng(0), 1.0, (3.0, 3.0))
    disc, ring, stroke, glow = marks.discs(), marks.rings(1.0), marks.strokes(1.0), marks.glows()
    for part in (ring, stroke, glow):
        assert (part <= disc + 1e-6).all()
        assert 0.1 * disc.sum() < part.sum() < 0.7 * disc.sum()
    assert ring[marks.distance < 1.4].max() == 0
    assert stroke[np.abs(marks.x) > 1.1].max() == 0
    assert glow[marks.distance < 0.4].min() > 0.7
    values = np.eye(3, dtype=np.float32)
    cells = marks.one_of(values, np.random.default_rng(2)).reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4)
    assert (cells == cells[:, :, :1, :1]).all()
    assert {tuple(value) for value in cells[:, :, 0, 0].reshape(-1, 3)} == {tuple(value) for value in values}


def test_filters_count_in_units(smooth):
    small = cell_mean(smooth, 64)
    for large, expected in zip(grid(128), grid(64), strict=True):
        np.testing.assert_allclose(cell_mean(large[..., None], 64)[..., 0], expected)
    for large, expected in zip(gradients(smooth), gradients(small), strict=True):
        np.testing.assert_allclose(cell_mean(large, 64)[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-5)
    np.testing.assert_allclose(cell_mean(gaussian_blur(smooth, 2.0), 64), gaussian_blur(small, 2.0), atol=1e-3)
    noise = np.random.default_rng(1).random((8, 8))
    np.testing.assert_allclose(cell_mean(clouds(noise, 128)[..., None], 64)[..., 0], clouds(noise, 64), atol=0.01)


def test_sampled_looks_up_positions_in_units(smooth):
    np.testing.assert_allclose(sampled(smooth, *grid(128)), smooth, atol=1e-6)
    rows, cols = grid(128)
    np.testing.assert_allclose(sampled(smooth, rows + 2, cols)[:124], smooth[4:], atol=1e-5)


def test_smooth_regions_flatten_texture_and_keep_edges():
    step = np.where(np.arange(64) < 32, 0.2, 0.8)[None, :, None] * np.ones((64, 1, 3))
    noisy = np.float32(step + 0.05 * np.random.default_rng(0).standard_normal(step.shape))
    smoothed = smooth_regions(noisy, 3)
    assert (smoothed - step)[:, :28].std() < 0.6 * 0.05
    assert np.abs(smoothed - step)[:, 30:34].max() < 0.15


def test_outlines_follow_an_edge_and_not_the_grain_beside_it():
    image = np.where(np.arange(64) < 32, 0.2, 0.8)[None, :, None] * np.ones((64, 1, 3))
    image = np.float32(image + 0.03 * np.random.default_rng(0).standard_normal(image.shape))
    lines = outlines(image)
    assert lines[:, 29:35].max(axis=1).min() > 0.8
    assert lines[:, :26].mean() < 0.05
    assert lines[:, 38:].mean() < 0.05
    assert not outlines(np.full((64, 64, 3), 0.5, np.float32)).any()


@pytest.mark.parametrize("name", EFFECTS)
def test_effect_survives_flat_images(name):
    for value, size in ((0.0, 64), (1.0, 64), (0.5, 192)):
        result = EFFECTS[name].apply(np.full((size, size, 3), value, np.float32), np.random.default_rng(0))
        assert result.shape == (size, size, 3)
        assert np.isfinite(result).all()


def test_effects_differ_visibly_from_each_other_and_from_the_source(source):
    rng = np.random.default_rng(0)
    images = np.stack([source, *(effect.apply(source, rng) for effect in EFFECTS.values())]).reshape(-1, 64 * 64 * 3)
    # Root mean square over pixels; 0.05 is 26 dB.
    distance = np.sqrt(np.stack([((images - image) ** 2).mean(axis=1) for image in images]))
    np.fill_diagonal(distance, 1.0)
    first, second = np.unravel_index(distance.argmin(), distance.shape)
    names = ["unchanged", *EFFECTS]
    assert distance.min() > 0.05, (names[first], names[second])


def test_deterministic_effect_draws_nothing(source):
    rng = np.random.default_rng(1)
    EFFECTS["cartoon"].apply(source, rng)
    assert rng.random() == np.random.default_rng(1).random()


@pytest.mark.parametrize("shape", [(32, 32, 3), (96, 96, 3), (64, 128, 3), (0, 0, 3), (64, 64)])
def test_wrong_size_is_an_error(shape):
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        EFFECTS["negative"].apply(np.zeros(shape, np.float32), np.random.default_rng(0))


def test_negative_and_pixelate_are_exact(source):
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(EFFECTS["negative"].apply(source, rng), 1 - source, atol=1e-6)
    cells = EFFECTS["pixelate"].apply(source, rng)
    np.testing.assert_allclose(cells[8:12, 4:8], source[8:12, 4:8].mean(axis=(0, 1)) * np.ones((4, 4, 1)), atol=1e-6)


def test_mirror_is_symmetric(source):
    result = EFFECTS["mirror"].apply(source, np.random.default_rng(0))
    np.testing.assert_array_equal(result, result[:, ::-1])
    np.testing.assert_array_equal(result[:, :32], source[:, :32])
