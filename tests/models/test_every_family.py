"""The engine with any family: its encodings are cached, its blocks computed again, its base has bfloat16."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch
from helpers import tiny_flux, tiny_longcat, tiny_qwen_image, tiny_z_image
from helpers.edits import Sample, stock_call, to_images
from helpers.host_waits import DEVICE, host_waits

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.data.cache import Cache
from clora.data.encoders import Encoders, Picture, Pictures
from clora.data.generation import Generator
from clora.data.rendering import Samples, render_targets
from clora.models import adapter_for, common
from clora.models.common import to_pil
from clora.models.conditioning import Conditioning
from clora.models.families.z_image import ZImageOmniAdapter
from clora.models.fingerprint import component_fingerprints
from clora.models.loading import with_guidance
from clora.testing import random_lora, tiny_config

PROMPTS = ["make it a blueprint with thin white lines", "snow", "turn it"]
FAMILIES = {
    "Flux2KleinPipeline": (tiny_flux.tiny_klein, (64, 80), 40),
    "Flux2Pipeline": (tiny_flux.tiny_flux2, (64, 80), 96),
    "FluxKontextPipeline": (tiny_flux.tiny_kontext, (64, 80), 60),
    "QwenImageEditPipeline": (
        lambda: tiny_qwen_image.tiny_qwen_pipeline("QwenImageEditPipeline", zero_cond_t=True),
        (64, 96),
        40,
    ),
    "QwenImageEditPlusPipeline": (tiny_qwen_image.tiny_qwen_pipeline, (64, 96), 40),
    "QwenImage21Pipeline": (tiny_qwen_image.tiny_qwen21_pipeline, (64, 96), 40),
    "LongCatImageEditPipeline": (tiny_longcat.tiny_pipeline, (64, 80), tiny_longcat.MAX_SEQUENCE_LENGTH),
    "ZImageOmniPipeline": (tiny_z_image.tiny_pipeline, (64, 80), tiny_z_image.MAX_SEQUENCE_LENGTH),
}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if hasattr(diffusers, name)])
def adapter(request):
    make, size, length = FAMILIES[request.param]
    pipeline = make()
    with pytest.MonkeyPatch.context() as patch:
        if "Qwen" in request.param:
            tiny_qwen_image.shrink(patch, pipeline)
        if "LongCat" in request.param:
            tiny_longcat.shrink(patch)
        yield adapter_for(pipeline, size, length)


@pytest.fixture(scope="module")
def pictures(adapter):
    return torch.rand(3, 3, *adapter.size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def conditioning(adapter, pictures):
    return Conditioning(adapter.encode_prompts(PROMPTS, [pictures]), *adapter.encode_sources([pictures]))


def velocity(adapter, conditioning):
    x = torch.randn(3, *adapter.latent_shape, generator=torch.Generator().manual_seed(1))
    return adapter.velocity(x.to(adapter.latent_dtype), torch.tensor([0.9, 0.5, 0.2]), conditioning)


def test_encodings_that_are_read_again_give_the_same_velocity(adapter, pictures, conditioning, monkeypatch, tmp_path):
    """Also where the prompts come from different batches: first two of them, then all three."""
    images = Pictures("", pictures)
    seen = [Picture(images, i) for i in range(len(pictures))] if adapter.text_sees_image else None
    before = component_fingerprints(adapter.pipeline)
    Encoders(adapter, Cache(tmp_path), None).prompts(PROMPTS[:2], None if seen is None else seen[:2])
    Encoders(adapter, Cache(tmp_path), None).prompts(PROMPTS, seen)
    first = Encoders(adapter, Cache(tmp_path), None).sources(images)[:]
    assert component_fingerprints(adapter.pipeline) == before
    for name in ("encode_prompts", "encode_sources"):
        monkeypatch.setattr(adapter, name, None)
    encoders = Encoders(adapter, Cache(tmp_path), None)
    text, sources = encoders.prompts(PROMPTS, seen)[:], encoders.sources(images)[:]
    assert torch.equal(sources, first)
    with torch.no_grad():
        expected = velocity(adapter, conditioning)
        found = velocity(adapter, Conditioning(text, sources, conditioning.shapes))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_targets_are_what_a_stock_call_makes(adapter, pictures, monkeypatch, tmp_path):
    """By defaults: guidance and rescaling of the pipeline's own call, of which only the number of steps is given."""
    pipeline = adapter.pipeline
    defaults = {name: p.default for name, p in inspect.signature(type(pipeline).__call__).parameters.items()}
    scale = defaults.get("true_cfg_scale", defaults.get("guidance_scale"))
    if adapter.guidance_embedding is not None:  # not a second pass
        scale = defaults.get("true_cfg_scale", 1.0)
    assert adapter.stock_guidance == (scale if isinstance(adapter, ZImageOmniAdapter) else scale - 1)

    # The pipeline hands its VAE bfloat16 pixels; this one is in fp32.
    hook = pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    lora = random_lora(pipeline.transformer, 2, 3)
    sample = Sample(PROMPTS[0], (to_pil(pictures[0]),), "a", 7)
    config = with_guidance(tiny_config(["a"], sampler={"guidance": None, "teacher_steps": 3}), adapter)
    sources, shapes = adapter.encode_sources([pictures[:1]])
    assert shapes == adapter.source_shapes
    text = adapter.encode_prompts([PROMPTS[0], ""], [pictures[[0, 0]]])
    samples = Samples.of_teachers(sources[None], torch.tensor([[0]]), torch.tensor([[1]]), 7)
    (ours,) = render_targets(adapter, {"a": lora}, samples, text, config, lambda passes: None)
    call = {name: defaults[name] for name in ("guidance_scale", "true_cfg_scale") if name in adapter.student_call}
    if adapter.stock_norm_rescale:
        call["negative_prompt"] = ""  # without one, Qwen-Image-Edit does not guide
    noise = Generator(adapter)._noise([7])
    stock = stock_call(adapter, {"a": lora}, sample, tmp_path, steps=3, latents=noise, **call)
    hook.remove()
    torch.testing.assert_close(to_images(adapter.decode(ours[None])), stock, rtol=0, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradients(adapter, conditioning):
    transformer = adapter.pipeline.transformer
    with AdapterBank(transformer, {str(seed): random_lora(transformer, 2, seed) for seed in range(2)}) as bank:
        slots, found = bank.slots(trainable=True), []

        def gradients():
            with bank.route(slots, torch.tensor([1, -1, 0])):
                output = velocity(adapter, conditioning)
            every = torch.autograd.grad(output.square().sum(), slots.parameters(), allow_unused=True)
            return [gradient for gradient in every if gradient is not None]  # a last block's text goes nowhere

        found.append(gradients())
        with recomputed_blocks(bank):
            found.append(gradients())
    assert any(gradient.any() for gradient in found[0])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_pass_makes_the_host_wait_for_nothing_of_ours(adapter, conditioning):
    """Transformers of Qwen-Image and Z-Image copy small tensors of their own."""
    if type(adapter).__name__ == "QwenImage21Adapter":
        pytest.skip("its transformer reads from the device how its sequence is made up")
    on_device = copy.copy(adapter)
    on_device.pipeline = copy.copy(adapter.pipeline)
    on_device.pipeline.transformer = copy.deepcopy(adapter.pipeline.transformer).to(DEVICE)
    x, sigma = torch.randn(3, *adapter.latent_shape, device=DEVICE), torch.rand(3, device=DEVICE)
    with host_waits() as waits:
        output = on_device.velocity(x, sigma, conditioning.to(DEVICE)[torch.tensor([2, 0, 1])])
    assert output.device == DEVICE
    assert [where for where in waits if "diffusers" not in where] == []


def test_pictures_and_prompts_go_through_the_encoders_in_parts(adapter, pictures, monkeypatch):
    """As many as their pixels and tokens allow."""
    vae, sizes = adapter.pipeline.vae, []
    with torch.no_grad():
        whole = adapter.encode_images(pictures)
        expected = adapter.decode(whole)
        monkeypatch.setattr(common, "MAX_PIXELS", 2 * adapter.size[0] * adapter.size[1])
        encode, decode = vae.encode, vae.decode
        monkeypatch.setattr(
            vae, "encode", lambda x, *args, **kwargs: sizes.append(len(x)) or encode(x, *args, **kwargs)
        )
        monkeypatch.setattr(
            vae, "decode", lambda x, *args, **kwargs: sizes.append(len(x)) or decode(x, *args, **kwargs)
        )
        latents = adapter.encode_images(pictures)
        found = adapter.decode(whole)
    assert sizes == [2, 1, 2, 1]
    torch.testing.assert_close(latents, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [len(part) for part in common.prompt_chunks("abcde", common.MAX_TOKENS // 2)] == [2, 2, 1]
    assert len(common.prompt_chunks("ab", 2 * common.MAX_TOKENS)) == 2


def test_a_base_in_bfloat16_encodes_and_runs(adapter, pictures, conditioning):
    """Last: it changes the pipeline."""
    with torch.no_grad():
        expected = velocity(adapter, conditioning)
        for part in adapter.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(torch.bfloat16)
        text = adapter.encode_prompts(PROMPTS, [pictures])
        assert text.embeds.dtype == torch.bfloat16
        found = velocity(adapter, Conditioning(text, *adapter.encode_sources([pictures])))
        assert found.dtype == adapter.latent_dtype
        assert adapter.encode_images(pictures).shape[1:] == adapter.latent_shape
        assert torch.isfinite(adapter.decode(found)).all()
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
