"""The model families whose layers have other names in LoRA files than in diffusers.

The original repositories of FLUX.1, FLUX.2 and Z-Image, and with them ComfyUI and kohya, fuse layers that diffusers
splits, and name them differently. ComfyUI does so with LongCat-Image (FLUX.1's names) and Qwen-Image-2.1 too. A file's names are resolved against the layers that the transformer really has, so
that kohya's underscores are never guessed. Which table applies follows from layers that only one family has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from clora.lora.layers import LayerShapes


@dataclass(frozen=True)
class Family:
    """The names of one family's linear layers; N stands for the number of a block.

    Attributes:
        name: as people call it.
        pipelines: how the names of its pipelines' classes begin.
        marks: modules of its diffusers class, outside the blocks, that together no other family has.
        originals: name in the original repository to the diffusers modules whose rows it stacks, in that order.
        others: diffusers modules that have no second name.
        unknown_to_comfyui: how the names of modules begin that ComfyUI does not know by diffusers' names. A file for it
            needs the original ones.
    """

    name: str
    pipelines: str
    marks: tuple[str, ...]
    originals: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...] = ()
    unknown_to_comfyui: tuple[str, ...] = ()

    def diffusers_names(self) -> set[str]:
        """Returns the general names of its modules in diffusers."""
        return set(self.others).union(*self.originals.values())


@dataclass(frozen=True)
class Route:
    """The rows of a file's module that belong to one module of the transformer.

    Attributes:
        module: the transformer's module.
        start: its first row in the file's module.
        stop: the row after its last.
        swap_halves: the halves of the rows stand the other way round. The original final layer produces
            (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    """

    module: str
    start: int
    stop: int
    swap_halves: bool = False


@dataclass(frozen=True)
class Part:
    """The place of a module of the transformer in its family's original naming.

    Attributes:
        name: the original module.
        modules: the diffusers modules whose rows that one stacks, in that order.
        swap_halves: as in `Route`.
    """

    name: str
    modules: tuple[str, ...]
    swap_halves: bool = False


def _names(start: str, names: str) -> tuple[str, ...]:
    return tuple(start + name for name in names.split())


def _originals(original: str, own: str, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns entries of `Family.originals` whose names all begin alike in either naming."""
    return {original + name: _names(own, modules) for name, modules in names.items()}


def _flux_double_blocks(mlp_in: str, mlp_out: str) -> dict[str, tuple[str, ...]]:
    """Returns the double blocks of FLUX.1 or FLUX.2, whose MLPs have different names in diffusers."""
    names = {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": f"ff.{mlp_in}",
        "img_mlp.2": f"ff.{mlp_out}",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": f"ff_context.{mlp_in}",
        "txt_mlp.2": f"ff_context.{mlp_out}",
    }
    return _originals("double_blocks.N.", "transformer_blocks.N.", names)


_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
_FLUX_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# Of the outputs of this one, diffusers expects the halves the other way round.
_SWAPPED = {"norm_out.linear"}

_FLUX1_BLOCKS = _flux_double_blocks("net.0.proj", "net.2") | {
    "double_blocks.N.img_mod.lin": ("transformer_blocks.N.norm1.linear",),
    "double_blocks.N.txt_mod.lin": ("transformer_blocks.N.norm1_context.linear",),
    "single_blocks.N.linear1": _names("single_transformer_blocks.N.", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    "single_blocks.N.linear2": ("single_transformer_blocks.N.proj_out",),
    "single_blocks.N.modulation.lin": ("single_transformer_blocks.N.norm.linear",),
}

FLUX1 = Family(
    "FLUX.1",
    "Flux",
    ("x_embedder", "time_text_embed.text_embedder.linear_1"),
    _FLUX_ENDS
    | _originals("time_in.", "time_text_embed.timestep_embedder.", _EMBEDDER)
    | _originals("vector_in.", "time_text_embed.text_embedder.", _EMBEDDER)
    | _originals("guidance_in.", "time_text_embed.guidance_embedder.", _EMBEDDER)
    | _FLUX1_BLOCKS,
)

FLUX2 = Family(
    "FLUX.2",
    "Flux2",
    ("double_stream_modulation_img.linear",),
    _FLUX_ENDS
    | _originals("time_in.", "time_guidance_embed.timestep_embedder.", _EMBEDDER)
    | _originals("guidance_in.", "time_guidance_embed.guidance_embedder.", _EMBEDDER)
    | _flux_double_blocks("linear_in", "linear_out")
    | {
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        # Both keep their inner order in diffusers, so each maps as a whole.
        "single_blocks.N.linear1": ("single_transformer_blocks.N.attn.to_qkv_mlp_proj",),
        "single_blocks.N.linear2": ("single_transformer_blocks.N.attn.to_out",),
    },
    unknown_to_comfyui=("time_guidance_embed.", "double_stream_modulation_", "single_stream_modulation."),
)

# The repositories, ComfyUI and every trainer name Qwen-Image's layers as diffusers does. Of Qwen-Image-2.1, ComfyUI fuses
# two layers of the MLP.
_QWEN_ENDS = _names("", "img_in norm_out.linear proj_out") + _names(
    "time_text_embed.timestep_embedder.", "linear_1 linear_2"
)

QWEN_IMAGE = Family(
    "Qwen-Image",
    "QwenImage",
    ("img_in", "txt_in", "norm_out.linear"),
    {},
    (
        "txt_in",
        *_QWEN_ENDS,
        *_names("transformer_blocks.N.attn.", "to_q to_k to_v to_out.0 to_add_out add_q_proj add_k_proj add_v_proj"),
        *_names("transformer_blocks.N.", "img_mod.1 img_mlp.net.0.proj img_mlp.net.2"),
        *_names("transformer_blocks.N.", "txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2"),
    ),
)

QWEN_IMAGE21 = Family(
    "Qwen-Image-2.1",
    "QwenImage21",
    ("txt_in.in_layer", "modulation.1"),
    {"transformer_blocks.N.img_mlp.gate_up": _names("transformer_blocks.N.img_mlp.", "gate_layer proj")},
    (
        "modulation.1",
        *_QWEN_ENDS,
        *_names("txt_in.", "in_layer out_layer"),
        *_names("transformer_blocks.N.attn.", "to_q to_k to_v to_out.0"),
        "transformer_blocks.N.img_mlp.out",
    ),
)

_Z_ATTENTION = {"qkv": "to_q to_k to_v", "out": "to_out.0"}
_Z_MLP = "feed_forward.w1 feed_forward.w2 feed_forward.w3"

Z_IMAGE = Family(
    "Z-Image",
    "ZImage",
    ("cap_embedder.1", "t_embedder.mlp.0", "all_x_embedder.2-1"),
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    | _originals("layers.N.attention.", "layers.N.attention.", _Z_ATTENTION)
    | _originals("noise_refiner.N.attention.", "noise_refiner.N.attention.", _Z_ATTENTION)
    | _originals("context_refiner.N.attention.", "context_refiner.N.attention.", _Z_ATTENTION)
    | _originals("siglip_refiner.N.attention.", "siglip_refiner.N.attention.", _Z_ATTENTION),
    (
        *_names("", "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.1 siglip_embedder.1"),
        *_names("layers.N.", f"adaLN_modulation.0 {_Z_MLP}"),
        *_names("noise_refiner.N.", f"adaLN_modulation.0 {_Z_MLP}"),
        *_names("context_refiner.N.", _Z_MLP),
        *_names("siglip_refiner.N.", _Z_MLP),
    ),
    unknown_to_comfyui=("siglip_",),
)

# FLUX.1's layers with another time embedding. It was released in diffusers' layout; ComfyUI gives it FLUX.1's names.
LONGCAT_IMAGE = Family(
    "LongCat-Image",
    "LongCatImage",
    ("x_embedder", "time_embed.timestep_embedder.linear_1"),
    _FLUX_ENDS | _originals("time_in.", "time_embed.timestep_embedder.", _EMBEDDER) | _FLUX1_BLOCKS,
    unknown_to_comfyui=("time_embed.",),
)

FAMILIES = (QWEN_IMAGE, QWEN_IMAGE21, FLUX1, FLUX2, Z_IMAGE, LONGCAT_IMAGE)


def family_of(modules: Iterable[str]) -> Family | None:
    """Returns the family of a transformer with these modules; None where clora has no table of its names."""
    modules = set(modules)
    return next((family for family in FAMILIES if modules.issuperset(family.marks)), None)


def family_of_pipeline(name: str) -> Family | None:
    """Returns the family of a pipeline's class, by the longest beginning that fits its name."""
    fitting = [family for family in FAMILIES if name.startswith(family.pipelines)]
    return max(fitting, key=lambda family: len(family.pipelines), default=None)


def families_with(names: Iterable[str]) -> list[Family]:
    """Returns the families that have every one of these names, in diffusers' or the original naming, in any spelling.

    Args:
        names: module names as in a file, dotted or underscored, without the format's prefix.
    """
    names = list(names)
    found = []
    for family in FAMILIES:
        known = sorted(family.diffusers_names() | set(family.originals))
        # Underscores for dots cannot be undone, so each name is matched in all its spellings.
        # As escaped, "blocks.N.x" is "blocks\.N\.x"; it becomes "blocks[._]\d+[._]x".
        pattern = re.compile(
            "|".join(re.escape(name).replace(r"\.", "[._]").replace("]N[", r"]\d+[") for name in known)
        )
        if names and all(map(pattern.fullmatch, names)):
            found.append(family)
    return found


def is_original_only(name: str) -> bool:
    """Returns True for a dotted name that original repositories or ComfyUI have and no diffusers class has."""
    general, _ = _general(name)
    in_diffusers = any(general in family.diffusers_names() for family in FAMILIES)
    return not in_diffusers and any(general in family.originals for family in FAMILIES)


def original_part(module: str, family: Family) -> Part:
    """Returns the place of a diffusers module in the original naming; its own name where that has none for it."""
    general, number = _general(module)
    for name, parts in family.originals.items():
        if general in parts:
            modules = tuple(part.replace(".N.", f".{number}.") for part in parts)
            return Part(name.replace(".N.", f".{number}."), modules, general in _SWAPPED)
    return Part(module, (module,))


def reordered(rows: Tensor, swap_halves: bool) -> Tensor:
    """Returns rows ``[out, ...]`` in the other naming's order (see `Route`)."""
    return torch.cat(rows.chunk(2)[::-1]) if swap_halves else rows


def routes(shapes: LayerShapes) -> dict[str, tuple[Route, ...]]:
    """Returns every spelling under which a file may name a transformer's modules.

    Args:
        shapes: of all of its linear layers.

    Returns:
        Name without format prefix (diffusers or original naming, with dots or kohya's underscores) to the rows of each
        module that it stands for; a fused name stands for several.
    """
    table: dict[str, tuple[Route, ...]] = {}
    family = family_of(shapes)
    if family is not None:
        for module in shapes:
            part = original_part(module, family)
            # A fused name has no meaning for a model that lacks some of its parts.
            if all(other in shapes for other in part.modules):
                stops = accumulate(shapes[other][0] for other in part.modules)
                table[part.name] = tuple(
                    Route(other, stop - shapes[other][0], stop, part.swap_halves)
                    for other, stop in zip(part.modules, stops, strict=True)
                )
    # The transformer's own names win over an original name that happens to be spelled alike, and dotted names win over
    # underscored ones.
    table |= {module: (Route(module, 0, out),) for module, (out, _) in shapes.items()}
    return {name.replace(".", "_"): route for name, route in table.items()} | table


def _general(module: str) -> tuple[str, str]:
    """Returns a module's name with N for its block, and the block's number, empty outside the blocks."""
    # In every family, a number as the second of three or more parts is that of a block.
    match = re.match(r"(\w+\.)(\d+)(\..+)", module)
    return (module, "") if match is None else (f"{match[1]}N{match[3]}", match[2])
