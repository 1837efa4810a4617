"""An exported file in other programs: the key rules of their loaders, stated again in a few lines each.

Sources, read in 2026: ComfyUI's ``comfy/lora.py``, ``comfy/utils.py`` (``flux_to_diffusers``),
``comfy/weight_adapter/lora.py``, ``comfy/samplers.py`` and ``comfy/model_sampling.py``; diffusers'
``utils/peft_utils.py`` up to 0.39; sglang's ``multimodal_gen/runtime/pipelines_core/lora`` and ``configs/models/dits``.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from helpers.collection_cases import describe
from helpers.families import FAMILIES, tiny_transformer
from safetensors import safe_open
from safetensors.torch import load_file

from clora.collection.write import LORA_FILE, write_collection
from clora.flow.matching import student_schedule
from clora.lora.convert import convert_lora
from clora.lora.save import save_lora
from clora.lora.state import LoRAState
from clora.testing import random_lora

HIDDEN = 32  # of the tiny transformers
FLUX_DOUBLE = {
    **{f"attn.to_{x}": ("img_attn.qkv", i * HIDDEN, HIDDEN) for i, x in enumerate("qkv")},
    **{f"attn.add_{x}_proj": ("txt_attn.qkv", i * HIDDEN, HIDDEN) for i, x in enumerate("qkv")},
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX_SINGLE = {
    **{f"attn.to_{x}": ("linear1", i * HIDDEN, HIDDEN) for i, x in enumerate("qkv")},
    "proj_mlp": ("linear1", 3 * HIDDEN, 4 * HIDDEN),
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}


def comfyui_keys(family, module):
    """ComfyUI's place for one layer of the diffusers model: its own layer's name, or (name, first row, rows)."""
    if family == "QwenImageEditPlusPipeline":
        return module
    for blocks, own, table in (
        ("transformer_blocks.0.", "double_blocks.0.", FLUX_DOUBLE),
        ("single_transformer_blocks.0.", "single_blocks.0.", FLUX_SINGLE),
    ):
        if module.startswith(blocks):
            target = table[module.removeprefix(blocks)]
            return own + target if isinstance(target, str) else (own + target[0], *target[1:])
    raise AssertionError(module)


def comfyui_map(family, modules):
    """ComfyUI's key map: name in a file to its layer. Its own names are taken plain and with underscores."""
    targets = {module: comfyui_keys(family, module) for module in modules}
    names = {target if isinstance(target, str) else target[0] for target in targets.values()}
    known = {f"diffusion_model.{name}": name for name in names}
    known |= {f"lora_unet_{name.replace('.', '_')}": name for name in names}
    for module, target in targets.items():
        known |= {module: target, f"transformer.{module}": target, f"lycoris_{module.replace('.', '_')}": target}
    return known


def comfyui_patches(family, modules, tensors):
    """ComfyUI's additions to each of its layers; a key that it does not load is an error here, not a line in a log."""
    patches, loaded = {}, set()
    for name, target in comfyui_map(family, modules).items():
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            a, b, alpha = f"{name}.{down}.weight", f"{name}.{up}.weight", f"{name}.alpha"
            if b not in tensors:
                continue
            scale = tensors[alpha].item() / tensors[a].shape[0] if alpha in tensors else 1.0
            layer, *rows = [target] if isinstance(target, str) else target
            patches.setdefault(layer, []).append((rows, scale * tensors[b] @ tensors[a]))
            loaded |= {a, b, alpha} & set(tensors)
    assert loaded == set(tensors), f"not loaded: {set(tensors) - loaded}"
    return {layer: joined(parts) for layer, parts in patches.items()}


