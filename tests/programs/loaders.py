"""The loaders of other programs, run where a copy of the program is given; nothing of them is restated here.

Only the modules that read LoRAs are imported, since whole packages need GPUs and much that is not installed.
"""

from __future__ import annotations

import importlib
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file


def program(variable, packages, stubs=()):
    """Makes a program's modules importable without running the ``__init__`` of its packages.

    Args:
        variable: environment variable with the folder of its unpacked wheel or checkout.
        packages: names of packages whose modules are wanted.
        stubs: pairs of a module's name and one of its attributes, which is never used.
    """
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no copy of the program")
    sys.path.insert(0, root)
    for name in packages:
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package
    for name, attribute in stubs:
        stub = types.ModuleType(name)
        setattr(stub, attribute, object)
        sys.modules[name] = stub


def diffsynth_model(family):
    """DiffSynth's class of a family with its own sizes, on a device without memory."""
    program("CLORA_DIFFSYNTH", ["diffsynth", "diffsynth.utils", "diffsynth.models", "diffsynth.core"])
    module, name = {
        "FLUX.2": ("flux2_dit", "Flux2DiT"),
        "Qwen-Image": ("qwen_image_dit", "QwenImageDiT"),
        "Qwen-Image-2.1": ("qwen_image_21_dit", "QwenImage21DiT"),
        "Z-Image": ("z_image_dit", "ZImageDiT"),
        "FLUX.1": ("flux_dit", "FluxDiT"),
    }[family]
    kind = getattr(importlib.import_module(f"diffsynth.models.{module}"), name)
    sizes = {"Z-Image": {"siglip_feat_dim": 10}}
    with torch.device("meta"):
        return kind(**sizes.get(family, {}))


def diffsynth_names(family, path):
    """The layers that a file names as DiffSynth reads it, and those of them that its model has."""
    model = diffsynth_model(family)
    lora = "diffsynth.utils.lora"
    kind = (
        importlib.import_module(f"{lora}.flux").FluxLoRALoader
        if family == "FLUX.1"
        else importlib.import_module(f"{lora}.general").GeneralLoRALoader
    )
    read = kind().convert_state_dict(load_file(path))
    stated = {key.removesuffix(".lora_B.weight") for key in read if key.endswith(".lora_B.weight")}
    return stated, stated & {name for name, _ in model.named_modules()}


def sglang_names(family, path):
    """The layers that sglang files a LoRA under, and those where it files the base's weights of these names."""
    gen = "sglang.multimodal_gen"
    inner = ["runtime", "runtime.pipelines_core", "runtime.pipelines_core.lora", "runtime.loader", "runtime.layers"]
    inner += ["configs", "configs.models", "configs.models.dits"]
    packages = ["sglang", gen, *(f"{gen}.{name}" for name in inner)]
    program("CLORA_SGLANG", packages, [(f"{gen}.runtime.layers.quantization", "QuantizationConfig")])
    module, name = {
        "FLUX.1": ("flux", "FluxConfig"),
        "FLUX.2": ("flux", "FluxConfig"),
        "Qwen-Image": ("qwenimage", "QwenImageDitConfig"),
        "Qwen-Image-2.1": ("qwenimage21", "QwenImage21DitConfig"),
        "Z-Image": ("zimage", "ZImageDitConfig"),
        "LongCat-Image": ("longcat_image", "LongCatImageDitConfig"),
    }[family]
    config = getattr(importlib.import_module(f"{gen}.configs.models.dits.{module}"), name)().arch_config
    mapping = importlib.import_module(f"{gen}.runtime.loader.utils").get_param_names_mapping
    lora_name, base_name = mapping(config.lora_param_names_mapping), mapping(config.param_names_mapping)
    normalize = importlib.import_module(f"{gen}.runtime.pipelines_core.lora.format_adapter").normalize_lora_state_dict
    found = {}
    for key in normalize(load_file(path)):
        if key.endswith((".lora_A.weight", ".lora_B.weight")):
            name, index, _ = base_name(lora_name(key.replace("diffusion_model.", "").removesuffix(".weight"))[0])
            found.setdefault((name.rpartition(".")[0], index), []).append(name)
    base = lambda layer: base_name(f"{layer}.weight")  # noqa: E731
    return set(found), lambda layer: (base(layer)[0].removesuffix(".weight"), base(layer)[1])
