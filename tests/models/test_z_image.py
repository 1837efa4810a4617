"""Z-Image Omni: clora's samplers equal stock calls of the pipeline with the LoRA loaded."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.pictures import picture, pixels, write_images
from helpers.tiny_z_image import MAX_SEQUENCE_LENGTH, tiny_adapter, tiny_pipeline

from clora.bank.bank import AdapterBank
from clora.collection.write import student_scheduler
from clora.data.generation import Generator
from clora.data.prepare import encode_data
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.layers import block_layers
from clora.lora.save import save_lora
from clora.models import adapter_for
from clora.models.conditioning import Conditioning
from clora.models.families.z_image import ZImageOmniAdapter, _pack, _unpack
from clora.testing import random_lora, random_teachers, tiny_config
from clora.training.student import train_student

SIZE = (64, 80)
PROMPTS = (
    "make it a blueprint with thin white lines",
    "snow",
    "turn the picture into a warm sunset",
    "brighten the image",
)
STEPS = 8


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter(size=SIZE)


@pytest.fixture(scope="module")
def loras(adapter):
    return [random_lora(adapter.pipeline.transformer, 2 + i, 40 + i) for i in range(2)]


def stock_pipeline(lora, folder, scheduler=None):
    """A fresh pipeline as a user has it, except that its fp32 VAE takes the bfloat16 pixels it is handed."""
    pipeline = tiny_pipeline()
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    save_lora(lora, folder / "lora.safetensors")
    pipeline.load_lora_weights(folder / "lora.safetensors")
    pipeline.scheduler = scheduler or pipeline.scheduler
    return pipeline


def call(pipeline, images, prompt, latents, steps=STEPS, seed=0, output_type="pt", **guidance):
    torch.manual_seed(seed)
    height, width = (8 * side for side in latents.shape[2:])
    return pipeline(
        images,
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=latents,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type=output_type,
        **guidance,
    ).images


def draw(count, size=SIZE, seed=0):
    """Noise in the pipeline's layout, from the global generator, as its scheduler draws it."""
    torch.manual_seed(seed)
    return [torch.randn(1, 16, size[0] // 8, size[1] // 8) for _ in range(count)]


def condition(adapter, prompts, images):
    """``images``: K lists of one picture for each prompt."""
    references = [torch.cat([pixels(image) for image in column]) for column in images]
    return Conditioning(adapter.encode_prompts(prompts, references), *adapter.encode_sources(references))


def few_step(adapter, states, ids, conditioning, latents, noises):
    """Through a bank; latents and the steps' noises in the pipeline's layout."""
    with AdapterBank(adapter.pipeline.transformer, {str(i): state for i, state in enumerate(states)}) as bank:
        with torch.no_grad(), bank.route(bank.slots(), torch.tensor(ids)):
            return few_step_sample(
                lambda x, sigma: adapter.velocity(x, sigma, conditioning),
                _pack(latents),
                student_schedule(STEPS),
                noises=[_pack(noise) for noise in noises],
            )


def image(adapter, latents):
    return (adapter.decode(latents) / 2 + 0.5).clamp(0, 1)


@contextmanager
def timesteps_of(pipeline):
    """Collects what the transformer receives as time."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["t"].clone()), with_kwargs=True
    )
    yield seen
    hook.remove()


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
def test_few_steps_equal_a_stock_call(loras, tmp_path, size, reference_sizes):
    pipeline = stock_pipeline(loras[0], tmp_path, student_scheduler(3.0))
    images = [picture(i, reference) for i, reference in enumerate(reference_sizes)]
    latents, *_ = draw(1, size, seed=11)
    adapter = tiny_adapter(size=size)
    with timesteps_of(pipeline) as stock_times:
        stock = call(pipeline, list(images), PROMPTS[0], latents, **adapter.student_call)
    conditioning = condition(adapter, PROMPTS[:1], [[image] for image in images])
    with timesteps_of(adapter.pipeline) as times:
        ours = few_step(adapter, loras[:1], [0], conditioning, latents, draw(STEPS - 1, size))
    assert torch.equal(torch.cat(stock_times), torch.cat(times))
    torch.testing.assert_close(torch.cat(times), 1 - student_schedule(STEPS), rtol=0, atol=1e-7)
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(image(adapter, ours), stock, rtol=0, atol=1e-4)
    without = few_step(adapter, loras[:1], [-1], conditioning, latents, draw(STEPS - 1, size))
    assert (image(adapter, without) - stock).abs().max() > 0.01, "the LoRA changes nothing"


def test_a_batch_equals_stock_calls_of_its_samples(adapter, loras, tmp_path):
    """Different pictures, prompts of different lengths and different adapters, one of them the base."""
    ids, images = [1, 0, -1, 1], [picture(i, SIZE) for i in range(4)]
    latents = torch.cat([draw(1, seed=20 + i)[0] for i in range(4)])
    noises = [torch.cat(noise) for noise in zip(*(draw(STEPS - 1, seed=i) for i in range(4)), strict=True)]
    conditioning = condition(adapter, PROMPTS, [images])
    ours = image(adapter, few_step(adapter, loras, ids, conditioning, latents, noises))
    for i, lora in enumerate(ids):
        pipeline = stock_pipeline(loras[lora], tmp_path, student_scheduler(3.0))
        if lora == -1:
            pipeline.disable_lora()
        stock = call(pipeline, [images[i]], PROMPTS[i], latents[i : i + 1], seed=i, **adapter.student_call)
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)


def test_layers_outside_the_blocks(adapter, tmp_path):
    """Those that see samples are routed; embedders get the tokens of all samples in one, and are refused in a batch."""
    transformer, images = adapter.pipeline.transformer, [picture(i, SIZE) for i in range(2)]
    latents, noises = torch.cat(draw(2, seed=5)), [torch.cat([noise, noise]) for noise in draw(STEPS - 1)]
    conditioning = condition(adapter, PROMPTS[:2], [images])
    routed = random_lora(transformer, 2, 0, ["t_embedder.mlp.0", "all_final_layer.2-1.linear"])
    pipeline = stock_pipeline(routed, tmp_path, student_scheduler(3.0))
    stock = call(pipeline, [images[1]], PROMPTS[1], latents[1:], **adapter.student_call)
    ours = image(adapter, few_step(adapter, [routed], [-1, 0], conditioning, latents, noises))
    torch.testing.assert_close(ours[1:], stock, rtol=0, atol=1e-4)
    for name in ("cap_embedder.1", "all_x_embedder.2-1", "siglip_embedder.1"):
        embedder = random_lora(transformer, 2, 0, [name])
        with pytest.raises(CloraError, match=f"{name}.* rows of 2 routed samples"):
            few_step(adapter, [embedder], [-1, 0], conditioning, latents, noises)
        few_step(adapter, [embedder], [0], conditioning[1:], latents[1:], [noise[1:] for noise in noises])


@pytest.mark.parametrize("w", [0.0, 2.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_guided_teachers_equal_stock_calls(loras, tmp_path, w, dynamic):
    """The pipeline's own scheduler; its guidance scale is w."""
    steps, images = 5, [picture(i, SIZE) for i in range(2)]
    adapter = tiny_adapter(size=SIZE)
    pipeline = stock_pipeline(loras[1], tmp_path)
    for each in (adapter.pipeline, pipeline):
        config = {"use_dynamic_shifting": dynamic, "base_shift": 0.4, "max_image_seq_len": 60}
        each.scheduler = type(each.scheduler).from_config(each.scheduler.config, **config)
    with AdapterBank(adapter.pipeline.transformer, {"teacher": loras[1]}) as bank:
        generator = Generator(adapter, bank, bank.slots(), 3.0)
        noise, ids = generator._noise([4, 7]), torch.tensor([0, 0])
        with timesteps_of(adapter.pipeline) as times:
            latents = generator.guided_euler(
                ids, condition(adapter, PROMPTS[:2], [images]), adapter.encode_prompts([""]), [4, 7], steps, w
            )
    ours = image(adapter, latents)
    for i in range(2):
        with timesteps_of(pipeline) as stock_times:
            stock = call(pipeline, [images[i]], PROMPTS[i], _unpack(noise[i : i + 1], (4, 5)), steps, guidance_scale=w)
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)
        for time, stock_time in zip(times, stock_times, strict=True):  # the pipeline's linspace is fp32: the last bit
            torch.testing.assert_close(time[i], stock_time[0], rtol=0, atol=1e-7)


def test_an_unchanged_pipeline_with_its_bfloat16_vae(loras, tmp_path):
    """What users have: no hook; latents are compared, as bfloat16 pixels are no measure."""
    pipeline, adapter = tiny_pipeline(), tiny_adapter(size=SIZE)
    for each in (pipeline, adapter.pipeline):
        each.vae.to(torch.bfloat16)
    save_lora(loras[0], tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.scheduler = student_scheduler(3.0)
    latents, *_ = draw(1, seed=3)
    stock = call(pipeline, [picture(0, SIZE)], PROMPTS[0], latents, output_type="latent", **adapter.student_call)
    conditioning = condition(adapter, PROMPTS[:1], [[picture(0, SIZE)]])
    ours = few_step(adapter, loras[:1], [0], conditioning, latents, draw(STEPS - 1))
    torch.testing.assert_close(_unpack(ours, (4, 5)), stock, rtol=0, atol=1e-4)
    assert adapter.decode(ours).dtype == torch.bfloat16


def test_a_bfloat16_transformer_keeps_latents_in_fp32(loras, adapter, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    low = tiny_adapter(pipeline, SIZE)
    conditioning = condition(low, PROMPTS[:1], [[picture(0, SIZE)]])
    (latents,) = draw(1)
    v = low.velocity(_pack(latents), torch.tensor([0.7]), conditioning)
    expected = adapter.velocity(_pack(latents), torch.tensor([0.7]), conditioning)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, expected, rtol=0.05, atol=0.05)


def test_a_student_is_trained(adapter, tmp_path):
    write_images(tmp_path, 3, size=(70, 90))
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    data = {"sources": str(tmp_path), "size": SIZE, "sources_per_effect": 2, "general_targets": 2}
    config = tiny_config(list(teachers), data={**data, "max_sequence_length": MAX_SEQUENCE_LENGTH})
    encoded = encode_data(config, adapter, teachers)
    assert encoded.targets.shape == (2, 2, *adapter.latent_shape)
    reports = []
    student = train_student(config, adapter, teachers, encoded, lambda update, values: reports.append(values))
    assert len(reports) == 2
    assert set(student.modules) == set(block_layers(adapter.pipeline.transformer))
    unchanged = [name for name, module in student.modules.items() if not module.lora_B.any()]
    assert not unchanged
    assert all(torch.isfinite(module.delta()).all() for module in student.modules.values())


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
