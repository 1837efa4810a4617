"""The Qwen-Image-Edit adapters give what stock calls of their pipelines give."""

from __future__ import annotations

import pytest
import torch
from helpers.collection_cases import student_scheduler
from helpers.edits import Sample, check_batch, condition, few_step, guided, received, routed, start_noise, stock_call
from helpers.pictures import picture, pictures, pixels
from helpers.tiny_qwen_image import shrink, tiny_qwen_pipeline

from clora.errors import CloraError
from clora.flow.matching import student_schedule, teacher_schedule
from clora.lora.layers import block_layers
from clora.models import adapter_for
from clora.testing import SENTENCES, random_lora

TOLERANCE = 1e-4  # of pixels in [0, 1]; one 8-bit level is 0.0039
LENGTH = 40
EDIT, PLUS_2509, PLUS_2511 = "edit", "2509", "2511"
WIDE, TALL, SQUARE = (64, 96), (96, 64), (64, 64)


@pytest.fixture(scope="module")
def pipelines():
    return {
        EDIT: tiny_qwen_pipeline("QwenImageEditPipeline"),
        PLUS_2509: tiny_qwen_pipeline(),
        PLUS_2511: tiny_qwen_pipeline(zero_cond_t=True),
    }


@pytest.fixture(scope="module", autouse=True)
def small_areas(pipelines):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, pipelines[EDIT])
        shrink(patch, pipelines[PLUS_2509])
        yield


@pytest.fixture(scope="module")
def loras(pipelines):
    transformer = pipelines[PLUS_2509].transformer  # all have the same layers
    attention = [name for name in block_layers(transformer) if ".attn." in name]
    return {"all": random_lora(transformer, 4, 7), "attention": random_lora(transformer, 2, 8, attention)}


CASES = {
    "edit_square": (EDIT, SQUARE, [SQUARE]),
    "edit_wide_of_tall": (EDIT, WIDE, [TALL]),
    "2509_tall": (PLUS_2509, TALL, [TALL]),
    "2509_two": (PLUS_2509, SQUARE, [WIDE, (50, 120)]),
    "2511_square": (PLUS_2511, SQUARE, [SQUARE]),
    "2511_three": (PLUS_2511, WIDE, [WIDE, TALL, (79, 81)]),
}


@pytest.mark.parametrize(("model", "size", "sizes"), CASES.values(), ids=list(CASES))
def test_a_stock_call_equals_the_few_step_sampler(pipelines, loras, model, size, sizes, tmp_path):
    adapter = adapter_for(pipelines[model], size, LENGTH)
    sample = Sample(SENTENCES[0], pictures(sizes), "all", 5)
    with received(adapter) as calls:
        stock = stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0))
        ours = few_step(adapter, loras, [sample])
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(stock, ours, rtol=0, atol=TOLERANCE)
    assert len(calls) == 16
    for seen in (calls[:8], calls[8:]):
        assert torch.equal(torch.cat([call["timestep"] for call in seen]), student_schedule(8))
    for stocks, own in zip(calls[:8], calls[8:], strict=True):
        assert own["img_shapes"] == stocks["img_shapes"]
        torch.testing.assert_close(own["encoder_hidden_states"], stocks["encoder_hidden_states"])
    base = few_step(adapter, loras, [Sample(sample.prompt, sample.images, None, 5)])
    assert (ours - base).abs().max() > 0.01, "the LoRA changes nothing, so this test shows nothing"


BATCHES = {"edit": (EDIT, [WIDE]), "2509": (PLUS_2509, [WIDE, TALL]), "2511": (PLUS_2511, [TALL])}


