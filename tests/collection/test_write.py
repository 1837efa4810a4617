"""A written collection in a stock diffusers pipeline equals clora's own samplers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers.collection_cases import describe, effect, student_scheduler
from PIL import Image
from safetensors import safe_open

from clora.bank.bank import AdapterBank
from clora.collection.metadata import read_collection
from clora.collection.write import LORA_FILE, write_collection
from clora.data.generation import Generator
from clora.data.images import load_image
from clora.errors import CloraError
from clora.flow.matching import student_schedule, teacher_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.lora.state import LoRAModule, LoRAState
from clora.models.conditioning import Conditioning
from clora.testing import MAX_SEQUENCE_LENGTH, random_lora, tiny_adapter

PROMPT = "make it a blueprint with thin white lines"
STEPS = 8
SIZE = (64, 72)  # the pipeline takes no image below 64 pixels; not square, so that height and width cannot be swapped
GRID = (16, 18)


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter(size=SIZE)


@pytest.fixture(scope="module")
def student(adapter):
    return random_lora(adapter.pipeline.transformer, 4, 7)


@pytest.fixture(scope="module")
def described():
    effects = (
        effect("blueprint", (PROMPT, "a blueprint"), "apache-2.0", trigger="blueprint"),
        effect("snow", ("add falling snow",)),
    )
    return describe(
        *effects,
        base_revision="c0ffee" * 6,
        metrics={"accuracy": 0.98, "PSNR": {"blueprint": 21.5, "snow": 19.0}},
        provenance={"seed": 5},
    )


@pytest.fixture(scope="module")
def collection(described, student, tmp_path_factory):
    return write_collection(student, described, tmp_path_factory.mktemp("out") / "collection", torch.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.png"
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pipeline(tiny_folder):
    """A fresh stock pipeline, as a user loads it."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, source, latents, steps=STEPS, guidance_scale=1.0, seed=0, **kwargs):
    """The stock call; explicit latents ``[1, C, H, W]``, images ``[1, 3, H, W]`` in [0, 1]."""
    torch.manual_seed(seed)
    return pipeline(
        image=Image.open(source),
        prompt=PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=latents,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        height=SIZE[0],
        width=SIZE[1],
        output_type="pt",
        **kwargs,
    ).images


def draw_latents():
    return torch.randn(1, 16, *GRID, generator=torch.Generator().manual_seed(11))


def packed(latents):
    return latents.flatten(2).transpose(1, 2)


def image(adapter, latents):
    return (adapter.decode(latents) / 2 + 0.5).clamp(0, 1)


def condition(adapter, source):
    return Conditioning(adapter.encode_prompts([PROMPT]), adapter.encode_images(load_image(source, SIZE)[None]))


def sample(adapter, state, conditioning, latents, steps=STEPS, seed=0):
    """clora's few-step sampler through a bank, drawing from the global generator as a pipeline does."""
    with AdapterBank(adapter.pipeline.transformer, {"student": state}) as bank:
        torch.manual_seed(seed)
        with torch.no_grad(), bank.route(bank.slots(), torch.tensor([0])):
            return few_step_sample(
                lambda x, sigma: adapter.velocity(x, sigma, conditioning), packed(latents), student_schedule(steps)
            )


def scaled(state, factor):
    return LoRAState({name: LoRAModule(m.lora_A, m.lora_B * factor) for name, m in state.modules.items()})


def load_collection(pipeline, folder):
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


def test_a_stock_pipeline_equals_our_sampler_with_trainings_timesteps(adapter, pipeline, collection, student, source):
    load_collection(pipeline, collection)
    timesteps = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(kwargs["timestep"].clone()), with_kwargs=True
    )
    stock = call(pipeline, source, draw_latents())
    assert torch.equal(torch.cat(timesteps), student_schedule(STEPS))
    conditioning = condition(adapter, source)
    ours = image(adapter, sample(adapter, student, conditioning, draw_latents()))
    assert stock.shape == (1, 3, *SIZE)
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-4)
    without = image(adapter, sample(adapter, scaled(student, 0.0), conditioning, draw_latents()))
    assert (ours - without).abs().max() > 0.01, "the LoRA changes nothing, so this test shows nothing"


@pytest.mark.parametrize("way", ["set_adapters", "attention_kwargs"])
def test_half_strength_halves_the_delta(adapter, pipeline, collection, student, source, way):
    load_collection(pipeline, collection)
    kwargs = {}
    if way == "set_adapters":
        pipeline.set_adapters(pipeline.get_active_adapters(), [0.5])
    else:
        kwargs = {"attention_kwargs": {"scale": 0.5}}
    stock = call(pipeline, source, draw_latents(), **kwargs)
    conditioning = condition(adapter, source)
    half, whole = (
        image(adapter, sample(adapter, scaled(student, s), conditioning, draw_latents())) for s in (0.5, 1.0)
    )
    torch.testing.assert_close(stock, half, rtol=0, atol=1e-4)
    assert (half - whole).abs().max() > 0.01


def test_a_guided_teacher_equals_the_stock_pipeline(adapter, pipeline, source, tmp_path):
    """Guidance w is guidance_scale w + 1; Euler, static shift, the pipeline's own scheduler."""
    steps, w = 5, 1.5
    teacher = random_lora(adapter.pipeline.transformer, 3, 21)
    save_lora(teacher, tmp_path / "teacher.safetensors")
    pipeline.load_lora_weights(tmp_path / "teacher.safetensors")
    timesteps = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(kwargs["timestep"].clone()), with_kwargs=True
    )
    with AdapterBank(adapter.pipeline.transformer, {"teacher": teacher}) as bank:
        generator = Generator(adapter, bank)
        noise = generator._noise([4])
        latents = generator.euler(
            torch.tensor([0]), condition(adapter, source), [4], steps, adapter.encode_prompts([""]), w
        )
    stock = call(pipeline, source, noise.transpose(1, 2).reshape(1, 16, *GRID), steps, w + 1)
    torch.testing.assert_close(stock, image(adapter, latents), rtol=0, atol=1e-4)
    assert torch.equal(torch.cat(timesteps), teacher_schedule(steps)[:-1].repeat_interleave(2))


