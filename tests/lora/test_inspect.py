"""`inspect` describes a file, and does not stop at contents that `load_lora` refuses."""

from __future__ import annotations

import io
import json
import types

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS
from rich.console import Console
from safetensors.torch import load_file, save_file

from clora.errors import CloraError
from clora.lora.families import FLUX2
from clora.lora.inspect import check_usable, inspect, render
from clora.lora.layers import linear_shapes, pipeline_shapes
from clora.lora.load import load_lora, lora_ranks
from clora.lora.save import save_lora


def text(info):
    console = Console(file=io.StringIO(), width=160)
    console.print(render(info))
    return console.file.getvalue()


def test_names_and_hashes_are_whole_in_80_columns(tmp_path, shapes, random_state):
    file = tmp_path / f"{'a_file_name_of_a_length_that_is_found_on_hubs_' * 2}.safetensors"
    save_lora(random_state(), file, "kohya", family=FLUX2)
    console = Console(file=io.StringIO(), width=80)
    info = inspect(file) | {"unmatched": ["some.module"], "metadata": {"ss_tag": "x" * 81, "other": "y" * 80}}
    console.print(render(info), crop=False)
    path, *lines = console.file.getvalue().splitlines()
    assert path == str(file), "which can be copied whole"
    assert max(map(len, lines)) <= 80
    assert any(info["sha256"] in line for line in lines)
    values = "".join(line[16:] for line in lines).replace(" ", "")
    assert values.endswith(f"ss_tag={'x' * 80}...other={'y' * 80}")


