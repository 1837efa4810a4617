"""Whole files whose names are right but for a beginning or an ending are read; where the meaning is not sure, the message is
about the spelling."""

from __future__ import annotations

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS
from safetensors.torch import save_file

from clora.errors import CloraError
from clora.lora.families import routes
from clora.lora.inspect import inspect
from clora.lora.keys import module_name, split_prefix
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora

WRAPPED = [
    ("{}", "bare"),
    ("model.diffusion_model.{}", "comfyui"),
    ("transformer._orig_mod.{}", "diffusers"),
    ("module.{}", "bare"),
    ("module.transformer.{}", "diffusers"),
    ("transformer.transformer.{}", "diffusers"),
    ("pipe.dit.{}", "bare"),
    ("base_model.model.diffusion_model.{}", "peft"),
    ("module.base_model.model.{}", "peft"),
    ("lora_unet__{}", "kohya"),
    ("lora_unet_{}_", "kohya"),
    ("lora_unet__orig_mod_{}", "kohya"),
    ("lora_unet_transformer_{}", "kohya"),
    ("lycoris_{}", "lycoris"),
    ("lora_transformer_{}", "onetrainer"),
]


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize(("spelling", "format_name"), WRAPPED)
def test_every_layer_is_found_under_its_wrappers(family, spelling, format_name):
    table = routes(linear_shapes(TRANSFORMERS[family]()))
    for layer in (name for name in table if "." in name):
        stem = spelling.format(layer.replace(".", "_") if spelling.startswith("l") else layer)
        assert table[module_name(stem, table)] == table[layer]
        assert split_prefix(stem)[0] == format_name
        # Without a model the same name is found.
        assert table[split_prefix(stem)[1]] == table[layer]


def test_a_compiled_block():
    table = routes(linear_shapes(TRANSFORMERS["FLUX.2"]()))
    for stem in (
        "transformer.transformer_blocks.0._orig_mod.attn.to_q",
        "lora_unet_transformer_blocks_0__orig_mod_attn_to_q",
    ):
        assert table[module_name(stem, table)] == table["transformer_blocks.0.attn.to_q"]


def test_a_layer_of_the_model_that_is_named_like_a_wrapper():
    """Less is taken away where that fits."""
    table = routes({"model.x": (2, 3), "transformer.x": (2, 3)})
    assert module_name("model.x", table) == "model.x"
    assert module_name("transformer.model.x", table) == "model.x"
    assert module_name("transformer.x", table) == "transformer.x"


def pair(stem, end="weight"):
    return {f"{stem}.lora_A.{end}": torch.ones(4, 16), f"{stem}.lora_B.{end}": torch.ones(16, 4)}


def test_names_of_the_adapter_and_1x1_convolutions(tmp_path, shapes):
    layer = "transformer_blocks.0.attn.to_q"
    for tensors in (
        pair(f"transformer.{layer}", "default_0.weight"),
        pair(f"transformer.{layer}", "my-effect.weight"),
        {key: value[:, :, None, None] for key, value in pair(f"transformer.{layer}").items()},
    ):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors")
        assert torch.equal(read_lora(tmp_path, shapes).modules[layer].delta(), torch.full((16, 16), 4.0))


def test_another_beginning_is_named_and_never_guessed(tmp_path, shapes):
    """The blocks of a ControlNet have the transformer's names."""
    save_file(
        pair("controlnet.transformer_blocks.0.attn.to_q") | pair("controlnet.proj_out"), tmp_path / "a.safetensors"
    )
    with pytest.raises(CloraError, match="beginning 'controlnet.'") as error:
        read_lora(tmp_path, shapes)
    assert "another architecture" not in str(error.value)


def test_another_end_of_the_names_is_no_other_architecture(tmp_path, shapes):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_{part}": torch.ones(4, 4) for part in "AB"}, tmp_path / "a.safetensors")
    with pytest.raises(CloraError, match=r"names that end in \.lora_A\.weight") as error:
        read_lora(tmp_path, shapes)
    assert "another architecture" not in str(error.value)


def test_original_names_in_the_prefix_of_peft(tmp_path, shapes):
    """diffusers and sglang read them with alpha = rank; PEFT's own names need its config."""
    save_file(pair("base_model.model.double_blocks.0.img_attn.proj"), tmp_path / "any.safetensors")
    state = read_lora(tmp_path, shapes)
    assert torch.equal(state.modules["transformer_blocks.0.attn.to_out.0"].delta(), torch.full((16, 16), 4.0))
    assert any("alpha = rank" in note for note in inspect(tmp_path)["notes"])
    save_file(pair("base_model.model.transformer_blocks.0.attn.to_q"), tmp_path / "any.safetensors")
    with pytest.raises(CloraError, match="adapter_config"):
        read_lora(tmp_path, shapes)


def test_keys_are_left_out_by_name(tmp_path, shapes):
    layer = "transformer_blocks.0.attn.to_q"
    foreign = {
        "lora_te1_text_model_x.lora_down.weight": torch.full((4, 4), torch.nan),
        "transformer.norm.weight": torch.ones(3),
        f"transformer.{layer}.diff_b": torch.ones(16),
    }
    save_file(pair(f"transformer.{layer}") | foreign, tmp_path / "a.safetensors")
    with pytest.raises(CloraError, match="--ignore"):
        read_lora(tmp_path, shapes)
    ignore = ["lora_te", "*.norm", "*.diff_b"]
    assert set(read_lora(tmp_path, shapes, ignore=ignore).modules) == {layer}
    info = inspect(tmp_path, ignore=ignore)
    assert (info["ignored"], info["problems"], info["unsupported"]) == (sorted(foreign), [], {})
    with pytest.raises(CloraError, match="no tensor's name begins with 'lora_ta'"):
        read_lora(tmp_path, shapes, ignore=["lora_ta"])
    with pytest.raises(CloraError, match="no tensor's name begins with 'transforms'"):
        read_lora(tmp_path, shapes, ignore="transforms")  # one text is one pattern
    with pytest.raises(CloraError, match="no tensors but ignored ones"):
        read_lora(tmp_path, shapes, ignore=["*"])


def test_the_advised_pattern_spares_the_lora(tmp_path, shapes):
    stem = "transformer.transformer_blocks.0.attn"
    norms = {f"{stem}.norm_q.scale": torch.ones(3), f"{stem}.norm_k.scale": torch.ones(3)}
    save_file(pair(f"{stem}.to_q") | norms, tmp_path / "a.safetensors")
    with pytest.raises(CloraError) as error:
        read_lora(tmp_path, shapes)
    pattern = str(error.value).split("--ignore '")[1].split("'")[0]
    assert pattern == f"{stem}.norm_"
    assert set(read_lora(tmp_path, shapes, ignore=[pattern]).modules) == {f"{stem[12:]}.to_q"}
