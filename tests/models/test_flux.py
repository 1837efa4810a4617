"""The FLUX adapters give what stock calls of their pipelines give."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from helpers.collection_cases import student_scheduler
from helpers.edits import Sample, condition, few_step, routed, to_images
from helpers.pictures import picture
from helpers.tiny_flux import FAMILIES, FLUX2, KLEIN, KONTEXT, received, stock_call

from clora.data.generation import Generator
from clora.errors import CloraError
from clora.flow.matching import student_schedule, teacher_schedule
from clora.lora.layers import block_layers
from clora.models import adapter_for
from clora.models.loading import with_guidance
from clora.testing import SENTENCES, random_lora, tiny_config

SIZE = (64, 96)  # not square, so that height and width cannot be swapped; the pipelines take no side below 64
PREFERRED = [(48, 96), (72, 64), (64, 64), (80, 64), (96, 64), (64, 80)]  # width and height, one no multiple of 16
TOLERANCE = 1e-4  # of pixels in [0, 1]


@pytest.fixture(scope="module", autouse=True)
def preferred():
    """Kontext's references are small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", PREFERRED)
        yield


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipelines():
    return {id(family): family.make() for family in FAMILIES.values()}


@pytest.fixture(scope="module")
def adapter(family, pipelines):
    return adapter_for(pipelines[id(family)], SIZE, family.length)


@pytest.fixture(scope="module")
def loras(adapter):
    transformer = adapter.pipeline.transformer
    attention = [name for name in block_layers(transformer) if ".attn." in name]
    return {"all": random_lora(transformer, 4, 7), "attention": random_lora(transformer, 2, 8, attention)}


def student_kwargs(adapter):
    """The student's arguments of a stock call, as the exported metadata states them, apart from max_area."""
    return {"guidance_scale": adapter.student_call["guidance_scale"]}


def references(family, sizes, seed=0):
    """Pictures of the sizes; one where the pipeline takes one."""
    return tuple(picture(seed + i, size) for i, size in enumerate(sizes if family.several else sizes[:1]))


CASES = {
    "square": ((64, 64), [(64, 64)]),
    "tall": ((96, 64), [(96, 64)]),
    "other_sizes": ((64, 96), [(79, 100), (64, 128), (100, 81)]),  # 100 / 79 is next to another shape than 96 / 64
}


@pytest.mark.parametrize(("size", "sizes"), CASES.values(), ids=list(CASES))
def test_a_stock_call_equals_the_few_step_sampler(family, pipelines, loras, size, sizes, tmp_path):
    adapter = adapter_for(pipelines[id(family)], size, family.length)
    sample = Sample(SENTENCES[0], references(family, sizes), "all", 5)
    with received(adapter.pipeline.transformer) as calls:
        stock = stock_call(family, adapter, sample, tmp_path, loras, student_scheduler(3.0), **student_kwargs(adapter))
        num_stock = len(calls)
        ours = few_step(adapter, loras, [sample])
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(stock, ours, rtol=0, atol=TOLERANCE)
    assert num_stock == len(calls) - num_stock == 8
    for seen in (calls[:8], calls[8:]):
        assert torch.equal(torch.cat([call["timestep"] for call in seen]), student_schedule(8))
    base = few_step(adapter, loras, [Sample(sample.prompt, sample.images, None, 5)])
    assert (ours - base).abs().max() > 0.01, "the LoRA changes nothing, so this test shows nothing"


def test_a_batch_equals_calls_of_one_sample(family, adapter, loras, tmp_path):
    sizes = [(64, 80), (80, 64)]
    samples = [
        Sample(SENTENCES[i], references(family, sizes, 10 * i), lora, 20 + i)
        for i, lora in enumerate(["all", None, "attention"])
    ]
    batch = few_step(adapter, loras, samples, steps=4)
    for sample, ours in zip(samples, batch, strict=True):
        stock = stock_call(
            family,
            adapter,
            sample,
            tmp_path,
            loras,
            student_scheduler(3.0),
            num_inference_steps=4,
            **student_kwargs(adapter),
        )
        torch.testing.assert_close(stock[0], ours, rtol=0, atol=TOLERANCE)
    assert min((a - b).abs().max() for i, a in enumerate(batch) for b in batch[:i]) > 0.01


TEACHERS = {
    "klein": (KLEIN, 1.5, 5, {"guidance_scale": 2.5}),
    "klein_40_steps": (KLEIN, 4.0, 40, {"guidance_scale": 5.0}),
    "klein_no_guidance": (KLEIN, 0.0, 3, {"guidance_scale": 1.0}),
    "flux2": (FLUX2, 0.0, 5, {}),
    "kontext": (KONTEXT, 0.0, 5, {}),
    "kontext_true_cfg": (KONTEXT, 1.5, 5, {"true_cfg_scale": 2.5, "negative_prompt": ""}),
}


