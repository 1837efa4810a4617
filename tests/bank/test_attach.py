"""`clora.attach`: each sample of a batch with its own LoRA, inside real transformers and a stock pipeline."""

from __future__ import annotations

import pytest
import torch
from helpers.families import FAMILIES, bare_pipeline, run, tiny_transformer
from helpers.pictures import picture
from helpers.tiny_flux import tiny_klein
from safetensors.torch import load_file, save_file

import clora
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.testing import merge_lora, random_lora

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = ["b", None, "a"]


def batch_of(family, transformer, count):
    """Keyword arguments of a pass over ``count`` different samples."""
    seen = {}
    hook = transformer.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    run(family, transformer)
    hook.remove()
    generator = torch.Generator().manual_seed(2)
    for name in {"hidden_states", "encoder_hidden_states", "pooled_projections"} & set(seen):
        seen[name] = torch.randn(count, *seen[name].shape[1:], generator=generator)
    for name in {"timestep", "guidance", "encoder_hidden_states_mask"} & set(seen):
        seen[name] = seen[name] if seen[name] is None else seen[name].repeat(count, *[1] * (seen[name].ndim - 1))
    if "img_shapes" in seen:
        seen["img_shapes"] = seen["img_shapes"] * count
    return seen


def row(batch, i):
    """One sample of a batch; position ids have no row of their own."""
    alone = {
        name: value[i : i + 1] if name not in ("img_ids", "txt_ids") else value
        for name, value in batch.items()
        if value is not None and not isinstance(value, bool)
    }
    return batch | alone


@torch.no_grad()
def outputs(transformer, batch):
    return transformer(**batch)[0]


