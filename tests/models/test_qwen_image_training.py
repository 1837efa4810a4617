"""The whole job on Qwen-Image-Edit pipelines: pictures and LoRAs on disk in, a file that the stock pipeline loads out."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers.edits import Sample, few_step, stock_call
from helpers.pictures import picture, write_images
from helpers.tiny_qwen_image import shrink, tiny_qwen21_pipeline, tiny_qwen_pipeline

from clora.collection.apply import load_collection
from clora.collection.metadata import LORA_FILE
from clora.commands import distill as engine
from clora.commands.plan import make_plan
from clora.data.images import load_images
from clora.lora.layers import block_layers
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.models import adapter_for, loading
from clora.testing import random_teachers, tiny_config

SIZE = (64, 96)
UNUSED = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Layers of the last block that only change the text, which nothing reads after it."""


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_two_updates_give_a_file_for_the_stock_pipeline(zero_cond_t, monkeypatch, tmp_path):
    pipeline = tiny_qwen_pipeline(zero_cond_t=zero_cond_t)
    shrink(monkeypatch, pipeline)
    config = make_config(tmp_path, random_teachers(pipeline.transformer, 2))
    weights = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    seen, train = {}, engine.train_student
    monkeypatch.setattr(loading, "load_pipeline", lambda *arguments: pipeline)
    monkeypatch.setattr(engine, "train_student", lambda *arguments: seen.update(data=arguments[3]) or train(*arguments))
    folder = engine.distill(config)
    assert all(torch.equal(p, weights[name]) for name, p in pipeline.transformer.named_parameters())
    adapter = adapter_for(pipeline, SIZE, config.data.max_sequence_length)
    check_data(seen["data"], adapter, config)

    student = load_lora(folder / LORA_FILE, pipeline.transformer)
    learned = {name for name, module in student.modules.items() if module.lora_B.any()}
    assert set(block_layers(pipeline.transformer)) - learned == {f"transformer_blocks.1.{layer}" for layer in UNUSED}
    check_stock_call(adapter, folder, config)


SAVED = {
    "edit": lambda: tiny_qwen_pipeline("QwenImageEditPipeline"),
    "2511": lambda: tiny_qwen_pipeline(zero_cond_t=True),
    "2.1": tiny_qwen21_pipeline,
}


@pytest.mark.parametrize("model", SAVED)
def test_a_saved_pipeline_is_distilled_and_takes_the_result(model, monkeypatch, tmp_path):
    """With the stock processor, which is loaded with the rest."""
    pytest.importorskip("torchvision")
    if model == "2.1" and not hasattr(diffusers, "QwenImage21Pipeline"):
        pytest.skip("this diffusers has no QwenImage21Pipeline")
    pipeline = SAVED[model]()
    shrink(monkeypatch, pipeline)
    pipeline.save_pretrained(tmp_path / "base")
    config = make_config(tmp_path, random_teachers(pipeline.transformer, 2), pipeline=str(tmp_path / "base"))
    assert make_plan(config)["problems"] == []
    folder = engine.distill(config)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "base")
    check_stock_call(adapter_for(loaded, SIZE, config.data.max_sequence_length), folder, config)


def test_targets_are_rendered_as_by_a_stock_call_and_scored_as_in_the_paper():
    pipeline = tiny_qwen_pipeline()
    config = tiny_config(["a"], sampler={"guidance": None})
    sampler = loading.with_guidance(config, adapter_for(pipeline, SIZE, 40)).sampler
    stock = inspect.signature(type(pipeline).__call__).parameters["true_cfg_scale"].default - 1
    assert (sampler.guidance, sampler.teacher_guidance, sampler.teacher_norm_rescale) == (4, stock, True)
    config = tiny_config(["a"], sampler={"guidance": 2.5})
    sampler = loading.with_guidance(config, adapter_for(pipeline, SIZE, 40)).sampler
    assert (sampler.teacher_guidance, sampler.teacher_norm_rescale) == (2.5, False), "as before there were two roles"


def check_stock_call(adapter, folder, config):
    """A stock call as the collection describes it makes the images of the few-step sampler."""
    call = load_collection(folder)["effect_0"]
    prompt, steps, size = call.pop("prompt"), call.pop("num_inference_steps"), (call.pop("height"), call.pop("width"))
    assert (prompt, steps, size) == (config.effects[0].student_prompts[0], config.sampler.steps, SIZE)
    sample = Sample(prompt, (picture(0, SIZE),), "student", 9)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    stock = stock_call(adapter, {"student": folder}, sample, None, scheduler, steps, **call)
    student = load_lora(folder / LORA_FILE, adapter.pipeline.transformer)
    torch.testing.assert_close(stock, few_step(adapter, {"student": student}, [sample], steps), rtol=0, atol=1e-4)


def make_config(folder, teachers, **settings):
    write_images(folder / "images", 3, size=SIZE)
    effects = []
    for name, state in teachers.items():
        save_lora(state, folder / f"{name}.safetensors")
        effects.append({"name": name, "lora": str(folder / f"{name}.safetensors"), "prompt": f"make it {name}"})
    data = {"sources": str(folder / "images"), "size": SIZE, "sources_per_effect": 2, "general_targets": 3}
    data["cache"] = str(folder / "cache")  # to be read after the run
    return tiny_config(effects, output=str(folder / "out"), data=data, **settings)


def check_data(data, adapter, config):
    """A row of the prompt table for each prompt and picture, as encoded by themselves."""
    images = load_images(config.data.sources, SIZE)
    used = [(config.effects[e].prompt, 1, data.teacher_text[e, 1]) for e in range(2)]
    used += [(config.effects[e].student_prompts[0], 1, data.student_text[e, 0, 1]) for e in range(2)]
    used += [("", 1, data.empty_text[0, 1]), ("", 2, data.general_pairs[2, 2])]
    assert len({int(row) for _, _, row in used}) == len(used)
    for prompt, i, row in used:
        expected = adapter.encode_prompts([prompt], [images[i : i + 1]]).embeds[0]
        text = data.text[row[None]]
        torch.testing.assert_close(text.embeds[0, : len(expected)], expected)
        assert int(text.mask.sum()) == len(expected)
    assert data.sources.shape[2:] == (4 * 8, 16)
    assert data.targets.shape == (2, 2, 4 * 6, 16)
    assert data.general_targets.shape == (3, 4 * 6, 16)
