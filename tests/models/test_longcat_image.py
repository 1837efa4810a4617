"""LongCat-Image-Edit: clora's samplers equal stock calls of the pipeline with the LoRA loaded into its transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny_longcat
from helpers.collection_cases import describe, student_scheduler
from helpers.edits import Sample, check_batch, condition, few_step, guided, received, stock_call
from helpers.pictures import picture, pixels
from helpers.tiny_longcat import MAX_SEQUENCE_LENGTH, tiny_adapter, tiny_pipeline
from safetensors.torch import load_file, save_file

import clora
from clora.collection.card import model_card
from clora.collection.metadata import read_collection, to_metadata
from clora.collection.write import LORA_FILE, write_collection
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.lora.save import save_lora
from clora.models import adapter_for
from clora.models.families.longcat_image import LongCatImageEditAdapter
from clora.testing import random_lora

SIZE = (64, 80)
PROMPTS = (
    "make it a blueprint with thin white lines",
    'write "snow" on it',
    "it's a warm sunset",
    "brighten the image",
)


@pytest.fixture(autouse=True)
def _shrunk(monkeypatch):
    tiny_longcat.shrink(monkeypatch)


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_longcat.shrink(monkeypatch)
        return tiny_adapter(size=SIZE)


@pytest.fixture(scope="module")
def loras(adapter):
    return {name: random_lora(adapter.pipeline.transformer, 2 + i, 40 + i) for i, name in enumerate("ab")}


def assert_carries(transformer, lora):
    """Every delta is the LoRA's, and no other layer has one."""
    loaded = {name: module for name, module in transformer.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(loaded) == set(lora.modules)
    (adapter,) = transformer.peft_config
    for name, layer in loaded.items():
        torch.testing.assert_close(layer.get_delta_weight(adapter), lora.modules[name].delta())


@pytest.mark.parametrize(
    ("size", "picture_size"),
    [((64, 64), (64, 64)), (SIZE, SIZE), (SIZE, (152, 190)), (SIZE, (40, 48)), ((80, 64), (81, 64))],
)
def test_few_steps_equal_a_stock_call(adapter, loras, tmp_path, size, picture_size):
    """Pictures of any size that has the proportions."""
    adapter = adapter_for(adapter.pipeline, size, MAX_SEQUENCE_LENGTH)
    sample = Sample(PROMPTS[0], (picture(0, picture_size),), "a", 11)
    with received(adapter) as calls:
        stock = stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0))
        ours = few_step(adapter, loras, [sample])
    for seen in (calls[:8], calls[8:]):
        assert torch.equal(torch.cat([call["timestep"] for call in seen]), student_schedule(8))
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    without = few_step(adapter, loras, [replace(sample, lora=None)])
    assert (without - stock).abs().max() > 0.01, "the LoRA changes nothing"


def test_a_batch_equals_stock_calls_of_its_samples(adapter, loras, tmp_path):
    """Different pictures, prompts and LoRAs, one of them the base."""
    samples = [Sample(PROMPTS[i], (picture(i, SIZE),), lora, 20 + i) for i, lora in enumerate(["b", "a", None, "b"])]
    check_batch(adapter, loras, samples, tmp_path)


