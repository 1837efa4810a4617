"""Original names: a file means the same as diffusers' own converters of the original checkpoint."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS, Random, assert_changes, product, write

from clora.lora.families import (
    FAMILIES,
    FLUX1,
    FLUX2,
    LONGCAT_IMAGE,
    families_with,
    family_of,
    original_part,
    routes,
)
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora

COLUMNS = 5
ODD = 7  # rows of what is not fused

FLUX_ROWS = {
    "img_in": ODD,
    "txt_in": ODD,
    "time_in.in_layer": ODD,
    "time_in.out_layer": ODD,
    "guidance_in.in_layer": ODD,
    "guidance_in.out_layer": ODD,
    "final_layer.linear": ODD,
    "final_layer.adaLN_modulation.1": 14,
}
BLOCK = ("img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2")


def flux1_rows():
    """diffusers' converter cuts linear1 at FLUX.1's own 3072, so this has the real row counts and few columns."""
    rows = FLUX_ROWS | {"vector_in.in_layer": ODD, "vector_in.out_layer": ODD}
    for i in range(2):
        rows |= {f"double_blocks.{i}.{name}": ODD for name in (*BLOCK, "img_mod.lin", "txt_mod.lin")}
        rows |= {f"double_blocks.{i}.img_attn.qkv": 9216, f"double_blocks.{i}.txt_attn.qkv": 9216}
        rows |= {f"single_blocks.{i}.linear2": ODD, f"single_blocks.{i}.modulation.lin": ODD}
        rows |= {f"single_blocks.{i}.linear1": 9216 + 12288}
    return rows


def flux2_rows():
    rows = FLUX_ROWS | {"double_stream_modulation_img.lin": ODD, "double_stream_modulation_txt.lin": ODD}
    rows |= {"single_stream_modulation.lin": ODD}
    for i in range(2):
        rows |= {f"double_blocks.{i}.{name}": ODD for name in BLOCK}
        rows |= {f"double_blocks.{i}.img_attn.qkv": 21, f"double_blocks.{i}.txt_attn.qkv": 21}
        rows |= {f"single_blocks.{i}.linear1": ODD, f"single_blocks.{i}.linear2": ODD}
    return rows


def z_image_rows():
    rows = {"x_embedder": ODD, "final_layer.linear": ODD, "final_layer.adaLN_modulation.1": ODD}
    rows |= {"t_embedder.mlp.0": ODD, "t_embedder.mlp.2": ODD, "cap_embedder.1": ODD, "siglip_embedder.1": ODD}
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0", "siglip_refiner.0"):
        rows |= {f"{block}.{name}": ODD for name in ("attention.out", "feed_forward.w1", "feed_forward.w2")}
        rows |= {f"{block}.attention.qkv": 21, f"{block}.feed_forward.w3": ODD}
    rows |= {f"{block}.adaLN_modulation.0": ODD for block in ("layers.0", "layers.1", "noise_refiner.0")}
    return rows


ORIGINALS = {
    "FLUX.1": (flux1_rows, "convert_flux_transformer_checkpoint_to_diffusers"),
    "FLUX.2": (flux2_rows, "convert_flux2_transformer_checkpoint_to_diffusers"),
    "Z-Image": (z_image_rows, "convert_z_image_transformer_checkpoint_to_diffusers"),
}


def converted(family, weights):
    """The linear weights of a whole original checkpoint, by diffusers' names; all else in it is zero."""
    from diffusers.loaders import single_file_utils

    rows, converter = ORIGINALS[family]
    checkpoint = {f"{name}.weight": weights[name] for name in rows()}
    if family == "FLUX.1":
        checkpoint |= {f"{name}.bias": torch.zeros(count) for name, count in rows().items()}
        for i in range(2):
            norms = [f"double_blocks.{i}.{side}_attn.norm." for side in ("img", "txt")] + [f"single_blocks.{i}.norm."]
            checkpoint |= {f"{norm}{name}_norm.scale": torch.zeros(3) for norm in norms for name in ("query", "key")}
    made = getattr(single_file_utils, converter)(dict(checkpoint))
    return {name.removesuffix(".weight"): weight for name, weight in made.items() if weight.ndim == 2}


@pytest.mark.parametrize("family", ORIGINALS)
@pytest.mark.parametrize(
    ("prefix", "underscores", "names"),
    [("lora_unet_", True, ("lora_down", "lora_up")), ("diffusion_model.", False, ("lora_A", "lora_B"))],
    ids=["kohya", "comfyui"],
)
def test_original_names(tmp_path, family, prefix, underscores, names):
    random, tensors, deltas = Random(0), {}, {}
    for name, rows in ORIGINALS[family][0]().items():
        rank, alpha = random.integer(1, 4), random.integer(1, 9)
        lora_A, lora_B = random.pair((rows, COLUMNS), rank)
        stem = prefix + (name.replace(".", "_") if underscores else name)
        tensors |= {f"{stem}.{names[0]}.weight": lora_A, f"{stem}.{names[1]}.weight": lora_B}
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
        deltas[name] = product(lora_A, lora_B, alpha / rank)
    expected = converted(family, deltas)
    shapes = {name: tuple(delta.shape) for name, delta in expected.items()}
    assert_changes(read_lora(write(tmp_path / "a.safetensors", tensors), shapes), expected)


@pytest.mark.parametrize("family", ORIGINALS)
def test_the_real_class_has_these_modules(family):
    """So that the test above speaks of the model that diffusers builds."""
    rows = {name: torch.zeros(count, COLUMNS) for name, count in ORIGINALS[family][0]().items()}
    assert set(converted(family, rows)) == set(linear_shapes(TRANSFORMERS[family]()))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_family_of_the_real_class(family):
    shapes = linear_shapes(TRANSFORMERS[family]())
    found = family_of(shapes)
    assert found.name == family
    assert {re.sub(r"^(\w+)\.\d+\.", r"\1.N.", name) for name in shapes} == found.diffusers_names()


