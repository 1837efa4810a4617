"""The cost of one pass, counted on fake tensors, against what real models use."""

from __future__ import annotations

import json
from math import prod

import diffusers
import pytest
import torch
from helpers import tiny_flux, tiny_longcat, tiny_qwen_image, tiny_z_image
from helpers.pictures import write_images
from torch.utils.flop_counter import FlopCounterMode

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.commands.plan.cost import count_blocks, device_memory, pass_cost, source_rows
from clora.commands.plan.make import make_plan
from clora.lora.layers import block_layers
from clora.lora.save import save_lora
from clora.models import adapter_for
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.models.skeleton import skeleton
from clora.testing import (
    MAX_SEQUENCE_LENGTH,
    SIZE,
    random_lora,
    tiny_config,
)

RANK = 4


def saved_bytes(transformer, run):
    """Bytes that a real pass keeps for its gradient, weights not counted."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, lasting = run()
    for tensor in (*transformer.parameters(), *lasting):
        kept.pop(tensor.untyped_storage()._cdata, None)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_pass_on_fake_tensors_keeps_what_a_real_one_keeps(tiny_folder, adapter, checkpointed):
    pipeline = skeleton(str(tiny_folder), torch.float32)
    bare = Flux2KleinAdapter(pipeline, SIZE, MAX_SEQUENCE_LENGTH)
    assert count_blocks(pipeline.transformer) == 2
    cost = pass_cost(bare, block_layers(pipeline.transformer), RANK, (MAX_SEQUENCE_LENGTH, 24))
    transformer = adapter.pipeline.transformer
    with AdapterBank(transformer, {"student": random_lora(transformer, RANK, 0)}) as bank:

        def run():
            slots = bank.slots(trainable=True)
            source = torch.zeros(1, *adapter.latent_shape)
            conditioning = Conditioning(Text(torch.zeros(1, MAX_SEQUENCE_LENGTH, 24)), source)
            with bank.route(slots, torch.zeros(1, dtype=torch.int64)):
                return adapter.velocity(source, torch.zeros(1), conditioning), slots.parameters()

        if checkpointed:
            with recomputed_blocks(bank):
                real = saved_bytes(transformer, run)
        else:
            real = saved_bytes(transformer, run)
    assert real == (cost.saved_checkpointed if checkpointed else cost.saved)
    assert cost.saved_checkpointed < cost.saved / 3
    tokens = MAX_SEQUENCE_LENGTH + 32
    products = 2 * tokens * sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    assert products / 3 < cost.flops < 2 * products


def test_a_pass_in_16_bits_is_counted_too(tiny_folder):
    costs = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = skeleton(str(tiny_folder), dtype)
        bare = Flux2KleinAdapter(pipeline, SIZE, MAX_SEQUENCE_LENGTH)
        costs.append(pass_cost(bare, block_layers(pipeline.transformer), RANK, (MAX_SEQUENCE_LENGTH, 24)))
    # In fp32 the LoRA is merged where that takes fewer products.
    assert costs[0].flops < costs[1].flops < 1.1 * costs[0].flops
    assert costs[0].saved / 2 < costs[1].saved < costs[0].saved


def save_for_plan(pipeline, folder, monkeypatch):
    """Saves a pipeline; its processor, of a class of the tests', stands in for transformers' own, which needs torchvision."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in {"processor", "text_processor"} & set(index):
        index[name] = ["transformers", "Qwen2VLProcessor"]
        processor = getattr(pipeline, name)
        monkeypatch.setattr(
            "transformers.Qwen2VLProcessor.from_pretrained", lambda folder, processor=processor: processor
        )
    (folder / "model_index.json").write_text(json.dumps(index))


def pipeline_of(family, monkeypatch):
    if family == "LongCatImageEditPipeline":
        tiny_longcat.shrink(monkeypatch)
        pipeline = tiny_longcat.tiny_pipeline()
        pipeline.tokenizer_max_length = 512  # of every loaded pipeline: it is not saved
        return pipeline
    if family.startswith("QwenImage"):
        is_21 = family == "QwenImage21Pipeline"
        pipeline = tiny_qwen_image.tiny_qwen21_pipeline() if is_21 else tiny_qwen_image.tiny_qwen_pipeline()
        tiny_qwen_image.shrink(monkeypatch, pipeline)
        return pipeline
    makers = {"Flux2Pipeline": tiny_flux.tiny_flux2, "FluxKontextPipeline": tiny_flux.tiny_kontext}
    return makers.get(family, tiny_z_image.tiny_pipeline)()


def size_of(family):
    """Height and width that a family takes."""
    return (64, 96) if family == "QwenImage21Pipeline" else (64, 80)