def test_kohya_with_a_model(tmp_path, transformer, shapes, random_state):
    save_lora(random_state(), tmp_path / "a.safetensors", "kohya", alpha=2.0, dtype=torch.bfloat16, family=FLUX2)
    info = inspect(tmp_path, transformer)
    assert json.loads(json.dumps(info)) == info
    assert info["format"] == "kohya"
    assert info["matched"] == len(shapes)
    assert len(info["modules"]) == len(shapes) - 4
    assert info["ranks"] == {"4": len(shapes) - 6, "12": 2}
    assert info["alphas"] == {"2": len(shapes) - 4}
    assert set(info["scales"]) == {"0.5", f"{1 / 6:g}"}
    assert info["dtypes"] == {"BF16": 2 * (len(shapes) - 4)}
    assert info["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert not info["problems"]
    assert not info["unmatched"]
    qkv = next(entry for entry in info["modules"] if entry["name"].endswith("img_attn_qkv"))
    assert [name.rsplit(".", 1)[1] for name in qkv["targets"]] == ["to_q", "to_k", "to_v"]
    assert qkv["alpha_from"] == "tensor"


def test_peft_without_a_model(tmp_path, random_state):
    state = random_state(ranks=(2, 4))
    save_lora(state, tmp_path, "peft", alpha=8)
    info = inspect(tmp_path)
    assert info["format"] == "peft"
    assert info["matched"] is None
    assert info["parameters"] == state.num_parameters
    assert {entry["scale"] for entry in info["modules"]} == {2.0, 4.0}
    assert {entry["alpha_from"] for entry in info["modules"]} == {"config"}
    assert "no model given" in text(info)


def test_lists_what_does_not_fit(tmp_path, transformer, random_state):
    path = tmp_path / "a.safetensors"
    save_lora(random_state(modules=["x_embedder", "context_embedder"]), path, "kohya", alpha=4.0, family=FLUX2)
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
    info = inspect(path, transformer)
    assert info["unknown_keys"] == ["surprise[bold]"]
    assert info["unmatched"] == ["lora_unet_elsewhere"]
    ((reason, keys),) = info["unsupported"].items()
    assert "text encoder" in reason
    assert keys == ["lora_te_layer.lora_down.weight"]
    for problem, words in zip(
        info["problems"],
        (
            "lora_unet_proj_out has no lora_B",
            "wrong shape",
            "by two names",
            "changes x_embedder a second time, after lora_unet_img_in",
        ),
        strict=True,
    ):
        assert words in problem
    for word in ("surprise[bold]", "lora_unet_elsewhere", "text encoder", "mixed"):
        assert word in text(info)


def test_no_lora_keys(tmp_path):
    save_file({"model.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    info = inspect(tmp_path)
    assert (info["format"], info["unknown_keys"], info["modules"]) == ("unknown", ["model.weight"], [])
    assert "model.weight" in text(info)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.safetensors", b"", "empty"), ("a.safetensors", b"x" * 99, "corrupt"), ("a.ckpt", b"x", "pickle")],
)
def test_raises_on_unreadable(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CloraError, match=words):
        inspect(tmp_path / name)
    with pytest.raises(CloraError, match="does not exist"):
        inspect(tmp_path / "nothing")


@pytest.mark.parametrize("part", ["lora_down.weight", "alpha"])
def test_nan_is_a_problem(tmp_path, random_state, part):
    path = tmp_path / "a.safetensors"
    save_lora(random_state(modules=["x_embedder", "context_embedder"]), path, "kohya", alpha=4.0, family=FLUX2)
    tensors = load_file(path)
    spoilt = next(key for key in tensors if key.endswith(part))
    tensors[spoilt].fill_(torch.nan)
    save_file(tensors, path)
    info = inspect(path)
    assert len(info["modules"]) == 1
    (problem,) = info["problems"]
    assert f"{spoilt} holds NaN" in problem


def test_the_family_is_found_without_a_model(tmp_path, transformer, random_state):
    path = tmp_path / "a.safetensors"
    save_lora(random_state(), path, "kohya", alpha=2.0, family=FLUX2)
    assert inspect(path)["families"] == ["FLUX.2"]
    assert inspect(path, transformer)["families"] == ["FLUX.2"]
    save_lora(random_state(modules=["transformer_blocks.0.attn.to_q"]), path, "kohya", alpha=2.0, family=FLUX2)
    assert inspect(path)["families"] == ["FLUX.1", "FLUX.2", "LongCat-Image"]
    other = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{other}.lora_down.weight": torch.ones(2, 3), f"{other}.lora_up.weight": torch.ones(3, 2)}, path)
    assert inspect(path)["families"] == []
    assert "unknown" in text(inspect(path))


@pytest.mark.parametrize("values", [{"num_layers": "x"}, {"_class_name": "logging"}, {"_class_name": 3}])
def test_a_damaged_config_of_the_model(tmp_path, adapter, values):
    adapter.pipeline.transformer.save_config(tmp_path / "transformer")
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CloraError, match="not a diffusers pipeline"):
        pipeline_shapes(tmp_path)


def lora(stem, rank=4):
    return {f"{stem}.lora_A.weight": torch.ones(rank, 16), f"{stem}.lora_B.weight": torch.ones(16, rank)}


def test_adapter_types(tmp_path, transformer):
    """Each type's rank, scale and the rank it loads as; the base decides DoRA's."""
    block = "diffusion_model.transformer_blocks.0.attn"
    tensors = {
        **lora(f"{block}.to_q", rank=300),
        f"{block}.to_k.lokr_w1": torch.ones(4, 2),
        f"{block}.to_k.lokr_w2_a": torch.ones(4, 3),
        f"{block}.to_k.lokr_w2_b": torch.ones(3, 8),
        f"{block}.to_k.alpha": torch.tensor(6.0),
        f"{block}.to_v.hada_w1_a": torch.ones(16, 2),
        f"{block}.to_v.hada_w1_b": torch.ones(2, 16),
        f"{block}.to_v.hada_w2_a": torch.ones(16, 2),
        f"{block}.to_v.hada_w2_b": torch.ones(2, 16),
        f"{block}.to_out.0.lokr_w1": torch.ones(4, 4),
        f"{block}.to_out.0.lokr_w2": torch.ones(4, 4),
        f"{block}.to_out.0.alpha": torch.tensor(1e10),
        f"{block}.to_add_out.diff": torch.ones(16, 16),
        **lora(f"{block}.add_q_proj"),
        f"{block}.add_q_proj.dora_scale": torch.ones(16, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    for info in (inspect(tmp_path), inspect(tmp_path, transformer)):
        assert json.loads(json.dumps(info)) == info
        found = {
            entry["name"].removeprefix(f"{block}."): tuple(
                entry[name] for name in ("type", "rank", "alpha", "scale", "loads_as_rank", "error")
            )
            for entry in info["modules"]
        }
        assert found == {
            "to_q": ("LoRA", 300, 300.0, 1.0, 300, 0.0),
            "to_k": ("LoKr", 3, 6.0, 2.0, 6, 0.0),
            "to_v": ("LoHa", 2, 2.0, 1.0, 4, 0.0),
            "to_out.0": ("LoKr", None, None, 1.0, 16, 0.0),
            "to_add_out": ("diff", None, None, 1.0, 16, 0.0),
            "add_q_proj": ("DoRA (LoRA)", 4, 4.0, 1.0, None, None),
        }
        assert info["types"] == {"DoRA (LoRA)": 1, "LoHa": 1, "LoKr": 2, "LoRA": 1, "diff": 1}
        assert info["ranks"] == {"2": 1, "3": 1, "4": 1, "300": 1, "none": 2}
        assert info["max_error"] is None
        assert not info["problems"]
        kernels, dora = info["notes"]
        assert "1 module(s) of rank above 256" in kernels
        assert "1 DoRA module(s)" in dora
    for words in ("LoKr (2)", "eager PyTorch", "weights of the base", "FLUX.2", "exact"):
        assert words in text(info)


def test_the_error_of_dense_changes(tmp_path):
    """The one that loading with the same model leaves, and a problem where loading would refuse it."""
    path = tmp_path / "a.safetensors"
    transformer = torch.nn.ModuleDict({"x": torch.nn.Linear(400, 300)})
    values = torch.full((300,), 1e-4)
    values[:9] = 1.0
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(400, 300, generator=generator)).Q
    save_file({"x.diff": (left * values) @ right.T}, path)
    for info in (inspect(path), inspect(path, transformer)):
        (entry,) = info["modules"]
        assert entry["loads_as_rank"] == 9
        assert info["max_error"] == entry["error"] == load_lora(path, transformer).errors["x"]
        assert entry["error"] == pytest.approx(1e-4 * (291 / 9) ** 0.5, rel=1e-2)
    assert "0.057% of a module's change" in text(info)
    save_file({"x.diff": torch.randn(300, 400, generator=generator)}, path)
    (problem,) = inspect(path, transformer)["problems"]
    assert "not of low rank" in problem


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_pipeline_folder_of_every_family(tmp_path, family):
    model = TRANSFORMERS[family]()
    model.save_config(tmp_path / "transformer")
    shapes = pipeline_shapes(tmp_path)
    assert shapes == linear_shapes(model)
    name, (out, inner) = next(iter(shapes.items()))
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, inner), f"{name}.lora_B.weight": torch.ones(out, 2)},
        tmp_path / "a.safetensors",
    )
    for pipeline in (tmp_path, str(tmp_path), model, types.SimpleNamespace(transformer=model)):
        info = inspect(tmp_path / "a.safetensors", pipeline)
        assert (info["families"], info["matched"]) == ([family], 1)
    assert inspect(tmp_path / "a.safetensors")["matched"] is None