@pytest.mark.parametrize(("family", "w", "steps", "kwargs"), TEACHERS.values(), ids=list(TEACHERS))
def test_a_guided_teacher_equals_a_stock_call(family, pipelines, w, steps, kwargs, tmp_path):
    """The pipeline's own scheduler, which shifts by the size of the image and, in FLUX.2, the number of steps."""
    adapter = adapter_for(pipelines[id(family)], SIZE, family.length)
    loras = {"teacher": random_lora(adapter.pipeline.transformer, 3, 21)}
    sample = Sample(SENTENCES[1], references(family, [(64, 64)]), "teacher", 4)
    with routed(adapter, loras, [sample]) as (bank, ids):
        generator = Generator(adapter, bank)
        noise = generator._noise([4])
        conditioning = condition(adapter, [sample])
        with received(adapter.pipeline.transformer) as ours_calls:
            latents = generator.euler(ids, conditioning, [4], steps, adapter.encode_prompts([""]), w)
    with received(adapter.pipeline.transformer) as calls:
        stock = stock_call(family, adapter, sample, tmp_path, loras, noise=noise, num_inference_steps=steps, **kwargs)
    torch.testing.assert_close(stock, to_images(adapter.decode(latents)), rtol=0, atol=TOLERANCE)
    passes = 1 if w == 0 else 2
    assert len(calls) == steps * passes
    timesteps = torch.cat([call["timestep"] for call in calls])
    torch.testing.assert_close(torch.cat([call["timestep"] for call in ours_calls]), timesteps, rtol=2e-7, atol=0)
    assert (timesteps[::passes] - teacher_schedule(steps)[:-1]).abs().max() > 0.01, "nothing is shifted dynamically"


