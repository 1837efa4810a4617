"""`inspect_lora` tells what is in a file, and does not stop at what `load_lora` refuses."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from clora.errors import CloraError
from clora.lora.inspect import inspect_lora, pipeline_shapes, render
from clora.lora.save import save_kohya, save_peft_folder


def text(info):
    console = Console(file=io.StringIO(), width=160)
    console.print(render(info))
    return console.file.getvalue()


def test_kohya_with_a_model(tmp_path, targets, random_state):
    save_kohya(random_state(), tmp_path / "a.safetensors", alpha=2.0, dtype=torch.bfloat16)
    info = inspect_lora(tmp_path, targets)
    assert json.loads(json.dumps(info)) == info
    assert info["format"] == "kohya"
    assert info["matched"] == len(targets)
    assert len(info["modules"]) == len(targets) - 4
    assert info["ranks"] == {"4": len(targets) - 6, "12": 2}
    assert info["alphas"] == {"2": len(targets) - 4}
    assert set(info["scales"]) == {"0.5", f"{1 / 6:g}"}
    assert info["dtypes"] == {"BF16": 2 * (len(targets) - 4)}
    assert info["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert not info["problems"]
    assert not info["unmatched"]
    qkv = next(entry for entry in info["modules"] if entry["name"].endswith("img_attn_qkv"))
    assert [name.rsplit(".", 1)[1] for name in qkv["targets"]] == ["to_q", "to_k", "to_v"]
    assert qkv["alpha_from"] == "tensor"


def test_peft_without_a_model(tmp_path, random_state):
    state = random_state(ranks=(2, 4))
    save_peft_folder(state, tmp_path, alpha=8)
    info = inspect_lora(tmp_path)
    assert info["format"] == "peft"
    assert info["matched"] is None
    assert info["parameters"] == state.num_parameters
    assert {entry["scale"] for entry in info["modules"]} == {2.0, 4.0}
    assert {entry["alpha_from"] for entry in info["modules"]} == {"config"}
    assert "no model given" in text(info)


def test_lists_what_does_not_fit(tmp_path, targets, random_state):
    path = tmp_path / "a.safetensors"
    save_kohya(random_state(modules=["x_embedder", "context_embedder"]), path, alpha=4.0)
    extra = {
        "surprise[bold]": torch.ones(2),
        "lora_unet_elsewhere.lora_down.weight": torch.ones(2, 3),
        "lora_unet_elsewhere.lora_up.weight": torch.ones(3, 2),
        "lora_unet_proj_out.lora_down.weight": torch.ones(2, 3),
        "lora_te_layer.lora_down.weight": torch.ones(3, 3),
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 16),
        "transformer.x_embedder.lora_B.weight": torch.ones(16, 2),
        "transformer.x_embedder.lora_up.weight": torch.ones(16, 2),
        "lora_unet_single_stream_modulation_lin.lora_down.weight": torch.ones(2, 3),
        "lora_unet_single_stream_modulation_lin.lora_up.weight": torch.ones(48, 2),
    }
    save_file(load_file(path) | extra, path)
    info = inspect_lora(path, targets)
    assert info["unknown_keys"] == ["surprise[bold]"]
    assert info["unmatched"] == ["lora_unet_elsewhere"]
    ((reason, keys),) = info["unsupported"].items()
    assert "text encoder" in reason
    assert keys == ["lora_te_layer.lora_down.weight"]
    for problem, words in zip(
        info["problems"],
        ("lora_unet_proj_out has no lora_B", "wrong shape", "by two names", "x_embedder is given 2 times"),
        strict=True,
    ):
        assert words in problem
    for word in ("surprise[bold]", "lora_unet_elsewhere", "text encoder", "mixed"):
        assert word in text(info)


def test_no_lora_keys(tmp_path):
    save_file({"model.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    info = inspect_lora(tmp_path)
    assert (info["format"], info["unknown_keys"], info["modules"]) == ("unknown", ["model.weight"], [])
    assert "model.weight" in text(info)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.safetensors", b"", "empty"), ("a.safetensors", b"x" * 99, "corrupt"), ("a.ckpt", b"x", "pickle")],
)
def test_raises_on_unreadable(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CloraError, match=words):
        inspect_lora(tmp_path / name)
    with pytest.raises(CloraError, match="does not exist"):
        inspect_lora(tmp_path / "nothing")


@pytest.mark.parametrize("part", ["lora_down.weight", "alpha"])
def test_nan_is_a_problem(tmp_path, random_state, part):
    path = tmp_path / "a.safetensors"
    save_kohya(random_state(modules=["x_embedder", "context_embedder"]), path, alpha=4.0)
    tensors = load_file(path)
    spoilt = next(key for key in tensors if key.endswith(part))
    tensors[spoilt].fill_(torch.nan)
    save_file(tensors, path)
    info = inspect_lora(path)
    assert len(info["modules"]) == 1
    (problem,) = info["problems"]
    assert f"{spoilt} holds NaN" in problem


def test_the_family_is_told_without_a_model(tmp_path, targets, random_state):
    path = tmp_path / "a.safetensors"
    save_kohya(random_state(), path, alpha=2.0)
    assert inspect_lora(path)["families"] == ["FLUX.2"]
    assert inspect_lora(path, targets)["families"] == ["FLUX.2"]
    save_kohya(random_state(modules=["transformer_blocks.0.attn.to_q"]), path, alpha=2.0)
    assert inspect_lora(path)["families"] == ["FLUX.1", "FLUX.2"]
    other = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{other}.lora_down.weight": torch.ones(2, 3), f"{other}.lora_up.weight": torch.ones(3, 2)}, path)
    assert inspect_lora(path)["families"] == []
    assert "unknown" in text(inspect_lora(path))


@pytest.mark.parametrize("values", [{"num_layers": "x"}, {"_class_name": "logging"}, {"_class_name": 3}])
def test_a_damaged_config_of_the_model(tmp_path, adapter, values):
    adapter.pipeline.transformer.save_config(tmp_path / "transformer")
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CloraError, match="not a diffusers pipeline"):
        pipeline_shapes(tmp_path)
