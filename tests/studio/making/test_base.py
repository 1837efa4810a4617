"""The first stages of the build: a decoder and a base that go on where they stopped, measured on held-out photographs."""

import json

import numpy as np
import pytest
import torch

from clora.models.loading import load_pipeline
from clora.studio.assets import pipeline_folder, studio_adapter
from clora.studio.edits import FAMILIES, objects
from clora.studio.evaluation import general_cases
from clora.studio.making import base, vae
from clora.studio.making.pipelines import save_pipeline
from clora.studio.photographs import load_photographs
from clora.studio.pixels import to_tensor
from clora.studio.quality import base_quality, vae_quality
from clora.studio.scenes import make_scene, render


class Stopped(Exception):
    """Stands for a machine that stops."""


def stop_at(last):
    def report(update, values):
        if update == last:
            raise Stopped

    return report


def ignore(update, values):
    pass


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(vae, "SAMPLES", 8)
    monkeypatch.setattr(vae, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(base, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(base, "ROWS", {64: 2, 128: 1})


def test_a_stopped_autoencoder_goes_on(small, tmp_path):
    arguments = (4, 0, tmp_path / "state.safetensors", load_photographs(), torch.device("cpu"))
    whole = vae.train_vae(*arguments[:2], tmp_path / "other.safetensors", *arguments[3:], ignore)
    with pytest.raises(Stopped):
        vae.train_vae(*arguments, stop_at(3))
    resumed = vae.train_vae(*arguments, ignore)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)
    found = vae_quality(resumed, 2)
    assert set(found) == {"vae_psnr_64", "vae_psnr_128"}


def test_a_stopped_base_goes_on(small, tmp_path):
    def train(checkpoint, report):
        torch.manual_seed(0)
        pipeline = load_pipeline(str(pipeline_folder()), "cpu")
        pipeline.transformer = base.make_transformer()
        base.train_base(pipeline, base.Phase(6, fixed=2, small=0.5), 0, checkpoint, load_photographs(), report)
        return pipeline

    whole = train(tmp_path / "other.safetensors", ignore)
    with pytest.raises(Stopped):
        train(tmp_path / "state.safetensors", stop_at(5))
    resumed = train(tmp_path / "state.safetensors", ignore)
    for name, weight in whole.transformer.state_dict().items():
        torch.testing.assert_close(resumed.transformer.state_dict()[name], weight, rtol=0, atol=0)


def test_quality_knows_exact_results(monkeypatch):
    cases = general_cases(4, 64)
    assert all(case.is_correct(case.edit.result) for case in cases)
    assert not any(case.is_correct(case.edit.source) for case in cases if case.edit.family != "keep")
    adapter = studio_adapter(load_pipeline(str(pipeline_folder()), "cpu"))
    monkeypatch.setattr(
        "clora.studio.quality.base_outputs", lambda adapter, count: np.stack([case.edit.result for case in cases])
    )
    found = base_quality(adapter, 4)
    assert found["general_accuracy"] == 1
    assert all(value == 100 for value in found["psnr"].values())


def test_a_saved_tokenizer_is_the_one_that_was_loaded(tmp_path):
    pipeline = load_pipeline(str(pipeline_folder()), "cpu")
    words = pipeline.tokenizer.backend_tokenizer
    words.no_truncation()
    words.no_padding()
    before = json.loads(words.to_str())
    studio_adapter(pipeline).encode_prompts(["make it warm"])
    save_pipeline(pipeline, tmp_path)
    assert json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text()) == before


def test_one_product_stands_in_for_the_encoder():
    adapter = studio_adapter(load_pipeline(str(pipeline_folder()), "cpu"))
    pictures = to_tensor(np.stack([render(make_scene(i, "held_out")) for i in range(4)]))
    expected = adapter.encode_images(pictures)
    error = base.linear_encoder(adapter)(pictures) - expected
    assert error.square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()


def test_shares_decide_what_is_drawn():
    edits = base.draw_edits(64, np.random.default_rng(0), {"dots": 1.0, "warm": 3.0, "blur": 0.0})
    families = [edit.family for edit in edits]
    assert set(families) == {"dots", "warm"}
    assert families.count("warm") > families.count("dots")
    of_objects = sum(base.FOCUS[name] for name in objects.FAMILIES) / sum(base.FOCUS.values())
    assert 0.2 < of_objects < 0.4
    for phase in base.PHASES:
        assert phase.shares is None or phase.shares.keys() == FAMILIES.keys()