def test_a_lora_that_changes_nothing_is_a_problem(tmp_path, transformer):
    name = "transformer.transformer_blocks.0.attn.{}"
    zero = {
        f"{name.format('to_q')}.lora_A.weight": torch.ones(4, 16),
        f"{name.format('to_q')}.lora_B.weight": torch.zeros(16, 4),
    }
    alpha = lora(name.format("to_k")) | {f"{name.format('to_k')}.alpha": torch.tensor(0.0)}
    path = tmp_path / "a.safetensors"
    for tensors in (zero, alpha, zero | alpha):
        save_file(tensors, path)
        (problem,) = inspect(path, transformer)["problems"]
        assert "changes nothing" in problem
        with pytest.raises(CloraError, match="changes nothing"):
            check_usable(inspect(path))
        with pytest.raises(CloraError, match="changes nothing"):
            lora_ranks(path, linear_shapes(transformer))
    save_file(zero | lora(name.format("to_k")), path)
    info = inspect(path, transformer)
    assert not info["problems"]
    assert info["notes"] == ["1 of 2 module(s) change nothing: the product of their matrices is zero"]
    assert lora_ranks(path, linear_shapes(transformer)) == {name[12:].format("to_q"): 4, name[12:].format("to_k"): 4}


def test_an_absurd_product_is_not_computed(tmp_path, transformer):
    path = tmp_path / "a.safetensors"
    stem = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{stem}.lokr_w1": torch.ones(120, 120), f"{stem}.lokr_w2": torch.ones(120, 120)}, path)
    (problem,) = inspect(path, transformer)["problems"]
    assert "[14400, 14400], expected [16, 16]" in problem


def test_prompts_of_a_collection_are_shown_whole(tmp_path):
    prompts = ["<snow> " + "turn the picture into deep winter " * 9, "<snow> another"]
    path = tmp_path / "a.safetensors"
    save_file(lora("transformer.x"), path, {"clora.effects": json.dumps([{"name": "snow", "prompts": prompts}])})
    info = inspect(path)
    assert info["effects"] == {"snow": prompts}
    shown = " ".join(text(info).split())
    assert " ".join(prompts[0].split()) in shown
    for damaged in ("{", "[1]", '[{"name": "a"}]', "9" * 5000, "[" * 10**5):
        save_file(lora("transformer.x"), path, {"clora.effects": damaged})
        assert inspect(path)["effects"] == {}
