"""Scenes on photographs and general edits: seeded, in range, exact, the same picture at every size."""

import numpy as np
import pytest

from clora.studio.edits import FAMILIES, sample_edit, scattering
from clora.studio.effects.filters import gaussian_blur
from clora.studio.photographs import SPLITS, load_photographs
from clora.studio.scenes import Part, Pattern, Scene, Shape, Thing, make_scene, painted, render

FLAT = Pattern("plain", ("blue", "blue"), 0.0, 20.0, 0.0, 0.0, 0)


def test_a_seed_names_one_scene():
    np.testing.assert_array_equal(render(make_scene(3)), render(make_scene(3)))
    assert np.abs(render(make_scene(3)) - render(make_scene(4))).mean() > 0.01


def test_objects_of_a_scene_have_distinct_names():
    kinds = set()
    for seed in range(60):
        scene = make_scene(seed, min_objects=1)
        names = [thing.name for thing in scene.objects]
        assert 1 <= len(names) == len(set(names)) <= 3
        assert sum(isinstance(thing, Thing) for thing in scene.objects) <= 1
        kinds |= {type(scene.background), *map(type, scene.objects)}
    assert kinds == {Part, Pattern, Shape, Thing}
    assert any(not make_scene(seed).objects for seed in range(60))


def test_splits_share_no_picture():
    photographs = load_photographs()
    pictures = {split: {id(picture) for picture in photographs.backgrounds(split)} for split in SPLITS}
    cutouts = {split: {id(cutout.image) for cutout in photographs.cutouts(split)} for split in SPLITS}
    for split in SPLITS:
        for seed in range(40):
            scene = make_scene(seed, split)
            if isinstance(scene.background, Part):
                assert id(scene.background.photograph) in pictures[split]
            for thing in scene.objects:
                assert isinstance(thing, Shape) or id(thing.cutout.image) in cutouts[split]


@pytest.mark.parametrize("seed", range(5))
def test_images_are_float32_in_range(seed):
    image = render(make_scene(seed), 128)
    assert image.shape == (128, 128, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


def halved(image):
    return image.reshape(64, 2, 64, 2, 3).mean((1, 3))


@pytest.mark.parametrize("seed", range(6))
def test_a_scene_is_the_same_picture_at_every_size(seed):
    scene = make_scene(seed, min_objects=1)
    if isinstance(scene.background, Pattern):
        scene = Scene(FLAT, scene.objects)  # noise is drawn for each pixel
    assert np.sqrt(((halved(render(scene, 128)) - render(scene, 64)) ** 2).mean()) < 0.05


def test_a_shape_is_drawn_where_it_is():
    circle = Shape("circle", "red", (20.0, 40.0), 8.0, 0.0, 0.0)
    image = render(Scene(FLAT, (circle,)))
    np.testing.assert_allclose(image[40, 20], (0.86, 0.14, 0.14), atol=1e-5)  # row y, column x
    np.testing.assert_allclose(image[20, 40], (0.15, 0.28, 0.85), atol=1e-5)
    for size in (64, 128):
        assert painted(circle, size)[1].sum() == pytest.approx(np.pi * 64 * (size / 64) ** 2, rel=0.03)


def test_a_cut_out_is_drawn_where_it_is():
    cutout = load_photographs().cutouts("train")[0]
    for size in (64, 128):
        _, cover = painted(Thing(cutout, (32.0, 32.0), 16.0, False), size)
        rows, cols = np.nonzero(cover > 0.5)
        for axis in (rows, cols):
            assert (axis.min() + axis.max()) / 2 == pytest.approx(size / 2, abs=size / 20)
        assert max(np.ptp(rows), np.ptp(cols)) == pytest.approx(size / 2, abs=size / 20)


def test_a_cut_out_has_a_white_rim():
    cutout = load_photographs().cutouts("train")[0]
    for colour in (None, "red"):
        colours, cover = painted(Thing(cutout, (32.0, 32.0), 16.0, False, colour), 128)
        outermost = (cover > 0.9) & (gaussian_blur(cover, 1.0) < 0.7)
        assert colours[outermost].mean() > 0.8
        assert colours[gaussian_blur(cover, 2.0) > 0.99].mean() < 0.8


def test_objects_lie_apart():
    several = [scene.objects for scene in map(make_scene, range(80)) if len(scene.objects) > 1]
    assert len(several) > 20
    for objects in several:
        assert sum(painted(thing)[1] for thing in objects).max() <= 1.001


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_edit_is_seeded_and_shows(family):
    scene = make_scene(12, min_objects=1)
    edit = sample_edit(scene, np.random.default_rng(0), family)
    again = sample_edit(scene, np.random.default_rng(0), family)
    assert edit.instruction == again.instruction
    assert "{" not in edit.instruction
    np.testing.assert_array_equal(edit.result, again.result)
    np.testing.assert_array_equal(edit.source, render(scene))
    assert edit.result.dtype == np.float32
    changed = np.abs(edit.result - edit.source).mean()
    assert (changed == 0) == (family == "keep")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in scattering.FAMILIES])
def test_an_edit_is_the_same_picture_at_every_size(family):
    scene = Scene(make_scene(0).background, make_scene(12, min_objects=1).objects)
    assert isinstance(scene.background, Part)
    small, large = (sample_edit(scene, np.random.default_rng(0), family, size).result for size in (64, 128))
    # Lines of drawings, and sharpened edges, depend on details that the small picture has not.
    bound = 0.3 if family in ("edges", "sharpen", "relief") else 0.1
    assert np.sqrt(((halved(large) - small) ** 2).mean()) < bound


def test_a_scene_without_objects_is_not_asked_for_them():
    scene = Scene(make_scene(0).background, ())
    rng = np.random.default_rng(0)
    assert not any(FAMILIES[sample_edit(scene, rng).family].of_objects for _ in range(100))


@pytest.mark.parametrize("object_", [Shape("square", "white", (32.0, 32.0), 10.0, 0.0, 0.0), "cutout"])
def test_remove_restores_what_was_behind(object_):
    if object_ == "cutout":
        object_ = Thing(load_photographs().cutouts("train")[3], (30.0, 30.0), 12.0, True)
    background = make_scene(0).background
    edit = sample_edit(Scene(background, (object_,)), np.random.default_rng(0), "remove")
    np.testing.assert_array_equal(edit.result, render(Scene(background, ())))
    assert object_.name in edit.instruction
