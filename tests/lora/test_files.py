"""Savers round-trip, diffusers and PEFT agree with clora, and bad input is refused with a reason."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clora.bank.attach import attach
from clora.errors import CloraError
from clora.hashing import file_digest
from clora.lora import save as save_module
from clora.lora.families import FLUX2
from clora.lora.layers import linear_shapes
from clora.lora.load import load_lora, read_lora
from clora.lora.save import save_lora
from clora.lora.source import find_weights
from clora.lora.state import LoRAModule, LoRAState

STEM = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
ATTENTION = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]


def good():
    return {A: torch.ones(4, 16), B: torch.ones(16, 4)}


def with_shared_qkv(state):
    """The same LoRA with one lora_A for q, k and v, as trained on a fused layer."""
    modules = dict(state.modules)
    for names in (ATTENTION[:3], [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]):
        for name in names:
            modules[name] = LoRAModule(modules[names[0]].lora_A, modules[name].lora_B)
    return LoRAState(modules)


def test_diffusers_export(tmp_path, shapes, random_state, diffusers_output, applied_output, assert_same_deltas):
    state, path = random_state(ranks=(2, 4)), tmp_path / "out" / "pytorch_lora_weights.safetensors"
    save_lora(state.padded(6), path, metadata={"clora": json.dumps({"effects": ["snow"]})})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "clora": '{"effects": ["snow"]}'}
        assert all(opened.get_slice(key).get_shape()[0] == 6 for key in opened.keys() if "lora_A" in key)  # noqa: SIM118
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_same_deltas(read_lora(path.parent, shapes), state, atol=1e-6)
    torch.testing.assert_close(diffusers_output(path), applied_output(state), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(diffusers_output(path.parent), applied_output(state), rtol=1e-5, atol=1e-5)


def test_load_lora_takes_a_pipeline_or_its_transformer(
    tmp_path, adapter, transformer, random_state, assert_same_deltas
):
    state, path = random_state(), tmp_path / "a.safetensors"
    save_lora(state, path)
    assert_same_deltas(load_lora(path, transformer), state)
    name = next(iter(linear_shapes(adapter.pipeline.transformer)))
    layer = adapter.pipeline.transformer.get_submodule(name)
    lora = LoRAState({name: LoRAModule(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))})
    save_lora(lora, path)
    assert_same_deltas(load_lora(path, adapter.pipeline), lora)
    with pytest.raises(CloraError, match="expected a diffusers pipeline or its transformer, found str"):
        load_lora(path, "black-forest-labs/FLUX.2-klein-4B")


def test_load_lora_refuses_a_transformer_that_carries_loras(tmp_path, transformer, random_state):
    path, model = tmp_path / "a.safetensors", copy.deepcopy(transformer)
    save_lora(random_state(), path)
    model.load_lora_adapter(path, prefix="transformer")
    with pytest.raises(CloraError, match=r"has LoRAs loaded \(.*linear_1\).*unload_lora_weights"):
        load_lora(path, model)
    attached = attach(model := copy.deepcopy(transformer), {"a": random_state()})
    with pytest.raises(CloraError, match=r"has LoRAs loaded .*detach"):
        load_lora(path, model)
    attached.detach()
    load_lora(path, model)
    model.register_module("rope", torch.nn.ModuleDict({"base": torch.nn.Identity(), "base_layer": torch.nn.Identity()}))
    load_lora(path, model)


@pytest.mark.parametrize("alpha", [None, 8.0], ids=["alpha_is_rank", "alpha_8"])
def test_peft_folder(tmp_path, shapes, transformer, run, random_state, applied_output, assert_same_deltas, alpha):
    state = random_state(ranks=(2, 4))
    save_lora(state, tmp_path / "peft", "peft", alpha=alpha)
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_same_deltas(read_lora(tmp_path / "peft", shapes), state)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(transformer), tmp_path / "peft")
    torch.testing.assert_close(run(by_peft), applied_output(state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared_A", "block_diagonal"])
def test_kohya(tmp_path, shapes, random_state, diffusers_output, applied_output, assert_same_deltas, shared):
    state, path = random_state(ranks=(4,)), tmp_path / "kohya.safetensors"
    state = with_shared_qkv(state) if shared else state
    save_lora(state, path, "kohya", alpha=2.0, family=FLUX2)
    qkv = load_file(path)["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
    assert qkv.shape == (4 if shared else 12, 16)
    loaded = read_lora(path, shapes)
    assert loaded.max_rank == 4
    assert_same_deltas(loaded, state, atol=1e-6)


def test_kohya_in_diffusers(tmp_path, random_state, diffusers_output, applied_output):
    """On the modules that diffusers' kohya converter has (it skips all modulations)."""
    modules = [*ATTENTION, "transformer_blocks.0.ff.linear_in", "single_transformer_blocks.0.attn.to_out", "x_embedder"]
    state, path = random_state(modules=modules), tmp_path / "kohya.safetensors"
    save_lora(state, path, "kohya", alpha=1.0, family=FLUX2)
    torch.testing.assert_close(diffusers_output(path), applied_output(state), rtol=1e-5, atol=1e-5)