@pytest.fixture
def loras():
    """Of every linear layer, also those outside of the blocks that see one vector per sample."""
    return lambda transformer: {name: random_lora(transformer, rank, rank) for name, rank in (("a", 2), ("b", 5))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_batch_equals_merged_copies_sample_by_sample(family, loras, tmp_path):
    transformer = tiny_transformer(family)
    states, batch = loras(transformer), batch_of(family, transformer, 3)
    file = tmp_path / "a.safetensors"
    save_lora(states["a"], file)
    before, plain = dict(transformer.named_modules()), outputs(transformer, batch)
    expected = [outputs(merge_lora(transformer, states.get(name)), row(batch, i)) for i, name in enumerate(NAMES)]
    bank = clora.attach(transformer, {"a": file, "b": states["b"]})
    with bank.route(NAMES):
        found = outputs(transformer, batch)
    torch.testing.assert_close(found, torch.cat(expected), **TOLERANCE)
    assert torch.equal(found[1], plain[1])
    assert (found - plain)[[0, 2]].abs().amax(dim=(1, 2)).min() > 1e-2, "too weak to mean anything"
    bank.detach()
    after = dict(transformer.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(outputs(transformer, batch), plain)


def test_a_stock_pipeline_makes_each_picture_with_its_own_lora(loras):
    pipeline = tiny_klein()
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    states = loras(transformer)
    prompts = ["a red fox", "a blue whale", "an old map"]
    noise = torch.randn(3, 64, 4, 4, generator=torch.Generator().manual_seed(3))

    def pictures(prompt, latents):
        return pipeline(
            image=picture(0, (64, 64)),
            prompt=prompt,
            latents=latents,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=4.0,
            output_type="pt",
            max_sequence_length=40,
        ).images

    latents = noise[:, : transformer.config.in_channels]
    expected = []
    for i, name in enumerate(NAMES):
        pipeline.transformer = merge_lora(transformer, states.get(name))
        expected.append(pictures(prompts[i], latents[i : i + 1]))
    pipeline.transformer = transformer
    plain = pictures(prompts, latents)
    bank = clora.attach(pipeline, states)
    with bank.route(NAMES):
        found = pictures(prompts, latents)
    bank.detach()
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)
    assert torch.equal(found[1], plain[1])
    assert (found - plain)[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_slots_have_the_transformers_dtype(loras):
    transformer = tiny_transformer(FAMILIES[0])
    states = loras(transformer)
    transformer.to(torch.bfloat16)
    bank = clora.attach(transformer, states)
    values = sum(2 * 8 * sum(module.delta().shape) for module in states["b"].modules.values())  # of 5 ranks
    assert bank.bytes() == (2 * values, 0)
    batch = batch_of(FAMILIES[0], tiny_transformer(FAMILIES[0]), 3)
    batch = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    with bank.route(NAMES):
        found = outputs(transformer, batch)
    bank.detach()
    expected = outputs(merge_lora(transformer.float(), states["b"]), {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in row(batch, 0).items()
    })  # fmt: skip
    assert found.dtype == torch.bfloat16
    assert (found[:1].float() - expected).norm() < 0.05 * expected.norm()


def test_names_and_batches_that_do_not_fit(loras):
    transformer = tiny_transformer(FAMILIES[0])
    bank = clora.attach(transformer, loras(transformer) | {"moebius": random_lora(transformer, 1, 0)})
    batch = batch_of(FAMILIES[0], tiny_transformer(FAMILIES[0]), 3)
    with pytest.raises(CloraError, match=r"unknown adapter 'mobius'.*did you mean 'moebius'"), bank.route(["mobius"]):
        pass
    with pytest.raises(CloraError, match=r"found the text 'a'; write \['a'\]"), bank.route("a"):
        pass
    with (
        pytest.raises(CloraError, match="2 adapters are routed, but the batch has 1 sample; give one name per sample"),
        bank.route(["a", "b"]),
    ):
        outputs(transformer, batch_of(FAMILIES[0], tiny_transformer(FAMILIES[0]), 1))
    with pytest.raises(CloraError, match=r"gets 3 rows of 2 routed samples"), bank.route(["a", "b"]):
        outputs(transformer, batch)
    with pytest.raises(CloraError, match="run it inside bank.route"):
        outputs(transformer, batch)
    with bank.route(["a"]):  # one for all
        one = outputs(transformer, batch)
    with bank.route(["a"] * 3):
        torch.testing.assert_close(outputs(transformer, batch), one, rtol=0, atol=1e-6)


def test_a_change_without_low_rank_is_attached_as_far_as_it_is_allowed(tmp_path):
    """DoRA that scales a whole weight: the larger error needs fewer ranks."""
    transformer = tiny_transformer("Flux2KleinPipeline")
    name = "transformer_blocks.0.ff.linear_in"
    weight = transformer.get_submodule(name).weight.detach()
    save_lora(random_lora(transformer, 2, 0, [name]), tmp_path / "lora.safetensors")
    scale = {f"transformer.{name}.dora_scale": 1.5 * weight.norm(dim=1, keepdim=True)}
    save_file(load_file(tmp_path / "lora.safetensors") | scale, tmp_path / "dora.safetensors")
    needed = []
    for options in ({}, {"max_error": 0.5}):
        bank = clora.attach(transformer, {"dora": tmp_path / "dora.safetensors"}, **options)
        needed.append(bank.bytes().device)
        bank.detach()
    values = torch.linalg.svdvals(dora_delta(weight, tmp_path / "lora.safetensors", name))
    lost = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt()
    ranks = [int((lost > error).sum()) for error in (0.01, 0.5)]
    assert ranks[1] < ranks[0]
    assert needed == [4 * rank * sum(weight.shape) for rank in ranks]


def dora_delta(weight, file, name):
    """The change that the DoRA above means, by its formula."""
    factors = load_file(file)
    pair = [factors[f"transformer.{name}.lora_{x}.weight"] for x in "BA"]
    merged = weight + pair[0] @ pair[1]
    return 1.5 * weight.norm(dim=1, keepdim=True) * merged / merged.norm(dim=1, keepdim=True) - weight


def test_a_transformer_that_carries_a_bank_is_refused_until_it_is_detached():
    transformer = tiny_transformer(FAMILIES[0])
    lora = {"a": random_lora(transformer, 2, 0)}
    bank = clora.attach(transformer, lora)
    with pytest.raises(CloraError, match=r"has LoRAs loaded .*detach\(\)"):
        clora.attach(transformer, lora)
    bank.detach()
    clora.attach(transformer, lora).detach()


@pytest.mark.parametrize("adapters", ["snow.safetensors", ["snow.safetensors"]])
def test_loras_without_names_are_refused(adapters):
    with pytest.raises(CloraError, match=f"expected names and LoRAs .*found {type(adapters).__name__}; name each LoRA"):
        clora.attach(tiny_transformer(FAMILIES[0]), adapters)


LOADED = {
    "enabled": lambda pipeline: None,
    "disabled": lambda pipeline: pipeline.disable_lora(),
    "deleted": lambda pipeline: pipeline.delete_adapters("loaded"),
    "fused": lambda pipeline: pipeline.fuse_lora(),
    "unfused": lambda pipeline: (pipeline.fuse_lora(), pipeline.unfuse_lora()),
}


@pytest.mark.parametrize("change", LOADED.values(), ids=list(LOADED))
def test_a_transformer_with_loaded_loras_is_refused_until_they_are_unloaded(change, tmp_path):
    """PEFT's layers stay whatever is done to their adapters; a fused LoRA stays in the weights, which are then plain."""
    pipeline = bare_pipeline(FAMILIES[0])
    file = tmp_path / "lora.safetensors"
    save_lora(random_lora(pipeline.transformer, 2, 0), file)
    expected = run(FAMILIES[0], pipeline.transformer)
    pipeline.load_lora_weights(file, adapter_name="loaded")
    change(pipeline)
    if change is LOADED["fused"]:
        expected = run(FAMILIES[0], pipeline.transformer)
    for refused in (lambda: clora.attach(pipeline, {"a": file}), lambda: clora.load_lora(file, pipeline)):
        with pytest.raises(CloraError, match=r"has LoRAs loaded .*call pipe.unload_lora_weights\(\)"):
            refused()
    pipeline.unload_lora_weights()
    bank = clora.attach(pipeline, {"a": clora.load_lora(file, pipeline)})
    with bank.route([None]):
        after = run(FAMILIES[0], pipeline.transformer)
    bank.detach()
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert not hasattr(pipeline.transformer, "peft_config")