def test_a_family_without_a_table_keeps_its_own_names():
    table = routes({"blocks.0.attn.to_q": (4, 3), "norm_out.linear": (8, 4)})
    assert set(table) == {"blocks.0.attn.to_q", "blocks_0_attn_to_q", "norm_out.linear", "norm_out_linear"}
    assert family_of(["transformer_blocks.0.attn.to_q", "proj_out"]) is None


def test_qwen_image_has_no_original_names(tmp_path):
    """It shares names with FLUX, whose final layer is swapped and whose qkv is fused."""
    shapes = linear_shapes(TRANSFORMERS["Qwen-Image"]())
    assert not [name for name in routes(shapes) if "double" in name or "final" in name]
    assert [route.swap_halves for route in routes(shapes)["norm_out.linear"]] == [False]


def test_comfyui_names_longcat_as_flux1():
    """ComfyUI has no class of its own for it: FLUX.1's, without the pooled text."""
    shapes = linear_shapes(TRANSFORMERS["LongCat-Image"]())
    flux1 = {name for name in FLUX1.originals if not name.startswith(("vector_in", "guidance_in"))}
    parts = [original_part(name, LONGCAT_IMAGE) for name in shapes]
    assert {re.sub(r"^(\w+)\.\d+\.", r"\1.N.", part.name) for part in parts} == flux1
    assert [route.swap_halves for route in routes(shapes)["final_layer.adaLN_modulation.1"]] == [True]


def test_comfyui_fuses_the_mlp_of_qwen_image21(tmp_path):
    """Its rows are the gate's, then those that are gated: `gate_up` of ComfyUI's own checkpoints."""
    if "Qwen-Image-2.1" not in TRANSFORMERS:
        pytest.skip("this diffusers has no Qwen-Image-2.1")
    shapes = linear_shapes(TRANSFORMERS["Qwen-Image-2.1"]())
    block = "transformer_blocks.1.img_mlp."
    rows = shapes[f"{block}gate_layer"][0]
    lora_A, lora_B = Random(0).pair((2 * rows, shapes[f"{block}proj"][1]), 3)
    for prefix in ("diffusion_model.", ""):
        tensors = {f"{prefix}{block}gate_up.lora_A.weight": lora_A, f"{prefix}{block}gate_up.lora_B.weight": lora_B}
        expected = {
            f"{block}gate_layer": product(lora_A, lora_B[:rows]),
            f"{block}proj": product(lora_A, lora_B[rows:]),
        }
        assert_changes(read_lora(write(tmp_path / "a.safetensors", tensors), shapes), expected)


def test_rows_of_fused_modules():
    shapes = linear_shapes(TRANSFORMERS["FLUX.1"]())
    cut = [
        (route.module.rpartition(".")[2], route.start, route.stop)
        for route in routes(shapes)["single_blocks.1.linear1"]
    ]
    assert cut == [("to_q", 0, 24), ("to_k", 24, 48), ("to_v", 48, 72), ("proj_mlp", 72, 168)]
    incomplete = {name: shape for name, shape in shapes.items() if name != "single_transformer_blocks.1.proj_mlp"}
    assert "single_blocks.1.linear1" not in routes(incomplete)
    assert "single_blocks_0_linear1" in routes(incomplete)


def test_block_numbers_of_two_digits():
    shapes = {f"transformer_blocks.{i}.ff.linear_in": (4, 3) for i in (1, 11)} | {FLUX2.marks[0]: (4, 3)}
    table = routes(shapes)
    assert table["double_blocks.11.img_mlp.0"][0].module == "transformer_blocks.11.ff.linear_in"
    assert table["double_blocks_1_img_mlp_0"][0].module == "transformer_blocks.1.ff.linear_in"


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.originals and f.name in TRANSFORMERS], ids=lambda f: f.name
)
def test_parts_are_the_inverse_of_routes(family):
    shapes = linear_shapes(TRANSFORMERS[family.name]())
    for name, found in routes(shapes).items():
        for route in found:
            part = original_part(route.module, family)
            if part.name == name:
                assert part.modules == tuple(each.module for each in found)
                assert part.swap_halves == route.swap_halves


def names_of(names):
    return [family.name for family in families_with(names)]


def test_families_that_know_a_name():
    known = ["Qwen-Image", "Qwen-Image-2.1", "FLUX.1", "FLUX.2", "LongCat-Image"]
    assert names_of(["transformer_blocks.0.attn.to_q"]) == known
    assert names_of(["transformer_blocks.0.img_mlp.gate_layer"]) == ["Qwen-Image-2.1"]
    assert names_of(["single_blocks_12_modulation_lin", "double_blocks_3_img_attn_qkv"]) == ["FLUX.1", "LongCat-Image"]
    assert names_of(["vector_in.in_layer", "double_blocks.3.img_attn.qkv"]) == ["FLUX.1"]
    assert names_of(["transformer_blocks.7.img_mlp.gate_up"]) == ["Qwen-Image-2.1"]
    assert names_of(["double_blocks.3.img_attn.qkv", "single_stream_modulation.lin"]) == ["FLUX.2"]
    assert names_of(["layers_7_attention_qkv"]) == ["Z-Image"]
    assert names_of(["transformer_blocks_0_img_mod_1"]) == ["Qwen-Image"]
    assert names_of(["time_embed.timestep_embedder.linear_1"]) == ["LongCat-Image"]
    assert names_of(["transformer_blocks.0.attn.to_q", "elsewhere"]) == []
    assert names_of([]) == []
    assert len({family.name for family in FAMILIES}) == 6
