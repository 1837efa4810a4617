"""Z-Image Omni: clora's samplers equal stock calls of the pipeline with the LoRA loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.collection_cases import student_scheduler
from helpers.edits import (
    Sample,
    check_batch,
    condition,
    few_step,
    few_step_latents,
    guided,
    own_latents,
    received,
    start_noise,
    stock_call,
)
from helpers.pictures import picture, pixels
from helpers.tiny_z_image import MAX_SEQUENCE_LENGTH, tiny_adapter, tiny_pipeline

from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.lora.layers import block_layers
from clora.models import adapter_for
from clora.models.families.z_image import ZImageOmniAdapter
from clora.testing import random_lora

SIZE = (64, 80)
PROMPTS = (
    "make it a blueprint with thin white lines",
    "snow",
    "turn the picture into a warm sunset",
    "brighten the image",
)


@pytest.fixture(scope="module")
def adapter():
    """As a user has it, except that its fp32 VAE takes the bfloat16 pixels that the pipeline hands it."""
    pipeline = tiny_pipeline()
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return tiny_adapter(pipeline, SIZE)


@pytest.fixture(scope="module")
def loras(adapter):
    return {name: random_lora(adapter.pipeline.transformer, 2 + i, 40 + i) for i, name in enumerate("ab")}


@pytest.mark.parametrize(
    ("size", "reference_sizes"),
    [
        ((64, 64), [(64, 64)]),
        (SIZE, [SIZE]),
        (SIZE, [SIZE, (70, 100)]),  # cropped to patches for the VAE, whole for SigLIP
        (SIZE, [(1040, 1100), (96, 64), SIZE]),  # above a megapixel
    ],
    ids=["square", "not square", "two references", "three references"],
)
def test_few_steps_equal_a_stock_call(adapter, loras, tmp_path, size, reference_sizes):
    adapter = adapter_for(adapter.pipeline, size, MAX_SEQUENCE_LENGTH)
    images = tuple(picture(i, reference) for i, reference in enumerate(reference_sizes))
    sample = Sample(PROMPTS[0], images, "a", 11)
    with received(adapter) as calls:
        stock = stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0))
        ours = few_step(adapter, loras, [sample])
    times = torch.cat([call["t"] for call in calls])
    assert torch.equal(times[:8], times[8:])
    torch.testing.assert_close(times[:8], 1 - student_schedule(8), rtol=0, atol=1e-7)
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    without = few_step(adapter, loras, [replace(sample, lora=None)])
    assert (without - stock).abs().max() > 0.01, "the LoRA changes nothing"


def test_a_large_reference_is_scaled_once(adapter, monkeypatch):
    processor = adapter.pipeline.image_processor
    scaled, scale = [], processor._resize_to_target_area
    monkeypatch.setattr(processor, "_resize_to_target_area", lambda *call: scaled.append(call) or scale(*call))
    adapter.encode_sources([pixels(picture(0, (1040, 1100))), pixels(picture(1, SIZE))])
    assert len(scaled) == 1


def test_a_batch_equals_stock_calls_of_its_samples(adapter, loras, tmp_path):
    """Different pictures, prompts of different lengths and different LoRAs, one of them the base."""
    samples = [Sample(PROMPTS[i], (picture(i, SIZE),), lora, 20 + i) for i, lora in enumerate(["b", "a", None, "b"])]
    check_batch(adapter, loras, samples, tmp_path)


def test_layers_outside_the_blocks(adapter, tmp_path):
    """Those that see samples are routed; embedders get the tokens of all samples in one, and are refused in a batch."""
    transformer = adapter.pipeline.transformer
    loras = {"routed": random_lora(transformer, 2, 0, ["t_embedder.mlp.0", "all_final_layer.2-1.linear"])}
    samples = [Sample(PROMPTS[i], (picture(i, SIZE),), lora, 5) for i, lora in enumerate([None, "routed"])]
    stock = stock_call(adapter, loras, samples[1], tmp_path, student_scheduler(3.0))
    torch.testing.assert_close(few_step(adapter, loras, samples)[1:], stock, rtol=0, atol=1e-4)
    for name in ("cap_embedder.1", "all_x_embedder.2-1", "siglip_embedder.1"):
        embedder = {"routed": random_lora(transformer, 2, 0, [name])}
        with pytest.raises(CloraError, match=f"{name}.* rows of 2 routed samples"):
            few_step(adapter, embedder, samples)
        few_step(adapter, embedder, samples[1:])


@pytest.mark.parametrize("w", [0.0, 2.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_guided_teachers_equal_stock_calls(adapter, loras, tmp_path, w, dynamic, monkeypatch):
    """The pipeline's own scheduler; its guidance scale is w."""
    own = adapter.pipeline.scheduler
    shift = {"use_dynamic_shifting": dynamic, "base_shift": 0.4, "max_image_seq_len": 60}
    monkeypatch.setattr(adapter.pipeline, "scheduler", type(own).from_config(own.config, **shift))
    steps = 5
    samples = [Sample(PROMPTS[i], (picture(i, SIZE),), "b", seed) for i, seed in enumerate([4, 7])]
    with received(adapter) as calls:
        noise, ours = guided(adapter, loras, samples, adapter.encode_prompts([""]), steps, w)
    times = [call["t"] for call in calls]
    for i, sample in enumerate(samples):
        with received(adapter) as calls:
            stock = stock_call(
                adapter, loras, sample, tmp_path, steps=steps, latents=noise[i : i + 1], guidance_scale=w
            )
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)
        for time, call in zip(times, calls, strict=True):  # the pipeline's linspace is fp32: the last bit
            torch.testing.assert_close(time[i], call["t"][0], rtol=0, atol=1e-7)