@pytest.fixture
def job_of(tmp_path, monkeypatch):
    """Returns job_of(family): a config of a saved tiny pipeline, and the pipeline."""

    def make(family):
        if not hasattr(diffusers, family):
            pytest.skip(f"this diffusers has no {family}")
        pipeline = pipeline_of(family, monkeypatch)
        save_for_plan(pipeline, tmp_path / family, monkeypatch)
        save_lora(random_lora(pipeline.transformer, 2, 0), tmp_path / "a.safetensors")
        write_images(tmp_path / "images", 1)
        data = {"sources": str(tmp_path / "images"), "size": size_of(family), "max_sequence_length": 48}
        effects = [{"name": "a", "lora": str(tmp_path / "a.safetensors"), "prompt": "p", "student_prompts": ["q"]}]
        data["general_instructions"] = ("snow",)
        return tiny_config(effects, pipeline=str(tmp_path / family), output=str(tmp_path / "o"), data=data), pipeline

    return make


TEMPLATE_TOKENS = {
    "Flux2Pipeline": 0,
    "FluxKontextPipeline": 0,
    "LongCatImageEditPipeline": 2,
    "QwenImage21Pipeline": 21,  # in the tokenizer of these tests
    "QwenImageEditPlusPipeline": 23,
    "ZImageOmniPipeline": 8,
}

"""Tokens that are encoded with a prompt besides it and its picture, which the plan leaves out."""


@pytest.mark.parametrize("family", TEMPLATE_TOKENS)
def test_a_row_has_the_tokens_that_are_encoded(job_of, family):
    """The real pipeline encodes a picture and a prompt; what is left of the longest prompt is added."""
    config, pipeline = job_of(family)
    found = make_plan(config)
    assert found["problems"] == []
    adapter = adapter_for(pipeline, config.data.size, 48)
    pixels = [torch.zeros(1, 3, *config.data.size)]
    text = adapter.encode_prompts(["snow"], pixels)
    tokens = int((text.embeds != 0).any(-1).sum())  # zeros are places of images, or ends of segments
    if family.startswith(("QwenImage", "ZImage")):  # they pad no prompt
        tokens += 48 - adapter.num_tokens("snow")
    counted = adapter.latent_shape[0] + sum(map(prod, adapter.encode_sources(pixels)[1])) + tokens
    assert counted - found["model"]["tokens"] == TEMPLATE_TOKENS[family]
    assert found["memory"]["peak"] > found["memory"]["base"]


@pytest.mark.parametrize("family", TEMPLATE_TOKENS)
def test_a_familys_pass_is_counted_as_it_runs_on_what_is_encoded(job_of, family):
    """Operations, and bytes kept for the gradient, of the real pipeline with a picture and a prompt."""
    config, pipeline = job_of(family)
    adapter, transformer = adapter_for(pipeline, config.data.size, 48), pipeline.transformer
    pixels = [torch.rand(1, 3, *config.data.size)]
    text = adapter.encode_prompts(["snow"], pixels)
    source, shapes = adapter.encode_sources(pixels)
    tokens = adapter.num_tokens("snow") if family == "ZImageOmniPipeline" else text.embeds.shape[1]
    bare = adapter_for(skeleton(config.pipeline, torch.float32), config.data.size, 48)
    cost = pass_cost(bare, block_layers(transformer), RANK, (tokens, text.embeds.shape[2]))
    with AdapterBank(transformer, {"student": random_lora(transformer, RANK, 0)}) as bank:
        counter = FlopCounterMode(display=False)

        def run():
            slots = bank.slots(trainable=True)
            with bank.route(slots, torch.zeros(1, dtype=torch.int64)), counter:
                noise = torch.randn(1, *adapter.latent_shape)
                return adapter.velocity(
                    noise, torch.full((1,), 0.5), Conditioning(text, source, shapes)
                ), slots.parameters()

        assert saved_bytes(transformer, run) == pytest.approx(cost.saved, rel=0.01)
    # Since torch 2.15 the attention of Qwen-Image-2.1 is counted too, without the masked tokens that the plan counts.
    assert counter.get_total_flops() == pytest.approx(cost.flops, rel=0.01 if family == "QwenImage21Pipeline" else 0)
    assert source.shape[1] == source_rows(bare)
    assert count_blocks(bare.pipeline.transformer) >= 2


def test_a_family_whose_pass_cannot_be_counted_is_checked_all_the_same(job_of, monkeypatch):
    monkeypatch.setattr("clora.commands.plan.cost._TEXT_CHANNELS", ())
    config, _ = job_of("ZImageOmniPipeline")
    found = make_plan(config)
    assert found["problems"] == []
    assert "cannot run ZImageOmniPipeline without its weights" in found["notes"][0]
    broken = config.model_copy(update={"student": config.student.model_copy(update={"targets": ("to_nothing",)})})
    assert any("to_nothing" in problem for problem in make_plan(broken)["problems"])


def test_the_memory_of_the_cpu_is_the_machines():
    assert 1e9 < device_memory(torch.device("cpu")) < 1e14
    assert device_memory(torch.device("mps")) is None
