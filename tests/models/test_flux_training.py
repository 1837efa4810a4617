"""The whole job on FLUX pipelines with a guidance embedding: folders in, a file out that the stock pipeline loads."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux import pipeline_flux_kontext
from helpers.edits import Sample, few_step
from helpers.pictures import picture
from helpers.tiny_flux import FLUX2, KONTEXT
from PIL import Image

from clora.collection.write import LORA_FILE
from clora.commands.distill import distill
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.models import adapter_for
from clora.testing import random_lora, tiny_config

SIZE = (64, 80)
EFFECTS = ("blueprint", "snow")
GUIDANCE = {"flux2": 4.0, "kontext": 3.5}  # what the stock calls embed by default


@pytest.mark.parametrize(("name", "family"), {"flux2": FLUX2, "kontext": KONTEXT}.items(), ids=GUIDANCE)
def test_two_updates_give_a_collection(name, family, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64), (96, 64), (64, 96)])
    pipeline = family.make()
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i, (70, 90)).save(tmp_path / "images" / f"{i}.png")
    effects = []
    for i, effect in enumerate(EFFECTS):
        save_lora(random_lora(pipeline.transformer, 2 + i, i), tmp_path / f"{effect}.safetensors")
        effects.append({"name": effect, "lora": str(tmp_path / f"{effect}.safetensors"), "prompt": f"make it {effect}"})
    config = tiny_config(
        effects,
        pipeline=str(tmp_path / "pipeline"),
        output=str(tmp_path / "out"),
        data={
            "sources": str(tmp_path / "images"),
            "size": SIZE,
            "max_sequence_length": family.length,
            "sources_per_effect": 2,
        },
        sampler={"guidance": None},
        train={"batch_size": 4},
    )
    folder = distill(config)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    stock.set_progress_bar_config(disable=True)
    state = load_lora(folder / LORA_FILE, stock.transformer)
    assert any(module.lora_B.any() for module in state.modules.values()), "the student learned nothing"
    sampler = json.loads(state.metadata["clora.provenance"])["sampler"]
    assert (sampler["guidance"], sampler["guidance_embedding"]) == (0.0, GUIDANCE[name])

    adapter = adapter_for(pipeline, SIZE, family.length)
    prompt = json.loads(state.metadata["clora.effects"])[1]["prompts"][0]
    sample = Sample(prompt, (Image.open(tmp_path / "images" / "0.png"),), "student", 9)
    ours = few_step(adapter, {"student": state}, [sample], config.sampler.steps)
    said = json.loads(state.metadata["clora.sampling"])
    said |= said.pop("call")
    assert said["guidance_scale"] == GUIDANCE[name]
    (height, width), steps, _ = said.pop("size"), said.pop("steps"), said.pop("shift")
    stock.load_lora_weights(folder)
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    noise = torch.randn(1, *adapter.latent_shape, generator=torch.Generator().manual_seed(sample.seed + 1))
    torch.manual_seed(sample.seed)
    theirs = stock(
        image=sample.images[0],
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=family.latents(noise, adapter),
        output_type="pt",
        **said,  # guidance_scale, max_sequence_length and, for Kontext, max_area
    ).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
