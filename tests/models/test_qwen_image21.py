"""The Qwen-Image 2.1 adapter gives what stock calls of its pipeline give."""

from __future__ import annotations

import diffusers
import pytest
import torch
from helpers.collection_cases import student_scheduler
from helpers.edits import Sample, check_batch, condition, few_step, guided, received, start_noise, stock_call
from helpers.pictures import picture, pictures, pixels
from helpers.tiny_qwen_image import shrink, tiny_qwen21_pipeline

from clora.bank.bank import AdapterBank
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.lora.layers import block_layers
from clora.models import adapter_for
from clora.testing import SENTENCES, random_lora

if not hasattr(diffusers, "QwenImage21Pipeline"):
    pytest.skip("this diffusers has no QwenImage21Pipeline", allow_module_level=True)

TOLERANCE = 1e-4  # of pixels in [0, 1]
LENGTH = 40
WIDE, TALL, SQUARE = (64, 96), (96, 64), (64, 64)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_qwen21_pipeline()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, pipeline)
        yield pipeline


@pytest.fixture(scope="module")
def loras(pipeline):
    attention = [name for name in block_layers(pipeline.transformer) if ".attn." in name]
    return {
        "all": random_lora(pipeline.transformer, 4, 7),
        "attention": random_lora(pipeline.transformer, 2, 8, attention),
    }


CASES = {"square": (SQUARE, [SQUARE]), "tall_of_wide": (TALL, [WIDE]), "three": (WIDE, [WIDE, TALL, (79, 81)])}


@pytest.mark.parametrize(("size", "sizes"), CASES.values(), ids=list(CASES))
def test_a_stock_call_equals_the_few_step_sampler(pipeline, loras, size, sizes, tmp_path):
    """A stock call keeps keys and values of text and sources from the first step."""
    adapter = adapter_for(pipeline, size, LENGTH)
    sample = Sample(SENTENCES[0], pictures(sizes), "all", 5)
    with received(adapter) as calls:
        stock = stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0))
        ours = few_step(adapter, loras, [sample])
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(stock, ours, rtol=0, atol=TOLERANCE)
    for seen in (calls[:8], calls[8:]):
        assert torch.equal(torch.cat([call["timestep"] for call in seen]), student_schedule(8))
    assert calls[8]["img_shapes"] == calls[0]["img_shapes"]
    assert torch.equal(calls[8]["img_mask"], calls[0]["img_mask"])
    base = few_step(adapter, loras, [Sample(sample.prompt, sample.images, None, 5)])
    assert (ours - base).abs().max() > 0.01, "the LoRA changes nothing, so this test shows nothing"


def test_a_batch_equals_calls_of_one_sample(pipeline, loras, tmp_path):
    """Different sources, adapters and prompts; the padding of shorter ones must not move their results' positions."""
    adapter = adapter_for(pipeline, WIDE, LENGTH)
    prompts = ("add snow", SENTENCES[0], "")
    samples = [
        Sample(prompts[i], pictures([WIDE, TALL], 10 * i), lora, 20 + i)
        for i, lora in enumerate(["all", None, "attention"])
    ]
    assert condition(adapter, samples).text.mask.sum(1).unique().numel() == 3
    check_batch(adapter, loras, samples, tmp_path, steps=4)


@pytest.mark.parametrize(("steps", "w"), [(6, 1.5), (40, 0.0)], ids=["guided", "40_steps"])
def test_a_teacher_equals_a_stock_call(pipeline, loras, steps, w, tmp_path):
    """The pipeline's own scheduler; guidance, where it is wanted, without rescaling."""
    adapter = adapter_for(pipeline, TALL, LENGTH)
    assert adapter.default_guidance == 0
    sample = Sample(SENTENCES[1], pictures([WIDE]), "all", 3)
    empty = condition(adapter, [sample], prompt="").text
    noise, found = guided(adapter, loras, [sample], empty, steps, w)
    with received(adapter) as calls:
        guidance = {"true_cfg_scale": w + 1, "negative_prompt": ""} if w else {}
        stock = stock_call(adapter, loras, sample, tmp_path, steps=steps, latents=noise, **guidance)
    torch.testing.assert_close(stock, found, rtol=0, atol=TOLERANCE)
    timesteps = torch.cat([call["timestep"] for call in calls])
    assert len(timesteps) == steps * (2 if w else 1)
    torch.testing.assert_close(timesteps[:: 2 if w else 1], adapter.teacher_schedule(steps)[:-1], rtol=2e-7, atol=0)


def test_gradients_reach_every_layer(pipeline):
    """In a batch of prompts of different lengths."""
    adapter = adapter_for(pipeline, SQUARE, LENGTH)
    samples = [Sample(prompt, pictures([SQUARE]), "student", 0) for prompt in ("add snow", SENTENCES[0])]
    with AdapterBank(pipeline.transformer, {"student": random_lora(pipeline.transformer, 2, 1)}) as bank:
        slots, conditioning = bank.slots(trainable=True), condition(adapter, samples)
        noise = torch.cat([start_noise(adapter, sample) for sample in samples])
        with bank.route(slots, torch.tensor([0, 0])):
            adapter.velocity(noise, torch.tensor([0.5, 0.9]), conditioning).square().mean().backward()
    assert len(slots.parameters()) == 2 * 2 * 7
    assert all(factor.grad.any() for factor in slots.parameters())
    assert not pipeline.transformer.pos_embed._forward_hooks


def test_results_are_opaque(pipeline):
    adapter = adapter_for(pipeline, WIDE, LENGTH)
    images = torch.cat([pixels(picture(seed, WIDE)) for seed in range(5)])
    latents, vae = adapter.encode_images(images), pipeline.vae
    assert latents.shape == (5, *adapter.latent_shape) == (5, 4 * 6, 8)
    opaque = torch.cat([images, torch.ones(5, 1, *WIDE)], dim=1)
    expected = vae.decode(vae.encode(opaque[:, :, None]).latent_dist.mode()).sample[:, :3, 0]
    torch.testing.assert_close(adapter.decode(latents), expected, rtol=1e-4, atol=1e-4)
    assert adapter.source_shapes == adapter.encode_sources([images])[1] == ((4, 8),)


def test_what_cannot_be_used_is_refused(pipeline):
    with pytest.raises(CloraError, match="multiples of 32 pixels, found 64x80"):
        adapter_for(pipeline, (64, 80), LENGTH)
    own = type(pipeline)(**pipeline.components, sample_sigmas=[1.0, 0.5])
    with pytest.raises(CloraError, match="without sample_sigmas"):
        adapter_for(own, SQUARE, LENGTH)
    with pytest.raises(CloraError, match=r"at most 4 tokens, found \d+ in 'make it a blueprint"):
        adapter_for(pipeline, SQUARE, 4).encode_prompts([SENTENCES[0]], [pixels(picture(0, SQUARE))])
