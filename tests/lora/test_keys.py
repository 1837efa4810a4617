"""Every key format and every source of alpha gives (alpha / rank) B A."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from clora.errors import CloraError
from clora.lora.adapter_config import AdapterConfig
from clora.lora.families import FLUX2, original_part, routes
from clora.lora.inspect import inspect
from clora.lora.keys import sort_keys
from clora.lora.load import read_lora

MODULE = "transformer_blocks.0.attn.to_out.0"  # [16, 16]
RANK, ALPHA = 4, 3.0


def matrices(rows=16, rank=RANK, columns=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def save(path, stem, lora_A, lora_B, names=("lora_A.weight", "lora_B.weight"), alpha=None, metadata=None):
    tensors = {f"{stem}.{names[0]}": lora_A, f"{stem}.{names[1]}": lora_B}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


DOWN_UP = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")


@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["alpha_is_rank", "alpha_tensor"])
@pytest.mark.parametrize(
    ("stem", "names", "format_name"),
    [
        pytest.param(f"transformer.{MODULE}", A_B, "diffusers", id="diffusers"),
        pytest.param(f"diffusion_model.{MODULE}", A_B, "comfyui", id="ai-toolkit"),
        pytest.param("diffusion_model.double_blocks.0.img_attn.proj", A_B, "comfyui", id="comfyui-original"),
        pytest.param("lora_unet_" + MODULE.replace(".", "_"), DOWN_UP, "kohya", id="kohya"),
        pytest.param("lora_unet_double_blocks_0_img_attn_proj", DOWN_UP, "kohya", id="kohya-original"),
        pytest.param(MODULE, DOWN_UP, "bare", id="lightning"),
        pytest.param(MODULE, A_B, "bare", id="bare"),
        pytest.param(MODULE, DEFAULT, "bare", id="diffsynth"),
    ],
)
def test_formats(tmp_path, shapes, stem, names, format_name, alpha):
    lora_A, lora_B = matrices()
    state = read_lora(save(tmp_path / "a.safetensors", stem, lora_A, lora_B, names, alpha), shapes)
    assert state.format == format_name
    assert set(state.modules) == {MODULE}
    assert torch.equal(state.modules[MODULE].delta(), (lora_B * ((alpha or RANK) / RANK)) @ lora_A)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        pytest.param({"r": RANK, "lora_alpha": 6}, 6 / RANK, id="alpha"),
        pytest.param({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(RANK), id="rslora"),
        pytest.param({"r": 8, "rank_pattern": {MODULE: RANK}, "lora_alpha": 6}, 6 / RANK, id="rank_pattern"),
        pytest.param({"r": RANK, "lora_alpha": 6, "alpha_pattern": {r"to_out.0": 2}}, 2 / RANK, id="alpha_pattern"),
        pytest.param({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"to_q": 2}}, 6 / RANK, id="other_pattern"),
    ],
)
def test_adapter_config(tmp_path, shapes, config, scale):
    lora_A, lora_B = matrices()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save(tmp_path / "adapter_model.safetensors", f"base_model.model.{MODULE}", lora_A, lora_B)
    in_folder = read_lora(tmp_path, shapes).modules[MODULE]
    assert torch.equal(in_folder.delta(), (lora_B * scale) @ lora_A)
    assert torch.equal(
        read_lora(tmp_path / "adapter_model.safetensors", shapes).modules[MODULE].lora_B, in_folder.lora_B
    )


def test_peft_weights_without_an_alpha_are_refused(tmp_path, shapes):
    """Their strength is not known: alpha is in no other place, and the rank is only one guess."""
    path = save(tmp_path / "a.safetensors", f"base_model.model.{MODULE}", *matrices())
    with pytest.raises(CloraError, match=r"adapter_config\.json beside the weights, none is stated"):
        read_lora(path, shapes)
    (problem,) = inspect(path)["problems"]
    assert "strength is not known" in problem
    stated = save(tmp_path / "b.safetensors", f"base_model.model.{MODULE}", *matrices(), alpha=ALPHA)
    assert read_lora(stated, shapes).format == "peft"


def test_diffusers_metadata(tmp_path, shapes, diffusers_output, applied_output):
    lora_A, lora_B = matrices()
    values = {"r": RANK, "lora_alpha": 6, "target_modules": [MODULE], "rank_pattern": {}, "alpha_pattern": {}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}
    path = save(tmp_path / "a.safetensors", f"transformer.{MODULE}", lora_A, lora_B, metadata=metadata)
    state = read_lora(path, shapes)
    assert torch.equal(state.modules[MODULE].delta(), (lora_B * 1.5) @ lora_A)
    torch.testing.assert_close(diffusers_output(path), applied_output(state), rtol=1e-5, atol=1e-5)


def test_alpha_tensor_wins_over_config(tmp_path, shapes):
    lora_A, lora_B = matrices()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 100})}
    path = save(tmp_path / "a.safetensors", f"transformer.{MODULE}", lora_A, lora_B, alpha=2.0, metadata=metadata)
    assert torch.equal(read_lora(path, shapes).modules[MODULE].lora_B, lora_B * 0.5)


@pytest.mark.parametrize(
    "spelling", ["diffusion_model.double_blocks.0.{}_attn.qkv", "lora_unet_double_blocks_0_{}_attn_qkv"]
)
@pytest.mark.parametrize(
    ("stream", "parts"),
    [("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))],
)
def test_fused_shared(tmp_path, shapes, spelling, stream, parts):
    lora_A, lora_B = matrices(rows=48)
    path = save(tmp_path / "a.safetensors", spelling.format(stream), lora_A, lora_B, DOWN_UP, ALPHA)
    state = read_lora(path, shapes)
    for part, block in zip(parts, lora_B.chunk(3), strict=True):
        module = state.modules[f"transformer_blocks.0.attn.{part}"]
        assert torch.equal(module.delta(), (block * (ALPHA / RANK)) @ lora_A)


def test_fused_block_diagonal(tmp_path, shapes, diffusers_output, applied_output):
    lora_A, _ = matrices(rank=3 * RANK)
    blocks = [matrices(seed=seed)[1] for seed in range(3)]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    path = save(tmp_path / "a.safetensors", stem, lora_A, torch.block_diag(*blocks), DOWN_UP, ALPHA)
    state = read_lora(path, shapes)
    for part, block, rows in zip(("to_q", "to_k", "to_v"), blocks, lora_A.chunk(3), strict=True):
        module = state.modules[f"transformer_blocks.0.attn.{part}"]
        assert module.rank == RANK
        assert torch.equal(module.delta(), (block * (ALPHA / (3 * RANK))) @ rows)
    torch.testing.assert_close(diffusers_output(path), applied_output(state), rtol=1e-5, atol=1e-5)


def test_final_modulation_halves_swap(tmp_path, shapes):
    """The original computes (shift, scale), diffusers (scale, shift)."""
    lora_A, lora_B = matrices(rows=32)
    path = save(tmp_path / "a.safetensors", "diffusion_model.final_layer.adaLN_modulation.1", lora_A, lora_B)
    expected = torch.cat([lora_B[16:], lora_B[:16]]) @ lora_A
    assert torch.equal(read_lora(path, shapes).modules["norm_out.linear"].delta(), expected)


def test_every_module_has_an_original_name(shapes):
    originals = {original_part(name, FLUX2).name for name in shapes}
    assert not originals & set(shapes)
    assert len(originals) == len(shapes) - 4  # two fused triples
    assert originals <= set(routes(shapes))


def test_sort_keys_names_what_is_not_supported():
    stem = "transformer_blocks.0.attn.to_q"
    bad = {
        "text encoder": [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoders.clip_l.transformer.x.lora_up.weight",
        ],
        "bias": [f"{stem}.diff_b", f"{stem}.lora_B.bias", f"{stem}.lora_B.default.bias", f"{stem}.lora_up.bias"],
        "Tucker": [f"{stem}.lokr_t2", f"{stem}.hada_t1", f"{stem}.lora_mid.weight"],
        "OFT": [f"{stem}.oft_blocks", f"{stem}.oft_diag", f"{stem}.boft_R"],
        "norm": [f"{stem}.w_norm"],
        "reshaped": [f"{stem}.set_weight", f"{stem}.reshape_weight"],
    }
    keys = sort_keys([key for names in bad.values() for key in names] + ["e"])
    assert keys.unknown == ("e",)
    assert not keys.modules
    for word, names in bad.items():
        (found,) = [names for reason, names in keys.unsupported.items() if word in reason]
        assert sorted(found) == sorted(names)


def test_sort_keys_finds_a_tensor_by_two_names():
    keys = sort_keys(["a.lora_A.weight", "a.lora_down.weight", "a.lora_B.weight"])
    assert keys.twice == (("a.lora_A.weight", "a.lora_down.weight"),)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"peft_type": "OFT"}, "OFT", id="oft"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, "relative to a base", id="pissa"),
        pytest.param({"init_lora_weights": "OLoRA"}, "relative to a base", id="olora"),
        pytest.param({"use_qalora": True}, "use_qalora makes another update", id="qalora"),
        pytest.param({"lora_alpha": "much"}, "numbers", id="text"),
        pytest.param({"alpha_pattern": [1]}, "numbers", id="list"),
    ],
)
def test_adapter_config_refused(values, words):
    with pytest.raises(CloraError, match=words):
        AdapterConfig.parse(json.dumps(values), "adapter_config.json")