@pytest.mark.parametrize(("model", "sizes"), BATCHES.values(), ids=list(BATCHES))
def test_a_batch_equals_calls_of_one_sample(pipelines, loras, model, sizes, tmp_path):
    """Different sources, adapters and prompts, which have different lengths."""
    adapter = adapter_for(pipelines[model], WIDE, LENGTH)
    prompts = ("add snow", SENTENCES[0], "")
    samples = [
        Sample(prompts[i], pictures(sizes, 10 * i), lora, 20 + i) for i, lora in enumerate(["all", None, "attention"])
    ]
    assert condition(adapter, samples).text.mask.sum(1).unique().numel() == 3
    check_batch(adapter, loras, samples, tmp_path, steps=4)


def test_a_mask_is_passed_only_where_something_is_padded(pipelines, loras, tmp_path):
    """As in stock calls, whose one prompt has no padding."""
    adapter = adapter_for(pipelines[PLUS_2511], SQUARE, LENGTH)
    samples = [Sample(prompt, pictures([SQUARE]), None, 0) for prompt in ("snow", SENTENCES[0])]
    conditioning = condition(adapter, samples)
    noise, sigma = start_noise(adapter, samples[0]), torch.tensor([0.5])
    with received(adapter) as calls, torch.no_grad():
        padded, longest = (adapter.velocity(noise, sigma, conditioning[i : i + 1]) for i in range(2))
        alone = adapter.velocity(noise, sigma, condition(adapter, samples[:1]))
        stock_call(adapter, loras, samples[1], tmp_path, steps=2)
    assert [call["encoder_hidden_states_mask"] is None for call in calls] == [False, True, True, True, True]
    torch.testing.assert_close(padded, alone)
    assert (longest - alone).abs().max() > 1e-3


TEACHERS = {
    "edit": (EDIT, WIDE, 6, 1.5),
    "2509": (PLUS_2509, WIDE, 40, 3.0),
    "2511": (PLUS_2511, TALL, 6, 4.0),
}


@pytest.mark.parametrize(("model", "size", "steps", "w"), TEACHERS.values(), ids=list(TEACHERS))
def test_a_guided_teacher_equals_a_stock_call(pipelines, loras, model, size, steps, w, tmp_path):
    """The pipeline's own scheduler: shifted by the number of tokens, stretched to its terminal level; rescaled guidance."""
    adapter = adapter_for(pipelines[model], size, LENGTH)
    sample = Sample(SENTENCES[1], pictures([TALL]), "all", 3)
    empty = condition(adapter, [sample], prompt="").text
    with received(adapter) as calls:
        noise, found = guided(adapter, loras, [sample], empty, steps, w, norm_rescale=True)
        stock = stock_call(
            adapter, loras, sample, tmp_path, steps=steps, latents=noise, true_cfg_scale=w + 1, negative_prompt=""
        )
    torch.testing.assert_close(stock, found, rtol=0, atol=TOLERANCE)
    ours = torch.stack([call["timestep"][0] for call in calls[:steps]])
    stocks = torch.cat([call["timestep"] for call in calls[steps:]])
    torch.testing.assert_close(ours.repeat_interleave(2), stocks, rtol=2e-7, atol=0)
    assert abs(float(ours[-1]) - 0.02) < 1e-6
    assert (ours - teacher_schedule(steps)[:-1]).abs().max() > 0.01, "nothing is shifted dynamically"
    plain = guided(adapter, loras, [sample], empty, steps, w)[1]
    assert (stock - plain).abs().max() > 0.01, "rescaling changes nothing, so this shows nothing"


def test_timesteps_are_rounded_as_in_a_stock_call(loras, tmp_path):
    pipeline = tiny_qwen_pipeline(zero_cond_t=True).to(torch.bfloat16)
    adapter = adapter_for(pipeline, SQUARE, LENGTH)
    sample = Sample(SENTENCES[1], pictures([SQUARE]), None, 3)
    conditioning = condition(adapter, [sample])
    with received(adapter) as calls, torch.no_grad():
        stock_call(adapter, loras, sample, tmp_path, student_scheduler(3.0))
        stock_call(adapter, loras, sample, tmp_path, steps=16)
        for sigma in (*student_schedule(8), *adapter.teacher_schedule(16)[:-1]):
            adapter.velocity(start_noise(adapter, sample), sigma[None], conditioning)
    stocks, ours = (torch.cat([call["timestep"] for call in calls[rows]]) for rows in (slice(24), slice(24, None)))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, stocks)
    assert {call["hidden_states"].dtype for call in calls} == {torch.bfloat16}


