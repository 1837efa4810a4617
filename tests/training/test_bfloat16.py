"""A base in bfloat16: LoRAs, optimizers and losses stay in fp32, latents are rounded where a stock pipeline rounds them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.collection_cases import student_scheduler
from helpers.pictures import write_images
from helpers.trainers import make_trainer, mixed_batch
from PIL import Image
from safetensors.torch import load_file

from clora.bank.bank import AdapterBank
from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.config.settings import DistillConfig
from clora.data.generation import Generator
from clora.data.images import load_image
from clora.flow.matching import student_schedule
from clora.flow.sampling import few_step_sample
from clora.lora.save import save_lora
from clora.models.conditioning import Conditioning
from clora.models.loading import load_pipeline
from clora.testing import MAX_SEQUENCE_LENGTH, random_data, random_lora, tiny_adapter, tiny_config, tiny_pipeline
from clora.training.faults import LOSSES

BF16 = torch.bfloat16
SIZE = (64, 72)


@pytest.fixture(scope="module")
def low(tiny_folder):
    """The shared tiny pipeline's weights in bfloat16."""
    return tiny_adapter(load_pipeline(str(tiny_folder), "cpu", BF16))


def test_a_pipeline_is_loaded_as_diffusers_loads_it(low, tiny_folder):
    whole = tiny_pipeline()
    for name in ("transformer", "vae", "text_encoder"):
        loaded = getattr(low.pipeline, name).state_dict()
        for key, tensor in getattr(whole, name).state_dict().items():
            assert torch.equal(loaded[key], tensor.to(BF16) if tensor.is_floating_point() else tensor), key
        assert not getattr(low.pipeline, name).training


def run(folder, dtype, tmp_path, monkeypatch):
    """A whole run of two updates; returns its reports, its data and the file."""
    reports, seen, (out, images) = [], {}, (tmp_path / dtype, write_images(tmp_path / "images", 4))
    train, encode = engine.train_student, engine.encode_data

    def train_student(config, adapter, teachers, data, report, *rest):
        return train(config, adapter, teachers, data, lambda u, values: reports.append(dict(values)), *rest)

    def encode_data(*arguments):
        seen["data"] = encode(*arguments)
        return seen["data"]

    loras = []
    for seed in range(2):
        loras.append(str(tmp_path / f"{seed}.safetensors"))
        save_lora(random_lora(tiny_pipeline().transformer, 2, seed), loras[-1])
    effects = [{"name": f"e{i}", "lora": lora, "prompt": f"make it {i}"} for i, lora in enumerate(loras)]
    cache = str(tmp_path / "cache")  # to be read after the run
    data = {"sources": str(images), "sources_per_effect": 2, "general_targets": 3, "cache": cache}
    config = tiny_config(effects, pipeline=str(folder), output=str(out), data=data, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_student", train_student)
        patch.setattr(engine, "encode_data", encode_data)
        distill(config)
    return reports, seen["data"], load_file(out / LORA_FILE)


def test_encoding_rendering_training_and_export(tiny_folder, tmp_path, monkeypatch):
    reports, data, weights = run(tiny_folder, "bfloat16", tmp_path, monkeypatch)
    expected, exact, exact_weights = run(tiny_folder, "float32", tmp_path, monkeypatch)
    assert data.text[:].embeds.dtype == BF16
    assert data.targets[:].dtype == data.general_targets[:].dtype == BF16, "as the transformer gives them"
    for name in ("sources", "targets", "general_targets"):
        found, whole = getattr(data, name)[:].float(), getattr(exact, name)[:]
        assert (found - whole).norm() < 0.05 * whole.norm(), name
        assert not torch.equal(found, whole)
    assert len(reports) == 2
    for ours, theirs in zip(reports, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02, abs=1e-3)
    assert {tensor.dtype for tensor in weights.values()} == {BF16}
    assert {tensor.dtype for tensor in exact_weights.values()} == {torch.float32}
    assert weights.keys() == exact_weights.keys()


def test_every_loss_is_near_that_of_fp32(low, adapter):
    """With a student, a critic and teachers that differ by far more than the rounding of bfloat16."""
    reports = {}
    for name, family in (("low", low), ("whole", adapter)):
        with make_trainer(family) as trainer:
            trainer.fit(lambda update, values, name=name: reports.setdefault(name, dict(values)))
    low, whole = ([values[name] for name in LOSSES] for values in (reports["low"], reports["whole"]))
    assert low == pytest.approx(whole, rel=0.1)


def test_trained_factors_and_losses_are_fp32(low):
    data = random_data(low, ["effect_0", "effect_1", "effect_2"])
    data = dataclasses.replace(data, targets=data.targets.to(BF16), sources=data.sources.to(BF16))
    with make_trainer(low, data) as trainer:
        batch = mixed_batch(trainer)
        assert batch.target.dtype == torch.float32
        x, sigma = trainer.steps.simulate(batch)
        assert (x.dtype, sigma.dtype) == (BF16, torch.float32)
        rows = trainer.steps._student_rows(batch, (x, sigma))
        assert rows.x.dtype == BF16, "the loss reads what the transformer read"
        assert rows.anchor_target.dtype == torch.float32
        velocity = trainer.steps._velocity(trainer.student, 0, rows.x, rows.sigma, rows.conditioning)
        assert velocity.dtype == BF16
        scores = trainer.steps._score(rows, velocity.detach())
        assert scores.renoised.dtype == BF16
        stepped = []  # gradients are dropped after a step
        for optimizer in trainer.optimizers.values():
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: stepped.append({p.grad.dtype for p in optimizer.param_groups[0]["params"]})
            )
        trainer.steps.critic_step(batch, (x, sigma))
        trainer.steps.student_step(batch, (x, sigma))
        assert stepped == [{torch.float32}] * 2
        for slots in (trainer.student, trainer.critic):
            assert all(p.dtype == torch.float32 for p in slots.parameters())
        for optimizer in trainer.optimizers.values():
            moments = [m for state in optimizer.state_dict()["state"].values() for m in state.values()]
            assert all(m.dtype == torch.float32 for m in moments)


