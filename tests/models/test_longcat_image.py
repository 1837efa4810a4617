"""LongCat-Image-Edit: clora's samplers equal stock calls of the pipeline with the LoRA loaded into its transformer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_longcat
from helpers.collection_cases import describe
from helpers.pictures import picture, pixels, write_images
from helpers.tiny_longcat import MAX_SEQUENCE_LENGTH, tiny_adapter, tiny_pipeline
from safetensors.torch import load_file, save_file

import clora
from clora.bank.bank import AdapterBank
from clora.collection.card import model_card
from clora.collection.metadata import read_collection, to_metadata
from clora.collection.write import LORA_FILE, student_scheduler, write_collection
from clora.data.generation import Generator
from clora.data.prepare import encode_data
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.layers import block_layers
from clora.lora.save import save_lora
from clora.models import adapter_for
from clora.models.conditioning import Conditioning
from clora.models.families.longcat_image import LongCatImageEditAdapter
from clora.testing import random_lora, random_teachers, tiny_config
from clora.training.student import train_student

SIZE = (64, 80)
PROMPTS = (
    "make it a blueprint with thin white lines",
    'write "snow" on it',
    "it's a warm sunset",
    "brighten the image",
)
STEPS = 8


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
    return [random_lora(adapter.pipeline.transformer, 2 + i, 40 + i) for i in range(2)]


def stock_pipeline(lora, folder, scheduler=None):
    """A fresh pipeline that loads a collection's folder the way that LongCat has for it."""
    pipeline = tiny_pipeline()
    save_lora(lora, folder / LORA_FILE)
    pipeline.transformer.load_lora_adapter(folder, prefix="transformer", weight_name=LORA_FILE)
    pipeline.scheduler = scheduler or pipeline.scheduler
    return pipeline


def call(pipeline, image, prompt, latents, steps=STEPS, seed=0, **guidance):
    torch.manual_seed(seed)
    return pipeline(
        image,
        prompt,
        num_inference_steps=steps,
        latents=latents,
        output_type="pt",
        **guidance,
    ).images


def condition(adapter, prompts, images):
    references = [torch.cat([pixels(image) for image in images])]
    return Conditioning(adapter.encode_prompts(prompts, references), *adapter.encode_sources(references))


def few_step(adapter, states, ids, conditioning, latents, noises=None, seed=0):
    """Through a bank; noises from the global generator by default, as a stock call draws them."""
    with AdapterBank(adapter.pipeline.transformer, {str(i): state for i, state in enumerate(states)}) as bank:
        torch.manual_seed(seed)
        with torch.no_grad(), bank.route(bank.slots(), torch.tensor(ids)):
            return few_step_sample(
                lambda x, sigma: adapter.velocity(x, sigma, conditioning),
                latents,
                student_schedule(STEPS),
                noises=noises,
            )