def test_an_unchanged_pipeline_with_its_bfloat16_vae(loras, tmp_path):
    """As users have it, without a hook; latents are compared, as bfloat16 pixels are no measure."""
    pipeline = tiny_pipeline()
    pipeline.vae.to(torch.bfloat16)
    adapter = tiny_adapter(pipeline, SIZE)
    sample = Sample(PROMPTS[0], (picture(0, SIZE),), "a", 3)
    stock = stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0), output_type="latent")
    ours = few_step_latents(adapter, loras, [sample])
    torch.testing.assert_close(own_latents(adapter, ours), stock, rtol=0, atol=1e-4)
    assert adapter.decode(ours).dtype == torch.bfloat16


def test_a_bfloat16_transformer_keeps_latents_in_fp32(adapter):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    low = tiny_adapter(pipeline, SIZE)
    sample = Sample(PROMPTS[0], (picture(0, SIZE),), None, 0)
    inputs = (start_noise(low, sample), torch.tensor([0.7]), condition(low, [sample]))
    v = low.velocity(*inputs)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, adapter.velocity(*inputs), rtol=0.05, atol=0.05)


def test_every_block_is_a_target(adapter):
    names = block_layers(adapter.pipeline.transformer)
    assert {name.split(".")[0] for name in names} == {"noise_refiner", "context_refiner", "siglip_refiner", "layers"}
    assert {name.split(".", 2)[2] for name in names if name.startswith("layers.1.")} == {
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
        "adaLN_modulation.0",
    }


def test_a_long_prompt_is_refused_and_none_is_cut(adapter):
    """At the limit the pipeline's own encoding is whole; one token more is an error."""
    frame = len(
        adapter.pipeline.tokenizer("<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|vision_start|>").input_ids
    )
    word = " snow"
    count = len(adapter.pipeline.tokenizer(word).input_ids)
    room = (MAX_SEQUENCE_LENGTH - frame) // count
    text = adapter.encode_prompts([word * room])
    longer = ZImageOmniAdapter(adapter.pipeline, SIZE, MAX_SEQUENCE_LENGTH + 20).encode_prompts([word * room])
    assert torch.equal(text.mask, longer.mask)
    torch.testing.assert_close(text.embeds, longer.embeds, rtol=0, atol=1e-5)
    with pytest.raises(CloraError, match=rf"at most {MAX_SEQUENCE_LENGTH} tokens, found {frame + count * (room + 1)}"):
        adapter.encode_prompts(["short", word * (room + 1)])


def test_the_adapter_is_found_and_refuses_sizes_between_patches(adapter):
    assert isinstance(adapter_for(adapter.pipeline, SIZE, 40), ZImageOmniAdapter)
    with pytest.raises(CloraError, match="multiples of 16 pixels, found 64x72"):
        adapter_for(adapter.pipeline, (64, 72), 40)