@pytest.mark.parametrize("family", [FLUX2, KONTEXT], ids=["flux2", "kontext"])
def test_another_guidance_embedding(family, pipelines, tmp_path):
    """The same for student and teacher: one attribute, one transformer input."""
    adapter = adapter_for(pipelines[id(family)], SIZE, family.length, 1.25)
    loras = {"all": random_lora(adapter.pipeline.transformer, 4, 7)}
    sample = Sample(SENTENCES[2], references(family, [(64, 64)]), "all", 6)
    assert student_kwargs(adapter) == {"guidance_scale": 1.25}
    stock = stock_call(family, adapter, sample, tmp_path, loras, student_scheduler(3.0), guidance_scale=1.25)
    ours = few_step(adapter, loras, [sample])
    torch.testing.assert_close(stock, ours, rtol=0, atol=TOLERANCE)
    default = few_step(adapter_for(adapter.pipeline, SIZE, family.length), loras, [sample])
    assert (ours - default).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_transformer_receives_what_a_stock_call_hands_it(family, pipelines, dtype, tmp_path):
    """All of it in the first step; the rounded timesteps and the guidance in all, of student and teacher."""
    pipeline = pipelines[id(family)] if dtype == torch.float32 else family.make().to(dtype)
    adapter = adapter_for(pipeline, SIZE, family.length)
    sample = Sample(SENTENCES[3], references(family, [(128, 144), (80, 112)]), None, 3)
    noise = torch.randn(1, *adapter.latent_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    conditioning = condition(adapter, [sample])
    schedules = {
        "student": (student_scheduler(3.0), student_schedule(8)),
        "teacher": (None, adapter.teacher_schedule(8)),
    }
    for scheduler, sigmas in schedules.values():
        with received(pipeline.transformer) as stock:
            stock_call(family, adapter, sample, tmp_path, {}, scheduler, noise, **student_kwargs(adapter))
        with received(pipeline.transformer) as ours, torch.no_grad():
            for sigma in sigmas[:8]:
                adapter.velocity(noise, sigma[None], conditioning)
        # Bit for bit, references too: `pixels` has the strides of the pipeline's own. With others the encoder's GroupNorm
        # adds up in another order, up to 1e-6 away; on one thread, whose sums are the longest, even more.
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance"):
            assert equal(stock[0].get(name), ours[0].get(name)), name
        for name in ("img_ids", "txt_ids"):
            assert torch.equal(stock[0][name].float().reshape(ours[0][name].shape), ours[0][name].float()), name
        for theirs, mine in zip(stock, ours, strict=True):
            assert equal(theirs["guidance"], mine["guidance"])
            exact = scheduler is not None or dtype == torch.bfloat16
            torch.testing.assert_close(mine["timestep"], theirs["timestep"], rtol=0 if exact else 2e-7, atol=0)


def equal(a, b):
    return a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("family", [KLEIN, FLUX2], ids=["klein", "flux2"])
def test_a_reference_of_more_than_a_megapixel_is_made_smaller(family, pipelines, loras_of, tmp_path):
    adapter = adapter_for(pipelines[id(family)], (64, 64), family.length)
    sample = Sample(SENTENCES[0], (picture(1, (1300, 1000)), picture(2, (70, 90))), "all", 1)
    loras = loras_of(adapter)
    stock = stock_call(
        family,
        adapter,
        sample,
        tmp_path,
        loras,
        student_scheduler(3.0),
        num_inference_steps=1,
        **student_kwargs(adapter),
    )
    assert condition(adapter, [sample]).shapes == ((72, 56), (4, 5))  # 1167 x 898 pixels, in whole patches of 16
    torch.testing.assert_close(stock, few_step(adapter, loras, [sample], steps=1), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def loras_of():
    return lambda adapter: {"all": random_lora(adapter.pipeline.transformer, 4, 7)}


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (1152, 1024)])
def test_the_size_of_a_source_of_the_results_size(family, pipelines, size):
    """`velocity` assumes it of a source without stated sizes."""
    adapter = adapter_for(pipelines[id(family)], size, family.length)
    source, shapes = adapter.encode_sources([torch.zeros(1, 3, *size)])
    assert shapes == adapter.source_shapes
    assert source.shape[1] == sum(height * width for height, width in shapes)
    assert adapter.latent_shape == (size[0] * size[1] // 256, 16)


BLOCK = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
TARGETS = {
    "klein": (
        [*BLOCK, "attn.to_add_out", *(f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out"))],
        ["attn.to_qkv_mlp_proj", "attn.to_out"],
    ),
    "kontext": (
        [*BLOCK, "attn.to_add_out", "norm1.linear", "norm1_context.linear"]
        + [f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")],
        ["attn.to_q", "attn.to_k", "attn.to_v", "norm.linear", "proj_mlp", "proj_out"],
    ),
}
TARGETS["flux2"] = TARGETS["klein"]


@pytest.mark.parametrize("name", list(TARGETS))
def test_default_targets_are_the_layers_of_both_kinds_of_blocks(name, pipelines):
    double, single = TARGETS[name]
    expected = {f"transformer_blocks.0.{layer}" for layer in double}
    expected |= {f"single_transformer_blocks.0.{layer}" for layer in single}
    assert sorted(block_layers(pipelines[id(FAMILIES[name])].transformer)) == sorted(expected)


def test_a_prompt_of_too_many_tokens_is_an_error(family, pipelines):
    """One token too many; the longest prompt that fits is encoded."""
    pipeline = pipelines[id(family)]
    wide = adapter_for(pipeline, SIZE, 200)
    length = wide.num_tokens(SENTENCES[0])
    fits, short = adapter_for(pipeline, SIZE, length), adapter_for(pipeline, SIZE, length - 1)
    assert fits.encode_prompts([SENTENCES[0]]).embeds.shape[1] == length
    with pytest.raises(CloraError, match=f"at most {length - 1} tokens, found {length}"):
        short.encode_prompts([SENTENCES[0]])


@pytest.mark.parametrize(("name", "w", "embedded"), [("klein", 4.0, None), ("flux2", 0.0, 4.0), ("kontext", 0.0, 3.5)])
def test_guidance_that_the_config_does_not_state(name, w, embedded, pipelines):
    """The family's is recorded; a stated one stays."""
    family = FAMILIES[name]
    adapter = adapter_for(pipelines[id(family)], SIZE, family.length)
    silent = with_guidance(tiny_config(["a"], sampler={"guidance": None}), adapter)
    assert (silent.sampler.guidance, silent.sampler.guidance_embedding) == (w, embedded)
    stated = with_guidance(tiny_config(["a"], sampler={"guidance": 0.0}), adapter)
    assert stated.sampler.guidance == 0.0
    assert silent.model_dump(exclude={"sampler"}) == stated.model_dump(exclude={"sampler"})


def test_what_the_pipelines_do_not_have(pipelines):
    klein, flux2, kontext = (pipelines[id(family)] for family in (KLEIN, FLUX2, KONTEXT))
    with pytest.raises(CloraError, match=r"guidance_embedding = 3.5: .*Flux2KleinPipeline has no guidance embedding"):
        adapter_for(klein, SIZE, 40, 3.5)
    with pytest.raises(CloraError, match="at most 512 tokens, found 513"):
        adapter_for(kontext, SIZE, 513)
    with pytest.raises(CloraError, match="one image to edit, which is what FluxKontextPipeline takes, found 2"):
        adapter_for(kontext, SIZE, 60).encode_sources([torch.zeros(1, 3, 64, 64)] * 2)
    for pipeline in (klein, flux2, kontext):
        with pytest.raises(CloraError, match="multiples of 16 pixels, found 64x72"):
            adapter_for(pipeline, (64, 72), 96)


def test_a_transformer_without_guidance_embedding(pipelines):
    """A Kontext that is not distilled for guidance: the stock call hands it none."""
    kontext = pipelines[id(KONTEXT)]
    plain = type(kontext.transformer)(**{**kontext.transformer.config, "guidance_embeds": False})
    pipeline = type(kontext)(**{**kontext.components, "transformer": plain})
    adapter = adapter_for(pipeline, SIZE, 60)
    assert adapter.guidance_embedding is None
    assert adapter.student_call == {"max_area": SIZE[0] * SIZE[1]}
    sample = Sample(SENTENCES[0], (picture(0, (64, 64)),), None, 1)
    with received(plain) as calls, torch.no_grad():
        noise = torch.randn(1, *adapter.latent_shape)
        adapter.velocity(noise, torch.tensor([0.5]), condition(adapter, [sample]))
    assert calls[0]["guidance"] is None
    with pytest.raises(CloraError, match="FluxKontextPipeline has no guidance embedding"):
        adapter_for(pipeline, SIZE, 60, 2.0)