def test_the_folder(adapter, collection, described, student):
    assert sorted(p.name for p in collection.iterdir()) == ["README.md", LORA_FILE, "scheduler"]
    with safe_open(collection / LORA_FILE, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        ranks = {file.get_tensor(k).shape[0] for k in keys if "lora_A" in k}
    assert keys == {f"transformer.{m}.{f}.weight" for m in student.modules for f in ("lora_A", "lora_B")}
    assert ranks == {4}
    assert "lora_adapter_metadata" not in metadata
    assert {key for key in metadata if not key.startswith("clora.")} == {"format"}
    assert json.loads(metadata["clora.effects"])[0] == {
        "name": "blueprint",
        "prompts": [PROMPT, "a blueprint"],
        "teacher": "blueprint.safetensors",
        "teacher_sha256": "ab" * 32,
        "trigger": "blueprint",
        "license": "apache-2.0",
    }
    assert json.loads(metadata["clora.sampling"]) == {
        "steps": STEPS,
        "shift": 3.0,
        "call": {"guidance_scale": 1.0},
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "size": list(SIZE),
    }
    assert (metadata["clora.base_model"], metadata["clora.base_revision"]) == ("some/pipeline", "c0ffee" * 6)
    assert json.loads(metadata["clora.scheduler"])["stochastic_sampling"] is True
    assert read_collection(collection) == read_collection(collection / LORA_FILE) == described
    card = (collection / "README.md").read_text("utf-8")
    for text in (
        PROMPT,
        "add falling snow",
        "some/pipeline",
        "apache-2.0",
        "ComfyUI",
        f"num_inference_steps={STEPS}",
        f"max_sequence_length={MAX_SEQUENCE_LENGTH}",
        "shift 3.0",
        "| PSNR, blueprint | 21.5 |",
    ):
        assert text in card, text
    read = load_lora(collection, adapter.pipeline.transformer)
    for name, module in read.modules.items():
        torch.testing.assert_close(module.delta(), student.modules[name].delta())


def test_unequal_ranks_are_written_as_one(adapter, tmp_path):
    transformer = adapter.pipeline.transformer
    low = random_lora(transformer, 2, 0, ["transformer_blocks.0.attn.to_q"])
    high = random_lora(transformer, 5, 1, ["transformer_blocks.0.attn.to_k"])
    mixed = LoRAState({**low.modules, **high.modules})
    folder = write_collection(mixed, describe(), tmp_path / "out", torch.float32)
    with safe_open(folder / LORA_FILE, "pt") as file:
        shapes = {k: tuple(file.get_tensor(k).shape) for k in file.keys()}  # noqa: SIM118
    assert {shape["lora_B" in key] for key, shape in shapes.items()} == {5}


SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
folder, collection, source, out, prompt, length = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.load_lora_weights(collection)
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(collection + "/scheduler")
latents = torch.load(out)
torch.manual_seed(0)
images = pipe(image=Image.open(source), prompt=prompt, num_inference_steps=8, guidance_scale=1.0, latents=latents,
              max_sequence_length=int(length), height=64, width=72, output_type="pt").images
assert not any(name.partition(".")[0] in ("clora", "csrc_triton") for name in sys.modules)
torch.save(images, out)
"""


@pytest.mark.slow
def test_a_process_without_clora_makes_the_same_picture(adapter, tiny_folder, collection, student, source, tmp_path):
    out = tmp_path / "tensor.pt"
    torch.save(draw_latents(), out)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    arguments = [str(a) for a in (tiny_folder, collection, source, out, PROMPT, MAX_SEQUENCE_LENGTH)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = image(adapter, sample(adapter, student, condition(adapter, source), draw_latents()))
    torch.testing.assert_close(torch.load(out), ours, rtol=0, atol=1e-4)


def test_the_tiny_pipeline_is_saved_whole(tiny_folder):
    """The basis of these tests: loading returns the weights and the tokens that were saved."""
    loaded, fresh = tiny_adapter(DiffusionPipeline.from_pretrained(tiny_folder)), tiny_adapter()
    for (name, a), b in zip(
        loaded.pipeline.transformer.named_parameters(), fresh.pipeline.transformer.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    torch.testing.assert_close(loaded.encode_prompts([PROMPT]).embeds, fresh.encode_prompts([PROMPT]).embeds)


def test_the_scheduler_is_as_diffusers_saves_it(student, tmp_path):
    folder = write_collection(student, describe(shift=2.5), tmp_path / "out", torch.float32)
    student_scheduler(2.5).save_pretrained(tmp_path / "theirs")
    ours, theirs = (path / "scheduler_config.json" for path in (folder / "scheduler", tmp_path / "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config == student_scheduler(2.5).config


def test_weights_that_overflow_leave_nothing(adapter, tmp_path):
    student = random_lora(adapter.pipeline.transformer, 2, 0)
    next(iter(student.modules.values())).lora_B[0, 0] = 1e6
    with pytest.raises(CloraError, match="infinite values as torch.float16"):
        write_collection(student, describe(), tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