def joined(parts):
    """The patches of one layer as one change of its weight, rows that none of them has left out at the end."""
    height = max(rows[0] + rows[1] if rows else len(delta) for rows, delta in parts)
    change = torch.zeros(height, parts[0][1].shape[1])
    for rows, delta in parts:
        change[slice(rows[0], rows[0] + rows[1]) if rows else slice(None)] += delta
    return change


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def student(family):
    """Every layer that clora trains by default, of unequal ranks."""
    transformer = tiny_transformer(family)
    names = list(random_lora(transformer, 1, 0).modules)
    low, high = random_lora(transformer, 2, 1, names[::2]), random_lora(transformer, 4, 2, names[1::2])
    return LoRAState({name: (low.modules | high.modules)[name] for name in names})


@pytest.fixture
def collection(family, student, tmp_path):
    call = {"true_cfg_scale" if family.startswith("QwenImageEdit") else "guidance_scale": 1.0}
    return write_collection(student, describe(pipeline=family, call=call), tmp_path / "out", torch.float32) / LORA_FILE


def test_comfyui_loads_every_key_of_a_collection(family, student, collection):
    patches = comfyui_patches(family, student.modules, load_file(collection))
    total = sum(change.square().sum() for change in patches.values())
    expected = sum(module.delta().square().sum() for module in student.modules.values())
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_comfyui_means_the_same_by_every_format(family, student, collection, tmp_path, format):
    convert_lora(collection, tmp_path / "other.safetensors", format)
    expected = comfyui_patches(family, student.modules, load_file(collection))
    found = comfyui_patches(family, student.modules, load_file(tmp_path / "other.safetensors"))
    assert set(found) == set(expected)
    for layer, change in expected.items():
        torch.testing.assert_close(found[layer], change, rtol=0, atol=1e-5)


def test_comfyui_steps_as_the_student_does():
    """ModelSamplingAuraFlow with the shift and the scheduler "simple", from its table of 1000 noise levels."""
    t = torch.arange(1, 1001) / 1000
    table = 3.0 * t / (1 + (3.0 - 1) * t)
    simple = torch.stack([table[-(1 + int(step * len(table) / 8))] for step in range(8)])
    torch.testing.assert_close(simple, student_schedule(8, 3.0), rtol=0, atol=1e-6)


def old_diffusers_scales(tensors):
    """Scale of every module without stated alphas in diffusers up to 0.39: alpha is the first module's rank."""
    ranks = {key.split(".lora_B.")[0]: tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key}
    alpha = next(iter(ranks.values()))
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {name: alpha / pattern.get(name, common) for name in ranks}


def test_old_diffusers_scales_nothing(student, collection, tmp_path):
    assert set(old_diffusers_scales(load_file(collection)).values()) == {1.0}
    save_lora(student, tmp_path / "mixed", "peft")
    mixed = old_diffusers_scales(load_file(tmp_path / "mixed" / "adapter_model.safetensors"))
    assert set(mixed.values()) != {1.0}, "the rule that a uniform rank is for"


def sglang_modules(family, tensors):
    """The layers that sglang takes, by its rules for plain lora_A and lora_B; alpha is the rank where none is stated.

    Its FLUX models take the prefix ``transformer.``, Qwen-Image does not; ``diffusion_model.`` goes everywhere.
    """
    assert any(".lora_A" in key for key in tensors), "else it is taken for another format"
    names = [key.replace("diffusion_model.", "").replace(".weight", "") for key in tensors]
    if family != "QwenImageEditPlusPipeline":
        names = [re.sub(r"^transformer\.(\w*)\.(.*)$", r"\1.\2", name) for name in names]
    return {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}


def test_sglang_loads_every_key_of_a_collection(family, student, collection, tmp_path):
    """Of Qwen-Image it needs the names of ComfyUI, which `clora export` writes."""
    if family == "QwenImageEditPlusPipeline":
        assert not sglang_modules(family, load_file(collection)) & set(student.modules)
        convert_lora(collection, collection := tmp_path / "other.safetensors", "comfyui")
    assert sglang_modules(family, load_file(collection)) == set(student.modules)
    with safe_open(collection, "pt") as file:
        stated = {"lora_alpha", "network_alpha", "alpha", "lora_adapter_metadata"} & set(file.metadata())
    assert not stated, "it would be read as the alpha of every module"
