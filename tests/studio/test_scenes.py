"""Scenes and general edits: seeded, in range, exact."""

import numpy as np
import pytest

from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.scenes import Background, Scene, Shape, coverage, make_scene, render

FLAT = Background("plain", ("blue", "blue"), 0.0, 20.0, 0.0, 0.0, 0)


def test_a_seed_names_one_scene():
    assert make_scene(3) == make_scene(3)
    assert make_scene(3) != make_scene(4)
    np.testing.assert_array_equal(render(make_scene(3)), render(make_scene(3)))


def test_shapes_of_a_scene_have_distinct_names():
    for seed in range(50):
        names = [shape.name for shape in make_scene(seed).shapes]
        assert 1 <= len(names) == len(set(names)) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_images_are_float32_in_range(seed):
    image = render(make_scene(seed))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_a_shape_is_drawn_where_it_is():
    circle = Shape("circle", "red", (20.0, 40.0), 8.0, 0.0, 0.0)
    image = render(Scene(FLAT, (circle,)))
    np.testing.assert_allclose(image[40, 20], (0.86, 0.14, 0.14), atol=1e-5)  # row y, column x
    np.testing.assert_allclose(image[20, 40], (0.15, 0.28, 0.85), atol=1e-5)
    assert coverage(circle).sum() == pytest.approx(np.pi * 64, rel=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_edit_is_seeded_and_shows(family):
    scene = make_scene(12)
    edit = sample_edit(scene, np.random.default_rng(0), family)
    again = sample_edit(scene, np.random.default_rng(0), family)
    assert edit.instruction == again.instruction
    assert "{" not in edit.instruction
    np.testing.assert_array_equal(edit.result, again.result)
    assert edit.result.dtype == np.float32
    changed = np.abs(edit.result - render(scene)).mean()
    assert (changed == 0) == (family == "keep")


def test_remove_restores_what_was_behind():
    shape = Shape("square", "white", (32.0, 32.0), 10.0, 0.0, 0.0)
    edit = sample_edit(Scene(FLAT, (shape,)), np.random.default_rng(0), "remove")
    np.testing.assert_array_equal(edit.result, render(Scene(FLAT, ())))
    assert "white square" in edit.instruction