def test_comfyui(tmp_path, shapes, random_state, diffusers_output, applied_output, assert_same_deltas):
    state, path = with_shared_qkv(random_state()), tmp_path / "comfyui.safetensors"
    save_lora(state, path, "comfyui", family=FLUX2)
    assert all(key.startswith("diffusion_model.") for key in load_file(path))
    assert_same_deltas(read_lora(path, shapes), state)
    # diffusers 0.42 forgets to swap the halves of the final modulation, so it is compared without that module.
    rest = LoRAState({name: module for name, module in state.modules.items() if name != "norm_out.linear"})
    save_lora(rest, path, "comfyui", family=FLUX2)
    torch.testing.assert_close(diffusers_output(path), applied_output(rest), rtol=1e-5, atol=1e-5)


def test_fused_with_missing_parts(tmp_path, shapes, random_state):
    state, path = random_state(modules=["transformer_blocks.0.attn.to_k"]), tmp_path / "a.safetensors"
    save_lora(state, path, "comfyui", family=FLUX2)
    loaded = read_lora(path, shapes)
    assert torch.equal(loaded.modules[ATTENTION[1]].delta(), state.modules[ATTENTION[1]].delta())
    assert not loaded.modules[ATTENTION[0]].delta().any()
    assert [loaded.modules[name].rank for name in ATTENTION[:3]] == [1, 4, 1]
    assert not loaded.modules[ATTENTION[2]].delta().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_stored_types(tmp_path, shapes, dtype):
    lora_A, lora_B = torch.randn(4, 16).to(dtype), torch.randn(16, 4).to(dtype)
    save_file({A: lora_A, B: lora_B, f"{STEM}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    module = read_lora(tmp_path, shapes).modules[ATTENTION[0]]
    assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
    assert torch.equal(module.delta(), (lora_B.float() * 0.75) @ lora_A.float())


def test_padded_keeps_delta(random_state, assert_same_deltas):
    state = random_state(ranks=(1, 3))
    assert state.max_rank == 3
    padded = state.padded(5)
    assert {module.rank for module in padded.modules.values()} == {5}
    assert_same_deltas(padded, state, atol=1e-6)
    with pytest.raises(ValueError, match="rank-3"):
        state.padded(2)


def test_file_digest_of_a_loras_folder(tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    expected = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert file_digest(find_weights(tmp_path)) == file_digest(tmp_path / "a.safetensors") == expected
    with pytest.raises(CloraError, match="b.safetensors cannot be read"):
        file_digest(tmp_path / "b.safetensors")


def test_save_refuses(tmp_path, random_state):
    state = random_state(modules=ATTENTION)
    broken = LoRAState({ATTENTION[0]: LoRAModule(torch.full((2, 16), float("nan")), torch.ones(16, 2))})
    huge = LoRAState({ATTENTION[0]: LoRAModule(torch.full((2, 16), 1e9), torch.ones(16, 2))})
    (tmp_path / "file").write_text("")
    with pytest.raises(CloraError, match="NaN"):
        save_lora(broken, tmp_path / "a.safetensors")
    with pytest.raises(CloraError, match="float16"):
        save_lora(huge, tmp_path / "a.safetensors", dtype=torch.float16)
    with pytest.raises(CloraError, match="lora_adapter_metadata"):
        save_lora(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{}"})
    with pytest.raises(CloraError, match="cannot be written"):
        save_lora(state, tmp_path / "file" / "a.safetensors")
    with pytest.raises(CloraError, match="cannot be written"):
        save_lora(state, tmp_path / "file", "peft")
    with pytest.raises(CloraError, match="ends in .safetensors"):
        save_lora(state, tmp_path / "a.bin", "comfyui", family=FLUX2)
    with pytest.raises(CloraError, match="alpha must be above 0"):
        save_lora(state, tmp_path / "a.safetensors", "kohya", alpha=0, family=FLUX2)
    with pytest.raises(CloraError, match="comfyui files state no alpha"):
        save_lora(state, tmp_path / "a.safetensors", "comfyui", alpha=2.0, family=FLUX2)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_saved_file_is_as_readable_as_any_other(tmp_path, random_state):
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    save_lora(random_state(), path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, random_state):
    path = tmp_path / "a.safetensors"
    save_lora(random_state(seed=0), path)
    before = path.read_bytes()

    def half_written(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(save_module, "save_file", half_written)
    with pytest.raises(CloraError, match="no space left"):
        save_lora(random_state(seed=1), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_silent_disk_corruption_is_noticed(tmp_path, monkeypatch, random_state):
    def wrong(tensors, file, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata)

    monkeypatch.setattr(save_module, "save_file", wrong)
    with pytest.raises(CloraError, match="read back differs"):
        save_lora(random_state(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_files_header_is_read_once_whatever_its_number_of_modules(tmp_path, shapes, random_state, monkeypatch):
    """Opening reads the whole header: opened for each module, a file would take time by the square of their number."""
    opened = []

    def count(file, framework):
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr("clora.lora.source.safe_open", count)
    for modules in (1, 6):
        save_lora(random_state(modules=list(shapes)[:modules]), tmp_path / "a.safetensors")
        read_lora(tmp_path, shapes)
    assert len(opened) == 2 * 2  # the header, and the values