def assert_carries(transformer, lora):
    """Every delta is the LoRA's, and no other layer has one."""
    loaded = {name: module for name, module in transformer.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(loaded) == set(lora.modules)
    for name, layer in loaded.items():
        torch.testing.assert_close(layer.get_delta_weight("default_0"), lora.modules[name].delta())


def image(adapter, latents):
    return (adapter.decode(latents) / 2 + 0.5).clamp(0, 1)


def draw(adapter, count, seed):
    torch.manual_seed(seed)
    return [torch.randn(1, *adapter.latent_shape) for _ in range(count)]


@contextmanager
def timesteps_of(pipeline):
    """Collects what the transformer receives as time."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].clone()), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize(
    ("size", "picture_size"),
    [((64, 64), (64, 64)), (SIZE, SIZE), (SIZE, (152, 190)), (SIZE, (40, 48)), ((80, 64), (81, 64))],
)
def test_few_steps_equal_a_stock_call(loras, tmp_path, size, picture_size):
    """Pictures of any size that has the proportions."""
    pipeline, adapter = stock_pipeline(loras[0], tmp_path, student_scheduler(3.0)), tiny_adapter(size=size)
    latents, *_ = draw(adapter, 1, seed=11)
    with timesteps_of(pipeline) as stock_times:
        stock = call(pipeline, picture(0, picture_size), PROMPTS[0], latents, **adapter.student_call)
    conditioning = condition(adapter, PROMPTS[:1], [picture(0, picture_size)])
    with timesteps_of(adapter.pipeline) as times:
        ours = image(adapter, few_step(adapter, loras[:1], [0], conditioning, latents))
    assert torch.equal(torch.cat(stock_times), torch.cat(times))
    assert torch.equal(torch.cat(times), student_schedule(STEPS))
    assert stock.shape == (1, 3, *size)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    without = image(adapter, few_step(adapter, loras[:1], [-1], conditioning, latents))
    assert (without - stock).abs().max() > 0.01, "the LoRA changes nothing"


def test_a_batch_equals_stock_calls_of_its_samples(adapter, loras, tmp_path):
    """Different pictures, prompts and adapters, one of them the base."""
    ids, images = [1, 0, -1, 1], [picture(i, SIZE) for i in range(4)]
    latents = torch.cat([draw(adapter, 1, seed=20 + i)[0] for i in range(4)])
    noises = [torch.cat(noise) for noise in zip(*(draw(adapter, STEPS - 1, seed=i) for i in range(4)), strict=True)]
    ours = image(adapter, few_step(adapter, loras, ids, condition(adapter, PROMPTS, images), latents, noises))
    for i, lora in enumerate(ids):
        pipeline = stock_pipeline(loras[lora], tmp_path, student_scheduler(3.0))
        if lora == -1:
            pipeline.transformer.disable_lora()
        stock = call(pipeline, images[i], PROMPTS[i], latents[i : i + 1], seed=i, **adapter.student_call)
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 2.5])
def test_guided_teachers_equal_stock_calls(adapter, loras, tmp_path, w):
    """The pipeline's own scheduler, which shifts dynamically; its guidance scale is w + 1."""
    steps, images = 5, [picture(i, SIZE) for i in range(2)]
    pipeline = stock_pipeline(loras[1], tmp_path)
    with AdapterBank(adapter.pipeline.transformer, {"teacher": loras[1]}) as bank:
        conditioning = condition(adapter, PROMPTS[:2], images)
        empty = adapter.encode_prompts(["", ""], [torch.cat([pixels(image) for image in images])])
        generator = Generator(adapter, bank, bank.slots(), 3.0)
        noise = generator._noise([4, 7])
        with timesteps_of(adapter.pipeline) as times:
            latents = generator.guided_euler(torch.tensor([0, 0]), conditioning, empty, [4, 7], steps, w)
    ours = image(adapter, latents)
    for i in range(2):
        with timesteps_of(pipeline) as stock_times:
            stock = call(pipeline, images[i], PROMPTS[i], noise[i : i + 1], steps, guidance_scale=w + 1)
        torch.testing.assert_close(ours[i : i + 1], stock, rtol=0, atol=1e-4)
        passes = 2 if w else 1
        assert len(stock_times) == steps * passes
        for time, stock_time in zip(times, stock_times[::passes], strict=True):  # 1000 sigma / 1000: the last bit
            torch.testing.assert_close(time[i], stock_time[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kwargs"), [(LORA_FILE, {}), ("", {"weight_name": LORA_FILE}), ("", {"use_safetensors": True})]
)
def test_a_collection_loads_whole(loras, tmp_path, name, kwargs):
    """By file, by folder with the name, and by folder with the type; a folder alone is taken for a pickle's."""
    save_lora(loras[0], tmp_path / LORA_FILE)
    transformer = tiny_pipeline().transformer
    transformer.load_lora_adapter(tmp_path / name, prefix="transformer", **kwargs)
    assert_carries(transformer, loras[0])


@pytest.fixture
def collection(loras, tmp_path):
    """A collection of random weights, and its LoRA."""
    described = describe(pipeline="LongCatImageEditPipeline", call={"guidance_scale": 1.0})
    return write_collection(loras[0], described, tmp_path / "collection", torch.float32)


def test_apply_loads_a_collection_into_the_transformer(loras, collection):
    pipeline = tiny_pipeline()
    effects = clora.apply(pipeline, collection)
    assert_carries(pipeline.transformer, loras[0])
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
    assert_carries(pipeline.transformer, loras[0])


def test_a_student_is_trained(adapter, tmp_path):
    write_images(tmp_path, 3, size=(70, 90))
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    data = {"sources": str(tmp_path), "size": SIZE, "sources_per_effect": 2, "general_targets": 2}
    config = tiny_config(list(teachers), data={**data, "max_sequence_length": MAX_SEQUENCE_LENGTH})
    encoded = encode_data(config, adapter, teachers)
    assert encoded.targets.shape == encoded.sources.shape == (2, 2, *adapter.latent_shape)
    reports = []
    student = train_student(config, adapter, teachers, encoded, lambda update, values: reports.append(values))
    assert len(reports) == 2
    assert set(student.modules) == set(block_layers(adapter.pipeline.transformer))
    assert all(torch.isfinite(module.delta()).all() for module in student.modules.values())
    assert sum(bool(module.lora_B.any()) for module in student.modules.values()) == len(student.modules)


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
