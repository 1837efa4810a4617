"""Shapes and weights of a transformer's linear layers, which a LoRA may change.

The transformer is in memory or in a saved pipeline, of which the config is enough for the shapes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clora.errors import CloraError
from clora.files import read_text, user_path

PROJECTIONS = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
"""Layers of an attention that diffusers can fuse."""
LayerShapes = Mapping[str, tuple[int, int]]
"""Path of a linear layer in the diffusers transformer (``transformer_blocks.0.attn.to_q``) to (out, in)."""


def transformer_of(pipeline_or_transformer: Any) -> nn.Module:
    """Returns the transformer of a diffusers pipeline, or the transformer itself, ready for `linear_shapes`.

    Raises:
        CloraError: it is neither of them, or LoRAs stand in the place of its layers.
    """
    found = pipeline_or_transformer
    transformer = found if isinstance(found, nn.Module) else getattr(found, "transformer", None)
    transformer = uncompiled(transformer)
    if not isinstance(transformer, nn.Module):
        raise CloraError(
            f"expected a diffusers pipeline or its transformer, found {type(found).__name__}; load one with "
            "DiffusionPipeline.from_pretrained"
        )
    # PEFT (and diffusers with it) and `clora.attach` put their own layers around the linear ones, with these attributes.
    # They stay there when adapters are fused, disabled or deleted, until the LoRAs are unloaded; what was fused stays merged.
    for name, layer in transformer.named_modules():
        if hasattr(layer, "adapter_layer_names") or hasattr(layer, "routed_layer"):
            raise CloraError(
                f"the transformer has LoRAs loaded ({name}); call pipe.unload_lora_weights(), unload_lora() of a "
                "transformer whose pipeline has no such method, or detach() of what clora.attach returned, first"
            )
    return transformer


def uncompiled(transformer: Any) -> Any:
    """Returns the module inside what torch.compile returned, whose layers have their own names; any other as it is."""
    return getattr(transformer, "_orig_mod", transformer)


def check_called(transformer: nn.Module, names: Iterable[str]) -> None:
    """Refuses layers that stand beside a fused projection: they are still there, but no pass calls them.

    Args:
        transformer: a diffusers transformer.
        names: the layers that LoRAs change; those that it lacks are passed over.

    Raises:
        CloraError: an attention computes several of them by one fused layer.
    """
    modules = dict(transformer.named_modules())
    for name in names:
        parent, _, own = name.rpartition(".")
        # Set by diffusers' fuse_qkv_projections(), and by its loading of LoRAs that were trained on fused projections.
        if own in PROJECTIONS and getattr(modules.get(parent), "fused_projections", False):
            raise CloraError(
                f"{name} is fused with other projections and no longer called, so that a LoRA of it would do nothing; call "
                "unfuse_qkv_projections() of the transformer first"
            )


def linear_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the `LayerShapes` of a plain diffusers transformer, before adapters are put into it."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear)
    }


def shapes_beneath(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the `LayerShapes` of a transformer that may carry PEFT's adapters: those of the layers beneath them."""
    layers = {}
    for name, shape in linear_shapes(transformer).items():
        if ".lora_A." not in name and ".lora_B." not in name:
            layers[name.removesuffix(".base_layer")] = shape
    return layers


def block_layers(transformer: nn.Module) -> list[str]:
    """Returns the linear layers inside the transformer's blocks, which a LoRA changes by default, in module order.

    Blocks are the modules that diffusers calls the transformer's repeated blocks, whatever attributes hold them.
    """
    repeated = transformer._repeated_blocks
    blocks = tuple(f"{name}." for name, module in transformer.named_modules() if type(module).__name__ in repeated)
    return [name for name in linear_shapes(transformer) if name.startswith(blocks)]


def linear_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Returns the weight ``[out, in]`` of each layer of `linear_shapes`; nothing is copied."""
    return {name: layer.weight for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}


def pipeline_shapes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Returns the `LayerShapes` of a pipeline folder's transformer, read only from its config.

    Raises:
        CloraError: no folder of a diffusers pipeline with a transformer.
    """
    file = user_path(folder) / "transformer" / "config.json"
    try:
        config = json.loads(read_text(file, "a transformer's config"))
        kind = getattr(importlib.import_module("diffusers"), config["_class_name"])
        # Without memory for the weights: a transformer of 20 billion parameters has its shapes at once.
        with torch.device("meta"):
            return linear_shapes(kind.from_config(config))
    except Exception as error:  # a class made from a damaged config raises whatever it meets
        message = f"{folder} is not a diffusers pipeline with a transformer ({file}: {error})"
        raise CloraError(f"{message}; expected a folder as save_pretrained writes it") from error


def pipeline_weights(folder: str | Path) -> dict[str, Tensor] | None:
    """Returns the weights of a pipeline folder's transformer by layer; None where none are stored.

    Raises:
        CloraError: a file of them that cannot be read.
    """
    # Sorted, so that the plain file comes after its variants (diffusion_pytorch_model.fp16.safetensors) and is taken.
    files = sorted((user_path(folder) / "transformer").glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            # Mapped into memory, so that only the layers that are used are read.
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CloraError(f"{file} is not a readable safetensors file: {error}") from error
        weights |= {key.removesuffix(".weight"): tensor for key, tensor in tensors.items() if key.endswith(".weight")}
    return weights if files else None