def test_a_layer_that_sees_the_batch_twice_is_routed(pipelines, loras):
    """With ``zero_cond_t`` the images' modulation has rows of the timestep, then rows of timestep 0."""
    adapter = adapter_for(pipelines[PLUS_2511], SQUARE, LENGTH)
    samples = [Sample("", pictures([SQUARE]), lora, 0) for lora in ("attention", "all", None)]
    layer = adapter.pipeline.transformer.transformer_blocks[0].img_mod[1]
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0))
    delta = x @ loras["all"].modules["transformer_blocks.0.img_mod.1"].delta().T
    expected = layer(x) + delta * torch.tensor([0, 1, 0, 0, 1, 0])[:, None]
    with routed(adapter, loras, samples) as (bank, ids), bank.route(bank.slots(), ids):
        torch.testing.assert_close(adapter.pipeline.transformer.transformer_blocks[0].img_mod[1](x), expected)


def test_results_are_packed_and_decoded(pipelines):
    """Packing keeps every value, with height and width in their places."""
    adapter = adapter_for(pipelines[PLUS_2509], WIDE, LENGTH)
    images = torch.cat([pixels(picture(seed, WIDE)) for seed in range(5)])
    latents = adapter.encode_images(images)
    assert latents.shape == (5, *adapter.latent_shape) == (5, 4 * 6, 16)
    vae = adapter.pipeline.vae
    expected = vae.decode(vae.encode(images[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    torch.testing.assert_close(adapter.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_sources_have_the_pipelines_own_size(pipelines):
    plus, edit = (adapter_for(pipelines[model], WIDE, LENGTH) for model in (PLUS_2509, EDIT))
    images = pixels(picture(0, WIDE))
    assert plus.source_shapes == edit.source_shapes == plus.encode_sources([images])[1] == ((4, 8),)
    assert plus.encode_sources([images, pixels(picture(0, TALL))])[1] == ((4, 8), (8, 4))


def test_the_default_targets_are_all_linear_layers_of_the_blocks(pipelines):
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    layers = [f"attn.{name}" for name in attention] + ["img_mod.1", "txt_mod.1"]
    layers += [f"{mlp}.net.{part}" for mlp in ("img_mlp", "txt_mlp") for part in ("0.proj", "2")]
    assert sorted(block_layers(pipelines[PLUS_2511].transformer)) == sorted(
        f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in layers
    )


def test_what_cannot_be_used_is_refused(pipelines):
    plus = adapter_for(pipelines[PLUS_2509], SQUARE, 4)
    images = pixels(picture(0, SQUARE))
    with pytest.raises(CloraError, match=r"at most 4 tokens, found \d+ in 'make it a blueprint"):
        plus.encode_prompts([SENTENCES[0]], [images])
    with pytest.raises(ValueError, match="found none"):
        plus.encode_prompts(["snow"])
    with pytest.raises(CloraError, match="at most 1024"):
        adapter_for(pipelines[PLUS_2509], SQUARE, 1025)
    with pytest.raises(CloraError, match="multiples of 16 pixels, found 64x72"):
        adapter_for(pipelines[PLUS_2509], (64, 72), LENGTH)
    edit = adapter_for(pipelines[EDIT], SQUARE, LENGTH)
    for encode in (lambda: edit.encode_sources([images] * 2), lambda: edit.encode_prompts(["snow"], [images] * 2)):
        with pytest.raises(CloraError, match="one image to edit.*found 2"):
            encode()