@pytest.mark.parametrize("w", [0.0, 2.5])
def test_guided_teachers_equal_stock_calls(adapter, loras, tmp_path, w):
    """The pipeline's own scheduler, which shifts dynamically; its guidance scale is w + 1."""
    steps = 5
    samples = [Sample(PROMPTS[i], (picture(i, SIZE),), "b", seed) for i, seed in enumerate([4, 7])]
    with received(adapter) as calls:
        noise, ours = guided(adapter, loras, samples, condition(adapter, samples, "").text, steps, w)
    times = [call["timestep"] for call in calls[:steps]]
    for i, sample in enumerate(samples):
        with received(adapter) as calls:
            stock = stock_call(
                adapter, loras, sample, tmp_path, steps=steps, latents=noise[i : i + 1], guidance_scale=w + 1
            )
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)
        passes = 2 if w else 1
        assert len(calls) == steps * passes
        for time, call in zip(times, calls[::passes], strict=True):  # 1000 sigma / 1000: the last bit
            torch.testing.assert_close(time[i], call["timestep"][0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kwargs"), [(LORA_FILE, {}), ("", {"weight_name": LORA_FILE}), ("", {"use_safetensors": True})]
)
def test_a_collection_loads_whole(loras, tmp_path, name, kwargs):
    """By file, by folder with the name, and by folder with the type; only a folder is taken for a pickle's."""
    save_lora(loras["a"], tmp_path / LORA_FILE)
    transformer = tiny_pipeline().transformer
    transformer.load_lora_adapter(tmp_path / name, prefix="transformer", **kwargs)
    assert_carries(transformer, loras["a"])


@pytest.fixture
def collection(loras, tmp_path):
    """A collection of random weights, and its LoRA."""
    described = describe(pipeline="LongCatImageEditPipeline", call={"guidance_scale": 1.0})
    return write_collection(loras["a"], described, tmp_path / "collection", torch.float32)


def test_apply_loads_a_collection_into_the_transformer(loras, collection):
    pipeline = tiny_pipeline()
    effects = clora.apply(pipeline, collection)
    assert_carries(pipeline.transformer, loras["a"])
    assert pipeline.scheduler.config.stochastic_sampling
    assert effects["a"] == {"prompt": "p", "num_inference_steps": 8, "guidance_scale": 1.0}


def test_apply_takes_all_of_a_file_or_nothing(collection):
    tensors = load_file(collection / LORA_FILE)
    tensors["transformer.nothing.lora_A.weight"] = torch.ones(2, 8)
    tensors["transformer.nothing.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, collection / LORA_FILE, to_metadata(read_collection(collection)))
    pipeline = tiny_pipeline()
    with pytest.raises(CloraError, match="expected some/pipeline"):
        clora.apply(pipeline, collection)
    assert not getattr(pipeline.transformer, "peft_config", None)
    assert not pipeline.scheduler.config.stochastic_sampling


def test_the_card_loads_a_collection_into_the_transformer(loras, collection):
    """The card's own line is run."""
    (line,) = [
        line for line in model_card(read_collection(collection), str(collection)).splitlines() if "load_lora" in line
    ]
    pipeline = tiny_pipeline()
    exec(line, {"pipe": pipeline})
    assert_carries(pipeline.transformer, loras["a"])


def test_a_long_prompt_is_refused_and_none_is_cut(adapter):
    """Tokens of a word in quotation marks are its letters."""
    reference = [pixels(picture(0, SIZE))]
    fits = '"' + ("falling" * 9)[: MAX_SEQUENCE_LENGTH - 2] + '"'
    assert len(adapter.pipeline.tokenizer(fits).input_ids) < len(fits)
    assert adapter.encode_prompts([fits], reference).embeds.shape[1] == 2 + 4 * 5 + MAX_SEQUENCE_LENGTH
    with pytest.raises(CloraError, match=f"at most {MAX_SEQUENCE_LENGTH} tokens, found {MAX_SEQUENCE_LENGTH + 1}"):
        adapter.encode_prompts(["short", fits + "."], reference)


def test_what_no_stock_call_does_is_refused(adapter):
    pipeline = adapter.pipeline
    assert isinstance(adapter_for(pipeline, SIZE, MAX_SEQUENCE_LENGTH), LongCatImageEditAdapter)
    with pytest.raises(CloraError, match="multiples of 16 pixels, found 64x72"):
        adapter_for(pipeline, (64, 72), MAX_SEQUENCE_LENGTH)
    with pytest.raises(CloraError, match="found 128x160, for pictures of these proportions it makes 64x80"):
        adapter_for(pipeline, (128, 160), MAX_SEQUENCE_LENGTH)
    with pytest.raises(CloraError, match=f"at most {MAX_SEQUENCE_LENGTH} tokens, found 512"):
        adapter_for(pipeline, SIZE, 512)
    one = pixels(picture(0, SIZE))
    with pytest.raises(CloraError, match="one image to edit, which is what LongCatImageEditPipeline takes, found 2"):
        adapter.encode_sources([one, one])
    with pytest.raises(CloraError, match="one image to edit, which is what LongCatImageEditPipeline takes, found 0"):
        adapter.encode_prompts(["a"])
    with pytest.raises(CloraError, match="proportions of 64x80, found 80x64, of which .* makes 80x64"):
        adapter.encode_sources([one.transpose(2, 3)])
