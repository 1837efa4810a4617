"""``clora.apply`` on a pipeline that carries the user's own LoRAs: what it changes, restores and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.collection_cases import describe, effect
from helpers.families import bare_pipeline, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clora
from clora.collection.metadata import LORA_FILE, WEIGHTS_DIGEST
from clora.collection.write import write_collection
from clora.errors import CloraError
from clora.lora.convert import convert_lora
from clora.lora.save import save_lora
from clora.testing import merge_lora, random_lora

KLEIN = "Flux2KleinPipeline"


@pytest.fixture
def student():
    return random_lora(bare_pipeline(KLEIN).transformer, 4, 7)


@pytest.fixture
def folder(student, tmp_path):
    return write_collection(student, describe(effect("snow"), pipeline=KLEIN), tmp_path / "c", torch.float32)


@pytest.fixture
def pipeline(tmp_path):
    """Two LoRAs of the user's, the first at half strength, the second not active."""
    pipeline = bare_pipeline(KLEIN)
    for name, seed in (("mine", 1), ("other", 2)):
        save_lora(random_lora(bare_pipeline(KLEIN).transformer, 3, seed), tmp_path / f"{name}.safetensors")
        pipeline.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
    pipeline.set_adapters(["mine"], [0.5])
    return pipeline


def failing(pipeline, monkeypatch, error):
    load = pipeline.load_lora_weights

    def broken(*args, **kwargs):
        load(*args, **kwargs)
        raise error

    monkeypatch.setattr(pipeline, "load_lora_weights", broken)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_refused_collection_leaves_strengths_and_switches(folder, pipeline, monkeypatch, disabled):
    if disabled:
        pipeline.disable_lora()
    before = run(KLEIN, pipeline.transformer)
    failing(pipeline, monkeypatch, ValueError("no"))
    with pytest.raises(CloraError, match="could not be loaded; the pipeline is as it was: no"):
        clora.apply(pipeline, folder)
    assert torch.equal(run(KLEIN, pipeline.transformer), before)
    pipeline.enable_lora()
    enabled = run(KLEIN, pipeline.transformer)
    assert torch.equal(enabled, before) != disabled
    assert set(pipeline.transformer.peft_config) == {"mine", "other"}
    assert pipeline.get_active_adapters() == ["mine"]


def test_ctrl_c_leaves_the_pipeline_as_it_was(folder, pipeline, monkeypatch):
    before = run(KLEIN, pipeline.transformer)
    failing(pipeline, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        clora.apply(pipeline, folder)
    assert torch.equal(run(KLEIN, pipeline.transformer), before)
    assert set(pipeline.transformer.peft_config) == {"mine", "other"}


def test_several_active_ones_stay_active(folder, pipeline, monkeypatch):
    pipeline.set_adapters(["mine", "other"], [0.5, -0.25])
    before = run(KLEIN, pipeline.transformer)
    failing(pipeline, monkeypatch, RuntimeError("no"))
    with pytest.raises(CloraError, match="as it was"):
        clora.apply(pipeline, folder)
    assert torch.equal(run(KLEIN, pipeline.transformer), before)


@pytest.mark.parametrize("disabled", [False, True])
def test_only_the_collection_is_active(folder, pipeline, student, disabled):
    """Also where the user had switched all LoRAs off."""
    if disabled:
        pipeline.disable_lora()
    clora.apply(pipeline, folder)
    merged = run(KLEIN, merge_lora(bare_pipeline(KLEIN).transformer, student))
    torch.testing.assert_close(run(KLEIN, pipeline.transformer), merged, rtol=0, atol=1e-5)
    pipeline.set_adapters(["mine"], [0.5])  # the user's are still there
    assert not torch.allclose(run(KLEIN, pipeline.transformer), merged)


def test_fused_loras_are_refused(folder, pipeline):
    """PEFT runs only the merged weight, so that the collection would do nothing."""
    pipeline.fuse_lora()
    before = run(KLEIN, pipeline.transformer)
    with pytest.raises(
        CloraError, match=r"the LoRAs mine are fused into the transformer.*call pipe.unfuse_lora\(\) first"
    ):
        clora.apply(pipeline, folder)
    assert torch.equal(run(KLEIN, pipeline.transformer), before)
    pipeline.unfuse_lora()
    clora.apply(pipeline, folder)


def test_an_attached_transformer_is_refused(folder, student):
    pipeline = bare_pipeline(KLEIN)
    bank = clora.attach(pipeline, {"a": student})
    with pytest.raises(CloraError, match=r"under clora.attach .*call detach\(\)"):
        clora.apply(pipeline, folder)
    bank.detach()
    clora.apply(pipeline, folder)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_too_little_memory_is_told_as_such(folder, pipeline, monkeypatch, error):
    failing(pipeline, monkeypatch, error)
    with pytest.raises(CloraError, match="could not be loaded; the pipeline is as it was: .*out of memory"):
        clora.apply(pipeline, folder)


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_weights_that_are_not_the_stated_ones(folder, pipeline):
    file = folder / LORA_FILE
    metadata = metadata_of(file)
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 0.25
    save_file(tensors, file, metadata)
    before = run(KLEIN, pipeline.transformer)
    with pytest.raises(CloraError, match="its weights are not those that its metadata states"):
        clora.apply(pipeline, folder)
    assert torch.equal(run(KLEIN, pipeline.transformer), before)
    del metadata[WEIGHTS_DIGEST]  # as earlier versions wrote it
    save_file(tensors, file, metadata)
    clora.apply(pipeline, folder)


def test_a_converted_collection_states_no_digest_of_other_weights(folder, pipeline, tmp_path):
    assert WEIGHTS_DIGEST in metadata_of(folder / LORA_FILE)
    smaller = tmp_path / "smaller.safetensors"
    convert_lora(folder, smaller, "diffusers", rank=2)
    assert json.loads(metadata_of(smaller)["clora.effects"])
    assert list(clora.apply(pipeline, smaller)) == ["snow"]
