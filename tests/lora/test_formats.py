"""Every format for every family: the loaded update is (alpha / rank) B A of what the file holds."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS, Random, assert_changes, product, write
from helpers.versions import since_diffusers

from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora

A_B = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")

# format: (prefix, are dots underscores, names of both matrices, does an alpha tensor stand beside them)
FORMATS = {
    "diffusers": ("transformer.", False, A_B, False),
    "diffusers_alpha": ("transformer.", False, A_B, True),
    "kohya": ("lora_unet_", True, DOWN_UP, True),
    "comfyui": ("diffusion_model.", False, A_B, False),
    "comfyui_alpha": ("diffusion_model.", False, A_B, True),
    "comfyui_down_up": ("diffusion_model.", False, DOWN_UP, True),
    "lightning": ("", False, DOWN_UP, True),
    "lightning_A_B": ("", False, A_B, True),
    "diffsynth": ("", False, DEFAULT, False),
    "lycoris": ("lycoris_", True, DOWN_UP, True),
    "onetrainer": ("lora_transformer_", True, DOWN_UP, True),
    "dotted": ("diffusion_model.", False, DOTTED, True),
}


@pytest.fixture(scope="module")
def families():
    """Family to (tiny transformer, its linear shapes)."""
    made = {}
    for name, build in TRANSFORMERS.items():
        torch.manual_seed(0)
        model = build().eval()
        made[name] = model, linear_shapes(model)
    return made


def some_modules(shapes, seed):
    """About a third of the modules, in random order."""
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(seed))
    return [list(shapes)[index] for index in order[: max(3, len(shapes) // 3)]]


def write_file(path, shapes, modules, seed, prefix, underscores, names, has_alpha, dtype=torch.float32):
    """Random ranks and alphas; returns the expected updates."""
    random, tensors, expected = Random(seed), {}, {}
    for module in modules:
        rank = random.integer(1, 9)
        lora_A, lora_B = (matrix.to(dtype) for matrix in random.pair(shapes[module], rank))
        stem = prefix + (module.replace(".", "_") if underscores else module)
        tensors |= {f"{stem}.{names[0]}": lora_A, f"{stem}.{names[1]}": lora_B}
        scale = 1.0
        if has_alpha:
            alpha = random.integer(1, 16) / 4
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            scale = alpha / rank
        expected[module] = product(lora_A, lora_B, scale)
    write(path, tensors)
    return expected


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("form", FORMATS)
def test_format(tmp_path, families, family, form):
    shapes = families[family][1]
    for seed in range(3):
        path = tmp_path / f"{seed}.safetensors"
        expected = write_file(path, shapes, some_modules(shapes, seed), seed, *FORMATS[form])
        assert_changes(read_lora(path, shapes), expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_module(tmp_path, families, family):
    shapes = families[family][1]
    path = tmp_path / "a.safetensors"
    expected = write_file(path, shapes, list(shapes), 0, *FORMATS["kohya"])
    assert_changes(read_lora(path, shapes), expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_stored_types(tmp_path, families, family, dtype):
    """The update is that of the stored values, not of those before they were rounded."""
    shapes = families[family][1]
    path = tmp_path / "a.safetensors"
    expected = write_file(path, shapes, some_modules(shapes, 1), 1, *FORMATS["lightning"], dtype)
    assert_changes(read_lora(path, shapes), expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_lightning_alpha(tmp_path, families, family):
    """Rank 64 with alpha 8 in bf16: an eighth of what alpha = rank would give."""
    shapes = families[family][1]
    random, tensors, expected = Random(0), {}, {}
    for module in some_modules(shapes, 0):
        lora_A, lora_B = (matrix.bfloat16() for matrix in random.pair(shapes[module], 64))
        tensors |= {f"{module}.lora_down.weight": lora_A, f"{module}.lora_up.weight": lora_B}
        tensors[f"{module}.alpha"] = torch.tensor(8.0, dtype=torch.bfloat16)
        expected[module] = product(lora_A, lora_B, 1 / 8)
    assert_changes(read_lora(write(tmp_path / "a.safetensors", tensors), shapes), expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_peft_folder(tmp_path, families, family):
    """As PEFT itself writes it, and as PEFT itself applies it."""
    from peft import LoraConfig, get_peft_model

    model, shapes = families[family]
    modules = some_modules(shapes, 2)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=modules,
        rank_pattern={modules[0]: 7},
        alpha_pattern={modules[1]: 2},
        use_rslora=family == "FLUX.1",
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    random = Random(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = random.matrix(*parameter.shape)
    peft_model.save_pretrained(tmp_path)
    merged = peft_model.double().merge_and_unload()
    expected = {
        name: merged.get_submodule(name).weight.detach() - model.get_submodule(name).weight.detach().double()
        for name in modules
    }
    assert_changes(read_lora(tmp_path, shapes), expected)


def test_high_ranks_load(tmp_path, families):
    """Above what the kernels take; a LoRA is never cut."""
    shapes = families["Qwen-Image"][1]
    lora_A, lora_B = Random(0).pair(shapes["img_in"], 300)
    path = write(tmp_path / "a.safetensors", {"img_in.lora_A.weight": lora_A, "img_in.lora_B.weight": lora_B})
    state = read_lora(path, shapes)
    assert state.max_rank == 300
    assert not state.errors
    assert_changes(state, {"img_in": product(lora_A, lora_B)})


# Which of diffusers' own loaders read which formats (executed with 0.42): the others load nothing or raise.
DIFFUSERS_READS = [
    ("Qwen-Image", "QwenImageEditPlusPipeline", "diffusers"),
    pytest.param(
        *("Qwen-Image", "QwenImageEditPlusPipeline", "comfyui_alpha"),
        marks=since_diffusers("0.40", "the first that does not drop alpha beside lora_A"),
    ),
    ("Qwen-Image", "QwenImageEditPlusPipeline", "kohya"),
    ("FLUX.1", "FluxKontextPipeline", "diffusers"),
    ("FLUX.1", "FluxKontextPipeline", "diffusers_alpha"),
    ("FLUX.2", "Flux2Pipeline", "diffusers"),
    ("FLUX.2", "Flux2Pipeline", "comfyui"),
    ("Z-Image", "ZImagePipeline", "diffusers"),
    ("Z-Image", "ZImagePipeline", "comfyui_alpha"),
]


@pytest.mark.parametrize(("family", "pipeline", "form"), DIFFUSERS_READS)
def test_diffusers_agrees(tmp_path, families, family, pipeline, form):
    import diffusers

    model, shapes = families[family]
    # Of one rank: diffusers up to 0.39 mis-scales mixed ranks without alpha.
    random, tensors = Random(5), {}
    prefix, underscores, names, has_alpha = FORMATS[form]
    modules = [name for name in shapes if "transformer_blocks" in name or "layers" in name or "attention" in name]
    for module in modules:
        lora_A, lora_B = random.pair(shapes[module], 4)
        stem = prefix + (module.replace(".", "_") if underscores else module)
        tensors |= {f"{stem}.{names[0]}": lora_A, f"{stem}.{names[1]}": lora_B}
        if has_alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    path = write(tmp_path / "a.safetensors", tensors)
    loaded, kind = copy.deepcopy(model), getattr(diffusers, pipeline)
    others = dict.fromkeys(list(inspect.signature(kind.__init__).parameters)[1:])
    kind(**others | {"transformer": loaded}).load_lora_weights(path)
    assert loaded.peft_config, "diffusers loaded nothing"
    loaded.fuse_lora()
    loaded.unload_lora()
    expected = {
        name: loaded.get_submodule(name).weight.detach().double() - model.get_submodule(name).weight.detach().double()
        for name in modules
    }
    assert_changes(read_lora(path, shapes), expected, tolerance=1e-5)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_adapters_saved_by_a_transformer(tmp_path, families, family):
    """`save_lora_adapter` of the model itself, the only way of those whose pipeline loads no LoRA."""
    from peft import LoraConfig

    model, shapes = families[family]
    modules = some_modules(shapes, 6)
    random, adapted = Random(6), copy.deepcopy(model)
    adapted.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=modules))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = random.matrix(*parameter.shape)
    adapted.save_lora_adapter(tmp_path)
    adapted.double().fuse_lora()
    adapted.unload_lora()
    expected = {
        name: adapted.get_submodule(name).weight.detach() - model.get_submodule(name).weight.detach().double()
        for name in modules
    }
    state = read_lora(tmp_path, shapes)
    assert_changes(state, expected)
    assert "lora_adapter_metadata" in state.metadata


def test_metadata_of_diffusers(tmp_path, families):
    shapes = families["Qwen-Image"][1]
    modules = some_modules(shapes, 4)
    random, tensors, expected = Random(4), {}, {}
    for module in modules:
        lora_A, lora_B = random.pair(shapes[module], 4)
        tensors |= {f"transformer.{module}.lora_A.weight": lora_A, f"transformer.{module}.lora_B.weight": lora_B}
        expected[module] = product(lora_A, lora_B, 6 / 4)
    values = {"transformer.r": 4, "transformer.lora_alpha": 6, "text_encoder.r": 99}
    path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(values)})
    assert_changes(read_lora(path, shapes), expected)
