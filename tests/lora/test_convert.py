"""``clora export``: the update that each written file means, read back by clora and by diffusers."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from helpers.collection_cases import describe
from helpers.families import tiny_transformer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clora.cli import main
from clora.collection.apply import load_collection
from clora.collection.metadata import to_metadata
from clora.errors import CloraError
from clora.lora.convert import FORMATS, convert_lora, render
from clora.lora.families import FLUX2
from clora.lora.layers import linear_shapes, linear_weights
from clora.lora.load import load_lora, read_lora
from clora.lora.save import save_lora
from clora.lora.state import LoRAState
from clora.testing import random_lora

FAMILIES = ("Flux2KleinPipeline", "QwenImageEditPlusPipeline")
ATTENTION = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"]


@pytest.fixture(scope="module")
def models():
    return {family: tiny_transformer(family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request, models):
    return models[request.param]


def mixed(model):
    """Ranks 2 and 5."""
    names = list(random_lora(model, 1, 0).modules)
    parts = (random_lora(model, 2, 3, names[::2]), random_lora(model, 5, 4, names[1::2]))
    return LoRAState({**parts[0].modules, **parts[1].modules})


def written(tmp_path, format):
    return tmp_path / ("peft" if format == "peft" else f"{format}.safetensors")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_means_the_same_update(model, tmp_path, format, assert_same_deltas):
    state = mixed(model)
    save_lora(state, tmp_path / "in", "peft", alpha=3.0)
    report = convert_lora(tmp_path / "in", written(tmp_path, format), format)
    read = load_lora(written(tmp_path, format), model)
    assert read.format == format
    assert_same_deltas(reduced_to(read, state), state, atol=1e-6)
    assert report["max_error"] < 1e-6
    assert {entry["name"] for entry in report["modules"]} == set(state.modules)


def reduced_to(read, state):
    """Without the zeros that a fused module has for parts that the LoRA lacks."""
    others = {name: module for name, module in read.modules.items() if name not in state.modules}
    assert not any(module.delta().any() for module in others.values())
    return LoRAState({name: read.modules[name] for name in state.modules})


def test_ranks_alphas_and_names(models, tmp_path):
    """diffusers has one rank and no alpha; kohya states each module's own; names are FLUX's only for FLUX."""
    for family, name in zip(FAMILIES, ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"), strict=True):
        save_lora(mixed(models[family]), tmp_path / "in.safetensors")
        save_lora(mixed(models[family]), tmp_path / "mixed", "peft")
        for format in ("diffusers", "kohya", "comfyui"):
            convert_lora(tmp_path / "mixed", written(tmp_path, format), format)
        diffusers, kohya, comfyui = (load_file(written(tmp_path, f)) for f in ("diffusers", "kohya", "comfyui"))
        assert {t.shape[0] for key, t in diffusers.items() if "lora_A" in key} == {5}
        assert not any("alpha" in key for key in (*diffusers, *comfyui))
        assert f"diffusion_model.{name}.lora_A.weight" in comfyui
        stem = "lora_unet_" + name.replace(".", "_")
        downs = {key: tensor for key, tensor in kohya.items() if "lora_down" in key}
        assert f"{stem}.lora_down.weight" in downs
        assert all(kohya[key.replace("lora_down.weight", "alpha")] == t.shape[0] for key, t in downs.items())


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_a_lower_rank_and_its_error(models, tmp_path, format):
    model = models["Flux2KleinPipeline"]
    state = mixed(model)
    save_lora(state, tmp_path / "in", "peft")
    report = convert_lora(tmp_path / "in", written(tmp_path, format), format, rank=2, dtype="bf16")
    read = load_lora(written(tmp_path, format), model)
    for entry in report["modules"]:
        before, after = state.modules[entry["name"]].delta().double(), read.modules[entry["name"]].delta().double()
        assert entry["error"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)
        squares = torch.linalg.svdvals(before).square()
        assert entry["energy"] == pytest.approx((squares[:2].sum() / squares.sum()).item(), rel=1e-5)
        assert (entry["rank"], entry["rank_before"]) == (2, state.modules[entry["name"]].rank)
    assert report["max_error"] == max(entry["error"] for entry in report["modules"]) > 0.1
    assert (report["rank"], report["dtype"]) == (2, "bf16")
    assert report["bytes"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and "in" not in f.parts)


def test_energy_is_kept_by_every_module(models, tmp_path):
    save_lora(random_lora(models["Flux2KleinPipeline"], 6, 0), tmp_path / "in.safetensors")
    ranks = {}
    for format in ("diffusers", "peft"):
        report = convert_lora(tmp_path / "in.safetensors", written(tmp_path, format), format, energy=0.7)
        assert all(entry["energy"] >= 0.7 for entry in report["modules"])
        ranks[format] = {entry["rank"] for entry in report["modules"]}
        assert 0.1 < report["max_error"] <= 0.3**0.5
    assert ranks["diffusers"] == {max(ranks["peft"])}
    assert len(ranks["peft"]) > 1, "a rank for each module"


@pytest.mark.parametrize(
    ("dtype", "stored", "error"), [("fp16", "F16", 1e-3), ("bf16", "BF16", 5e-3), ("fp8", "F8_E4M3", 0.06)]
)
def test_types_and_their_errors(models, tmp_path, dtype, stored, error):
    model = models["Flux2KleinPipeline"]
    save_lora(random_lora(model, 3, 0), tmp_path / "in.safetensors")
    report = convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype=dtype)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {stored}  # noqa: SIM118
    assert error / 20 < report["max_error"] < error
    again = convert_lora(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    assert again["dtype"] == dtype, "by default as in the file"
    assert again["max_error"] < 1e-12
    read = load_lora(tmp_path / "out.safetensors", model)
    assert set(read.modules) == set(random_lora(model, 3, 0).modules)
    lower = convert_lora(tmp_path / "in.safetensors", tmp_path / "lower.safetensors", rank=2, dtype=dtype)
    assert lower["rank"] == load_lora(tmp_path / "lower.safetensors", model).max_rank == 2


def test_diffusers_reads_fp8(models, tmp_path):
    from helpers.families import bare_pipeline, run

    from clora.testing import merge_lora

    family = "Flux2KleinPipeline"
    save_lora(random_lora(models[family], 3, 0), tmp_path / "in.safetensors")
    convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="fp8")
    read = load_lora(tmp_path / "out.safetensors", models[family])
    pipeline = bare_pipeline(family)
    pipeline.load_lora_weights(tmp_path / "out.safetensors")
    merged = run(family, merge_lora(models[family], read))
    torch.testing.assert_close(run(family, pipeline.transformer), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_collection_stays_one(models, tmp_path, format):
    described = describe()
    metadata = to_metadata(described) | {"modelspec.license": "mit", "ss_network_dim": "64"}
    save_lora(random_lora(models[FAMILIES[0]], 3, 0), tmp_path / "in.safetensors", metadata=metadata)
    convert_lora(tmp_path / "in.safetensors", written(tmp_path, format), format, rank=2)
    assert load_collection(written(tmp_path, format)).collection == described
    weights = tmp_path / "peft" / "adapter_model.safetensors" if format == "peft" else written(tmp_path, format)
    with safe_open(weights, "pt") as file:
        assert file.metadata()["modelspec.license"] == "mit"
        assert "ss_network_dim" not in file.metadata(), "no longer true"


@pytest.fixture
def folder(models, tmp_path):
    """A pipeline folder as far as an export looks into it."""

    def write(family):
        models[family].save_config(tmp_path / family / "transformer")
        return tmp_path / family

    return write


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_fused_names_need_the_model(models, tmp_path, folder, format, assert_same_deltas):
    model = models["Flux2KleinPipeline"]
    state = random_lora(model, 3, 0)
    save_lora(state, tmp_path / "in.safetensors", format, family=FLUX2)
    with pytest.raises(CloraError, match="does not show which layer.*--pipeline FOLDER"):
        convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", pipeline=folder("Flux2KleinPipeline"))
    assert_same_deltas(load_lora(tmp_path / "out.safetensors", model), state, atol=1e-6)


@pytest.mark.parametrize(
    "stem",
    [
        "lycoris_transformer_blocks_0_attn_to_q",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "lora_unet_transformer_blocks_0_attn_to_q",
        "diffusion_model.layers.3.attention.qkv",
        "diffusion_model.noise_refiner.0.attention.out",
        "single_blocks.7.linear1",
        "double_stream_modulation_img.lin",
    ],
)
def test_names_that_no_diffusers_model_has_need_the_model(tmp_path, stem):
    """Written as they are, no loader would know them."""
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(CloraError, match=f"{stem} does not show which layer.*--pipeline FOLDER"):
        convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_names_of_no_known_family_need_the_model(tmp_path, format):
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(CloraError, match="named like those of no model family that clora knows .*--pipeline FOLDER"):
        convert_lora(tmp_path / "in.safetensors", written(tmp_path, format), format)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(("format", "hint"), [("lycoris", ""), ("kohyaa", "; did you mean 'kohya'")])
def test_save_lora_writes_only_documented_formats(models, tmp_path, format, hint):
    with pytest.raises(CloraError, match=f"format: expected one of diffusers, .*found '{format}'{hint}"):
        save_lora(random_lora(models[FAMILIES[0]], 2, 0), tmp_path / "out.safetensors", format)
    assert not (tmp_path / "out.safetensors").exists()


def test_names_that_two_families_share_need_the_model(models, tmp_path, folder):
    for family, name in zip(FAMILIES, ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"), strict=True):
        save_lora(random_lora(models[family], 3, 0, ATTENTION), tmp_path / "in.safetensors")
        arguments = (tmp_path / "in.safetensors", tmp_path / "out.safetensors", "comfyui")
        with pytest.raises(CloraError, match="Qwen-Image and .*FLUX.2.* have layers like .*--pipeline FOLDER"):
            convert_lora(*arguments)
        convert_lora(*arguments, pipeline=folder(family))
        assert f"diffusion_model.{name}.lora_B.weight" in load_file(tmp_path / "out.safetensors")
        metadata = to_metadata(describe(pipeline=family))
        save_lora(random_lora(models[family], 3, 0, ATTENTION), tmp_path / "in.safetensors", metadata=metadata)
        convert_lora(*arguments)
        assert f"diffusion_model.{name}.lora_B.weight" in load_file(tmp_path / "out.safetensors"), (
            "a collection names its pipeline"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "difusers"}, "format: expected one of .*'difusers'; did you mean 'diffusers'"),
        ({"dtype": "int8"}, "dtype: expected one of fp32, bf16, fp16, fp8, found 'int8'"),
        ({"rank": 4, "energy": 0.9}, "found both"),
        ({"rank": 0}, "rank of at least 1"),
        ({"energy": 2.0}, "at most 1, found 2"),
        ({"output": "in.safetensors"}, "choose another name"),
        ({"output": "out.bin"}, "ends in .safetensors"),
    ],
)
def test_bad_requests_write_nothing(models, tmp_path, options, message):
    save_lora(random_lora(models[FAMILIES[0]], 3, 0), tmp_path / "in.safetensors")
    before = (tmp_path / "in.safetensors").read_bytes()
    options = {"output": "out.safetensors"} | options
    with pytest.raises(CloraError, match=message):
        convert_lora(tmp_path / "in.safetensors", tmp_path / options.pop("output"), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_dora_is_exported_beside_its_base_and_what_its_factors_miss_is_told(models, tmp_path, assert_same_deltas):
    """The base's weights are read from the pipeline's folder, in shards and of another type than fp32."""
    model = copy.deepcopy(models[FAMILIES[0]]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="30kB")
    model.save_pretrained(tmp_path / "config" / "transformer")
    (tmp_path / "config" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert len(list((tmp_path / "base" / "transformer").glob("*.safetensors"))) > 1
    save_lora(random_lora(model, 3, 0, ATTENTION), tmp_path / "lora.safetensors")
    name = f"transformer.{ATTENTION[0]}"
    scale = {
        f"{name}.dora_scale": 1.5 * model.get_submodule(ATTENTION[0]).weight.detach().float().norm(dim=1, keepdim=True)
    }
    save_file(load_file(tmp_path / "lora.safetensors") | scale, tmp_path / "dora.safetensors")
    expected = read_lora(tmp_path / "dora.safetensors", linear_shapes(model), linear_weights(model), max_error=0.2)
    assert 0 < expected.errors[ATTENTION[0]] < 0.2
    out = tmp_path / "out.safetensors"
    report = convert_lora(tmp_path / "dora.safetensors", out, pipeline=tmp_path / "base", max_error=0.2)
    assert_same_deltas(reduced_to(load_lora(out, model), expected), expected, atol=1e-6)
    errors = {entry["name"]: entry["load_error"] for entry in report["modules"]}
    assert errors == {ATTENTION[0]: expected.errors[ATTENTION[0]], ATTENTION[1]: 0.0}
    assert report["load_error"] == errors[ATTENTION[0]]
    assert f"1 modules of the file are not of low rank: read as factors, error {report['load_error']:.2%}" in shown(
        report
    )
    for options in ({}, {"pipeline": tmp_path / "config"}):
        with pytest.raises(CloraError, match="DoRA, .* name the base's folder, weights included, with --pipeline"):
            convert_lora(tmp_path / "dora.safetensors", tmp_path / "none.safetensors", **options)


def shown(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(render(report), crop=False)
    return console.file.getvalue()


def test_module_names_are_whole_in_80_columns():
    name, output = (
        "single_transformer_blocks.19.attn.to_qkv_mlp_proj",
        f"/home/me/{'long_name_of_a_folder/' * 4}a.safetensors",
    )
    entry = {"name": name, "rank": 32, "rank_before": 128, "energy": 0.5, "error": 0.1, "load_error": 0.0}
    report = {
        "output": output,
        "format": "peft",
        "dtype": "fp32",
        "rank": 32,
        "bytes": 1,
        "load_error": 0.0,
        "modules": [entry],
    }
    lines = shown(report).splitlines()
    assert any(line.startswith(f"{name} ") for line in lines), lines
    assert lines[0] == output, "which can be copied whole"
    assert "low rank" not in shown(report)


def test_the_command(models, tmp_path, monkeypatch, capsys):
    save_lora(random_lora(models[FAMILIES[0]], 3, 0), tmp_path / "in.safetensors")
    arguments = ["clora", "export", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out.safetensors")]
    monkeypatch.setattr("sys.argv", [*arguments, "--rank", "2", "--dtype", "fp16", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    assert (report["rank"], report["dtype"], len(report["modules"])) == (2, "fp16", 14)
    monkeypatch.setattr("sys.argv", [*arguments, "--energy", "0.5"])
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "relative" in shown
    assert "transformer_blocks.0.attn.to_q" in shown