def test_generated_latents_start_and_end_in_bfloat16(low, inputs, monkeypatch):
    """As in a stock pipeline, whose latents are in the dtype of the prompts."""
    seen, velocity = [], low.velocity
    monkeypatch.setattr(low, "velocity", lambda x, *rest: seen.append(x) or velocity(x, *rest))
    generator = Generator(low)
    out = generator.euler(torch.arange(2), inputs(2)[2], [3, 4], 2)
    noise = torch.randn(low.latent_shape, generator=torch.Generator().manual_seed(3000))
    assert torch.equal(seen[0][0], noise.to(BF16))
    assert {x.dtype for x in (*seen, out)} == {BF16}


def test_a_re_noised_prediction_is_that_of_fp32_arithmetic(low):
    """The clean prediction of a row is not rounded on the way to its noise level."""
    with make_trainer(low) as trainer:
        batch = mixed_batch(trainer)
        rows = trainer.steps._student_rows(batch, trainer.steps.simulate(batch))
        velocity = trainer.steps._velocity(trainer.student, 0, rows.x, rows.sigma, rows.conditioning).detach()
        found = trainer.steps._score(rows, velocity).renoised
        n, noise = len(rows.teacher), rows.score_noise
        assert noise.dtype == torch.float32
        sigma, level = rows.sigma[:n, None, None], rows.score_sigma[:, None, None]
        x0 = rows.x[:n].float() - sigma * velocity[:n].float()
        assert torch.equal(found, ((1 - level) * x0 + level * noise).to(BF16))


def test_a_stock_pipeline_in_bfloat16_has_our_timesteps_and_latents(tiny_folder, tmp_path):
    """The student's sampler against the pipeline's own call, with the LoRA loaded and the collection's scheduler."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder).to(BF16)
    pipeline.set_progress_bar_config(disable=True)
    adapter, student = tiny_adapter(pipeline, SIZE), random_lora(pipeline.transformer, 4, 7)
    picture = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(picture)
    noise = torch.randn(1, 16, 16, 18, generator=torch.Generator().manual_seed(11)).to(BF16)
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["timestep"], kwargs["hidden_states"])), with_kwargs=True
    )
    text = adapter.encode_prompts(["make it a blueprint"])
    conditioning = Conditioning(text, adapter.encode_images(load_image(picture, SIZE)[None]))
    bank = AdapterBank(pipeline.transformer, {"student": student})
    torch.manual_seed(0)
    with torch.no_grad(), bank.route(bank.slots(), torch.tensor([0])):
        few_step_sample(
            lambda x, sigma: adapter.velocity(x, sigma, conditioning),
            noise.flatten(2).transpose(1, 2),
            student_schedule(8, 3.0),
        )
    bank.detach()
    ours, seen[:] = list(seen), []
    save_lora(student, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.scheduler = student_scheduler(3.0)
    torch.manual_seed(0)
    pipeline(
        image=Image.open(picture),
        prompt="make it a blueprint",
        num_inference_steps=8,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        height=SIZE[0],
        width=SIZE[1],
        output_type="latent",
    )
    hook.remove()
    assert len(ours) == len(seen) == 8
    for (timestep, latents), (stock_timestep, stock_latents) in zip(ours, seen, strict=True):
        assert timestep.dtype == stock_timestep.dtype == latents.dtype == BF16
        assert torch.equal(timestep, stock_timestep)
        error = (latents.float() - stock_latents.float()).norm() / stock_latents.float().norm()
        assert error < 0.01, "peft adds its delta in another order"


def test_the_config_has_the_dtype():
    assert DistillConfig.model_fields["dtype"].default == "auto"
    with pytest.raises(ValueError, match="float16"):
        DistillConfig.model_validate({**tiny_config(["a"]).model_dump(), "dtype": "float16"})
