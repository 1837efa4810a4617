"""Files that are no LoRA, or a damaged one, are refused with a reason."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from clora.errors import CloraError
from clora.lora.load import read_lora

STEM = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


def good():
    return {A: torch.ones(4, 16), B: torch.ones(16, 4)}


BAD_TENSORS = {
    "another_architecture": (
        {
            "transformer.down_blocks.0.lora_A.weight": torch.ones(4, 8),
            "transformer.down_blocks.0.lora_B.weight": torch.ones(8, 4),
        },
        ["another architecture", "down_blocks.0", "expected modules like"],
    ),
    "no_lora_at_all": (
        {"model.weight": torch.ones(2)},
        ["no key names a LoRA's matrix", "model.weight", ".lora_A.weight"],
    ),
    "unknown_key": (good() | {"surprise": torch.ones(2)}, ["1 unknown key(s)", "surprise"]),
    "unknown_module": (
        good() | {f"{STEM}x.lora_A.weight": torch.ones(4, 16), f"{STEM}x.lora_B.weight": torch.ones(16, 4)},
        ["2 unknown key(s)", "to_qx", "did you mean"],
    ),
    "lone_A": ({A: torch.ones(4, 16)}, [STEM, "has no lora_B"]),
    "lone_alpha": ({f"{STEM}.alpha": torch.tensor(1.0)}, [STEM, "has no lora_A and no lora_B"]),
    "rank_mismatch": ({A: torch.ones(4, 16), B: torch.ones(16, 8)}, ["rank mismatch", "[4, 16]", "[16, 8]"]),
    "wrong_shape": ({A: torch.ones(4, 20), B: torch.ones(16, 4)}, ["wrong shape", "[4, 20]", "[rank, 16]"]),
    "not_a_matrix": ({A: torch.ones(4, 16, 3, 3), B: torch.ones(16, 4)}, ["[4, 16, 3, 3]", "two matrices"]),
    "rank_zero": ({A: torch.ones(0, 16), B: torch.ones(16, 0)}, ["[0, 16]"]),
    "nan": ({A: torch.full((4, 16), float("nan")), B: torch.ones(16, 4)}, [A, "NaN"]),
    "inf": ({A: torch.ones(4, 16), B: torch.full((16, 4), float("inf"))}, [B, "infinite"]),
    "nan_alpha": (good() | {f"{STEM}.alpha": torch.tensor(float("nan"))}, [f"{STEM}.alpha", "NaN"]),
    "absurd_alpha": (good() | {f"{STEM}.alpha": torch.tensor(1e30)}, ["alpha 1e+30", "effective scale"]),
    "too_large": (
        {f"{STEM}.lokr_w1": torch.ones(300, 300), f"{STEM}.lokr_w2": torch.ones(300, 300)},
        ["[90000, 90000]", "no model has a layer of that size"],
    ),
    "absurd_value": (
        {A: torch.ones(4, 16), B: torch.full((16, 4), -1e30)},
        [B, "values up to 1.0e+30", "at most 1e+06"],
    ),
    "two_adapters": (
        {key.replace(".weight", ".one.weight"): value for key, value in good().items()}
        | {key.replace("to_q", "to_k").replace(".weight", ".two.weight"): value for key, value in good().items()},
        ["2 adapters, one, two", "--ignore"],
    ),
    "alpha_vector": (good() | {f"{STEM}.alpha": torch.ones(3)}, [f"{STEM}.alpha", "single number"]),
    "dora_without_base": (good() | {f"{STEM}.dora_scale": torch.ones(16, 1)}, ["DoRA", "weights of the base"]),
    "dora_peft_without_base": (good() | {f"{STEM}.lora_magnitude_vector": torch.ones(16)}, ["DoRA", "of the base"]),
    "dora_shape": (good() | {f"{STEM}.dora_scale": torch.ones(15, 1)}, ["dora_scale", "[15, 1]", "[16, 1]"]),
    "dora_alone": ({f"{STEM}.dora_scale": torch.ones(16, 1)}, [STEM, "has no lora_A and no lora_B"]),
    "lokr_half": ({f"{STEM}.lokr_w1": torch.ones(4, 4)}, [STEM, "has no lokr_w2"]),
    "lokr_half_product": (
        {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2_a": torch.ones(4, 2)},
        [STEM, "has no lokr_w2_b"],
    ),
    "lokr_whole_and_product": (
        {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2": torch.ones(4, 4)}
        | {f"{STEM}.lokr_w2_a": torch.ones(4, 2), f"{STEM}.lokr_w2_b": torch.ones(2, 4)},
        [STEM, "has lokr_w2 too"],
    ),
    "lokr_shape": (
        {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2": torch.ones(4, 5)},
        ["wrong shape", "[4, 5]", "together [16, 20]"],
    ),
    "lokr_ranks": (
        {f"{STEM}.lokr_w1": torch.ones(4, 4)}
        | {f"{STEM}.lokr_w2_a": torch.ones(4, 2), f"{STEM}.lokr_w2_b": torch.ones(3, 4)},
        ["rank mismatch", "[4, 2]", "[3, 4]"],
    ),
    "lokr_nan": (
        {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2": torch.full((4, 4), float("nan"))},
        [f"{STEM}.lokr_w2", "NaN"],
    ),
    "lokr_tucker": ({f"{STEM}.lokr_t2": torch.ones(4, 4, 1, 1)}, ["Tucker", "lokr_t2"]),
    "loha_half": ({f"{STEM}.hada_w1_a": torch.ones(16, 4)}, [STEM, "hada_w1_b", "hada_w2_a", "hada_w2_b"]),
    "loha_shapes": (
        {f"{STEM}.hada_w1_a": torch.ones(16, 4), f"{STEM}.hada_w1_b": torch.ones(4, 16)}
        | {f"{STEM}.hada_w2_a": torch.ones(16, 4), f"{STEM}.hada_w2_b": torch.ones(4, 15)},
        [STEM, "[16, 16] and [16, 15]"],
    ),
    "two_types": (good() | {f"{STEM}.diff": torch.ones(16, 16)}, [STEM, "LoRA and diff at once"]),
    "diff_shape": ({f"{STEM}.diff": torch.ones(16, 15)}, ["wrong shape", "[16, 15]", "[16, 16]"]),
    "bias": (good() | {f"{STEM}.diff_b": torch.ones(16)}, ["1 key(s)", "bias", f"{STEM}.diff_b"]),
    "lora_bias": (good() | {f"{STEM}.lora_B.bias": torch.ones(16)}, ["bias", f"{STEM}.lora_B.bias"]),
    "text_encoder": (
        good() | {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.alpha": torch.tensor(1.0) for i in range(5)},
        ["5 key(s)", "text encoder", "and 2 more"],
    ),
    "integers": (good() | {B: torch.ones(16, 4, dtype=torch.int8)}, [B, "I8", "floating-point"]),
    "two_names": (good() | {f"{STEM}.lora_down.weight": torch.ones(4, 16)}, ["same tensor by two names"]),
    "split_and_fused": (
        good()
        | {"transformer.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 16)}
        | {"transformer.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(48, 4)},
        ["transformer_blocks.0.attn.to_q a second time"],
    ),
    "twice": (
        good()
        | {key.replace("transformer.", "diffusion_model.", 1): torch.ones_like(value) for key, value in good().items()},
        ["a second time"],
    ),
    "no_tensors": ({}, ["no tensors"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(tmp_path, shapes, case):
    tensors, words = BAD_TENSORS[case]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(CloraError) as error:
        read_lora(tmp_path / "bad.safetensors", shapes)
    for word in ["bad.safetensors", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(lambda data: b"", "empty", id="empty"),
        pytest.param(lambda data: data[:-7], "truncated", id="truncated"),
        pytest.param(lambda data: data[:5], "truncated", id="header_cut"),
        pytest.param(lambda data: b"PK\x03\x04" + data, "corrupt", id="zip"),
        pytest.param(lambda data: b"<html>not found</html>" * 9, "corrupt", id="html"),
    ],
)
def test_bad_bytes(tmp_path, shapes, content, words):
    path = tmp_path / "bad.safetensors"
    save_file(good(), path)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(CloraError, match=words) as error:
        read_lora(path, shapes)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_pickle_refused(tmp_path, shapes, suffix):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"\x80\x04anything")
    for given in (path, tmp_path):
        with pytest.raises(CloraError, match=r"pickle.*refused.*safetensors"):
            read_lora(given, shapes)


def test_bad_paths(tmp_path, shapes):
    with pytest.raises(CloraError, match="does not exist"):
        read_lora(tmp_path / "nothing.safetensors", shapes)
    with pytest.raises(CloraError, match=r"holds no .safetensors file"):
        read_lora(tmp_path, shapes)
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(CloraError, match="not a .safetensors"):
        read_lora(tmp_path / "picture.png", shapes)
    for name in ("one", "two"):
        save_file(good(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CloraError, match="one.safetensors, two.safetensors"):
        read_lora(tmp_path, shapes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param("{", "not valid JSON", id="json"),
        pytest.param("[]", "JSON object", id="list"),
        pytest.param('{"r": 8, "lora_alpha": 8}', "rank 4 but its config states 8", id="other_rank"),
        pytest.param('{"r": 4, "alpha_pattern": {"(a+)+b": 1}}', "is a regular expression", id="pattern"),
        pytest.param('{"r": ' + "9" * 5000 + "}", "not valid JSON", id="digits"),
        pytest.param('{"r": ' + "[" * 10**5 + "}", "not valid JSON", id="nested"),
    ],
)
def test_bad_adapter_config(tmp_path, shapes, config, words):
    (tmp_path / "adapter_config.json").write_text(config)
    tensors = {key.replace("transformer.", "base_model.model.", 1): value for key, value in good().items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CloraError, match=words):
        read_lora(tmp_path, shapes)
