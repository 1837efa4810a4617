"""Routes of `clora.attach`: rows of several pictures, strengths, fused projections, compiled transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.families import FAMILIES, bare_pipeline, inputs_of, tiny_transformer

import clora
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.lora.state import LoRAModule, LoRAState
from clora.testing import merge_lora, random_lora

KLEIN = FAMILIES[0]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def outputs(family, transformer, samples=4, **more):
    return transformer(**inputs_of(family, samples), return_dict=False, **more)[0]


def weakened(lora, strength):
    return LoRAState({name: LoRAModule(m.lora_A, strength * m.lora_B) for name, m in lora.modules.items()})


@pytest.fixture
def loras():
    return {"a": random_lora(tiny_transformer(KLEIN), 2, 1), "b": random_lora(tiny_transformer(KLEIN), 3, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_samples_than_names_are_refused(family):
    """Two pictures of each prompt are a, a, b, b; negative prompts in the same pass are a, b, a, b."""
    transformer = tiny_transformer(family)
    bank = clora.attach(transformer, {name: random_lora(transformer, 2, seed) for seed, name in enumerate("ab")})
    message = r"2 adapters are routed, but the batch has 4 samples; give one name for each.*a, a, b, b for two pictures"
    with pytest.raises(CloraError, match=message), bank.route(["a", "b"]):
        outputs(family, transformer)


def test_each_picture_of_a_prompt_has_its_own_lora(loras):
    transformer = tiny_transformer(KLEIN)
    alone = {name: outputs(KLEIN, merge_lora(transformer, lora)) for name, lora in loras.items()}
    bank = clora.attach(transformer, loras)
    for names in ("aabb", "abab"):
        with bank.route(list(names)):
            found = outputs(KLEIN, transformer)
        expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "names",
    [
        ["a", ("b", 0.5), None, ("a", 1)],
        [("a", 0.25), ("a", 1.5), ("b", -1.0), "a"],
        [("b", 0.0), None, ("b", 0.0), None],
        [("a", 0.5)],
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_strengths(loras, names, scale):
    """Of each row, times that of the pipeline's call; the same LoRA may have several."""
    transformer = tiny_transformer(KLEIN)
    plain = copy.deepcopy(transformer).double()
    rows = names if len(names) == 4 else names * 4
    bank = clora.attach(transformer, loras)
    with bank.route(names):
        found = outputs(KLEIN, transformer, joint_attention_kwargs={"scale": scale})
        full = outputs(KLEIN, transformer)
    for i, name in enumerate(rows):
        name, strength = name if isinstance(name, tuple) else (name, 1.0)
        lora = None if name is None else weakened(loras[name], strength * scale)
        inputs = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs_of(KLEIN, 4).items()
        }
        with torch.no_grad():
            expected = merge_lora(plain, lora)(**inputs, return_dict=False)[0][i]
        torch.testing.assert_close(found[i].double(), expected, **TOLERANCE)
    # A scale holds for its own pass only.
    with bank.route(names):
        assert torch.equal(outputs(KLEIN, transformer), full)


@pytest.mark.parametrize("strength", ["0.5", None, True, math.nan, math.inf, 1e30, -1e30])
def test_a_strength_that_is_no_number_or_an_absurd_one(loras, strength):
    transformer = tiny_transformer(KLEIN)
    bank = clora.attach(transformer, loras)
    expected = "expected a number of at most 1000 of either sign, found"
    with pytest.raises(CloraError, match=f"the strength of 'a': {expected}"), bank.route([("a", strength)]):
        pass
    with pytest.raises(CloraError, match=rf"joint_attention_kwargs\['scale'\]: {expected}"), bank.route(["a"]):
        outputs(KLEIN, transformer, joint_attention_kwargs={"scale": strength})


@pytest.mark.parametrize("entry", [3, True, (), ("a",), (None, 0.5), ("a", 0.5, 1), [["a"]], {"a": 0.5}])
def test_an_entry_that_is_no_name(loras, entry):
    bank = clora.attach(tiny_transformer(KLEIN), loras)
    with (
        pytest.raises(CloraError, match=r'expected a name, a pair as in \("snow", 0.5\) or None.*found'),
        bank.route([entry]),
    ):
        pass


@pytest.mark.parametrize("family", ["Flux2KleinPipeline", "FluxKontextPipeline"])
def test_fused_projections_are_refused(family, tmp_path):
    """They are computed by one layer of their own, so that a LoRA of the split ones would do nothing."""
    transformer = tiny_transformer(family)
    loras = {"a": random_lora(transformer, 2, 1)}
    before = outputs(family, transformer)
    transformer.fuse_qkv_projections()
    with pytest.raises(CloraError, match=r"no longer called.*call unfuse_qkv_projections\(\)"):
        clora.attach(transformer, loras)
    assert torch.equal(outputs(family, transformer), outputs(family, transformer))
    transformer.unfuse_qkv_projections()
    bank = clora.attach(transformer, loras)
    with bank.route([None]):
        assert torch.equal(outputs(family, transformer), before)
    transformer.fuse_qkv_projections()
    with pytest.raises(CloraError, match="no longer called"), bank.route(["a"]):
        pass


def test_fused_projections_leave_other_layers(loras):
    transformer = tiny_transformer(KLEIN)
    name = "transformer_blocks.0.ff.linear_in"
    lora = random_lora(transformer, 2, 1, [name])
    expected = outputs(KLEIN, merge_lora(transformer, lora))
    transformer.fuse_qkv_projections()
    bank = clora.attach(transformer, {"a": lora})
    with bank.route(["a"]):
        torch.testing.assert_close(outputs(KLEIN, transformer), expected, **TOLERANCE)


COMPILED = {
    "wrapped": lambda transformer: torch.compile(transformer, backend="eager"),
    "in place": lambda transformer: transformer.compile(backend="eager") or transformer,
    "its blocks": lambda transformer: transformer.compile_repeated_blocks(backend="eager") or transformer,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_transformer_follows_every_route(loras, how, when):
    """What was compiled before has run already: its graphs must not be used again."""
    transformer = tiny_transformer(KLEIN)
    expected = {name: outputs(KLEIN, merge_lora(transformer, loras.get(name)), 2) for name in ("a", "b", None)}
    half = outputs(KLEIN, merge_lora(transformer, weakened(loras["b"], 0.5)), 2)
    if when == "before":
        transformer = COMPILED[how](transformer)
        outputs(KLEIN, transformer, 2)
    bank = clora.attach(transformer, loras)
    if when == "after":
        transformer = COMPILED[how](transformer)
    for names in (["a", "b"], ["b", None], ["a", "b"]):
        with bank.route(names):
            found = outputs(KLEIN, transformer, 2)
        torch.testing.assert_close(found, torch.stack([expected[n][i] for i, n in enumerate(names)]), **TOLERANCE)
    with bank.route(["b"]):
        found = outputs(KLEIN, transformer, 2, joint_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(found, half, **TOLERANCE)
    bank.detach()
    torch.testing.assert_close(outputs(KLEIN, transformer, 2), expected[None], **TOLERANCE)


def test_a_lora_is_read_for_a_compiled_transformer(loras, tmp_path):
    pipeline = bare_pipeline(KLEIN)
    save_lora(loras["a"], tmp_path / "a.safetensors")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert set(clora.load_lora(tmp_path / "a.safetensors", pipeline).modules) == set(loras["a"].modules)
