"""The model families whose layers have other names in LoRA files than in diffusers.

The original repositories of FLUX.1, FLUX.2 and Z-Image, and with them ComfyUI and kohya, fuse layers that diffusers
splits, and name them differently. A file's names are resolved against the layers that the transformer really has, so
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
        marks: modules of its diffusers class, outside the blocks, that together no other family has.
        originals: name in the original repository to the diffusers modules whose rows it stacks, in that order.
        others: diffusers modules that have no second name.
    """

    name: str
    marks: tuple[str, ...]
    originals: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...] = ()

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


def _double_blocks(mlp_in: str, mlp_out: str) -> dict[str, tuple[str, ...]]:
    """Returns the double blocks of FLUX.1 or FLUX.2, whose MLPs have other names in diffusers."""
    block = "double_blocks.N."
    own = "transformer_blocks.N."
    return {
        f"{block}img_attn.qkv": (f"{own}attn.to_q", f"{own}attn.to_k", f"{own}attn.to_v"),
        f"{block}img_attn.proj": (f"{own}attn.to_out.0",),
        f"{block}img_mlp.0": (f"{own}ff.{mlp_in}",),
        f"{block}img_mlp.2": (f"{own}ff.{mlp_out}",),
        f"{block}txt_attn.qkv": (f"{own}attn.add_q_proj", f"{own}attn.add_k_proj", f"{own}attn.add_v_proj"),
        f"{block}txt_attn.proj": (f"{own}attn.to_add_out",),
        f"{block}txt_mlp.0": (f"{own}ff_context.{mlp_in}",),
        f"{block}txt_mlp.2": (f"{own}ff_context.{mlp_out}",),
    }


def _embedder(original: str, own: str) -> dict[str, tuple[str, ...]]:
    return {f"{original}.in_layer": (f"{own}.linear_1",), f"{original}.out_layer": (f"{own}.linear_2",)}


_FLUX_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# Of what one original module produces, diffusers expects the halves the other way round.
_SWAPPED = {"norm_out.linear"}
_SINGLE = "single_transformer_blocks.N."

FLUX1 = Family(
    "FLUX.1",
    ("x_embedder", "time_text_embed.text_embedder.linear_1"),
    _FLUX_ENDS
    | _embedder("time_in", "time_text_embed.timestep_embedder")
    | _embedder("vector_in", "time_text_embed.text_embedder")
    | _embedder("guidance_in", "time_text_embed.guidance_embedder")
    | _double_blocks("net.0.proj", "net.2")
    | {
        "double_blocks.N.img_mod.lin": ("transformer_blocks.N.norm1.linear",),
        "double_blocks.N.txt_mod.lin": ("transformer_blocks.N.norm1_context.linear",),
        "single_blocks.N.linear1": tuple(
            _SINGLE + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        "single_blocks.N.linear2": (f"{_SINGLE}proj_out",),
        "single_blocks.N.modulation.lin": (f"{_SINGLE}norm.linear",),
    },
)

# linear1 and linear2 keep their inner order in diffusers, so each maps as a whole.
FLUX2 = Family(
    "FLUX.2",
    ("double_stream_modulation_img.linear",),
    _FLUX_ENDS
    | _embedder("time_in", "time_guidance_embed.timestep_embedder")
    | _embedder("guidance_in", "time_guidance_embed.guidance_embedder")
    | _double_blocks("linear_in", "linear_out")
    | {
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "single_blocks.N.linear1": (f"{_SINGLE}attn.to_qkv_mlp_proj",),
        "single_blocks.N.linear2": (f"{_SINGLE}attn.to_out",),
    },
)

_QWEN_ENDS = (
    "img_in",
    "norm_out.linear",
    "proj_out",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
_QWEN_BLOCK = ("mod.1", "mlp.net.0.proj", "mlp.net.2")

# The repository, ComfyUI and every trainer name its layers as diffusers does.
QWEN_IMAGE = Family(
    "Qwen-Image",
    ("img_in", "txt_in", "norm_out.linear"),
    {},
    (
        *_QWEN_ENDS,
        "txt_in",
        *(f"transformer_blocks.N.attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
        *(f"transformer_blocks.N.attn.add_{name}_proj" for name in "qkv"),
        *(f"transformer_blocks.N.img_{name}" for name in _QWEN_BLOCK),
        *(f"transformer_blocks.N.txt_{name}" for name in _QWEN_BLOCK),
    ),
)

QWEN_IMAGE21 = Family(
    "Qwen-Image-2.1",
    ("txt_in.in_layer", "modulation.1"),
    {},
    (
        *_QWEN_ENDS,
        "txt_in.in_layer",
        "txt_in.out_layer",
        "modulation.1",
        *(f"transformer_blocks.N.attn.to_{name}" for name in ("q", "k", "v", "out.0")),
        *(f"transformer_blocks.N.img_mlp.{name}" for name in ("proj", "gate_layer", "out")),
    ),
)


def _z_attention(block: str) -> dict[str, tuple[str, ...]]:
    own = f"{block}.attention."
    return {f"{own}qkv": (f"{own}to_q", f"{own}to_k", f"{own}to_v"), f"{own}out": (f"{own}to_out.0",)}


_Z_BLOCKS = ("layers.N", "noise_refiner.N", "context_refiner.N", "siglip_refiner.N")

Z_IMAGE = Family(
    "Z-Image",
    ("cap_embedder.1", "t_embedder.mlp.0", "all_x_embedder.2-1"),
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    | _z_attention("layers.N")
    | _z_attention("noise_refiner.N")
    | _z_attention("context_refiner.N")
    | _z_attention("siglip_refiner.N"),
    (
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "siglip_embedder.1",
        "layers.N.adaLN_modulation.0",
        "noise_refiner.N.adaLN_modulation.0",
        *(f"{block}.feed_forward.w1" for block in _Z_BLOCKS),
        *(f"{block}.feed_forward.w2" for block in _Z_BLOCKS),
        *(f"{block}.feed_forward.w3" for block in _Z_BLOCKS),
    ),
)

# FLUX.1's layers with another time embedding. It was released in diffusers' layout; no other naming exists.
LONGCAT_IMAGE = Family(
    "LongCat-Image",
    ("x_embedder", "time_embed.timestep_embedder.linear_1"),
    {},
    (
        "time_embed.timestep_embedder.linear_1",
        "time_embed.timestep_embedder.linear_2",
        *sorted(name for name in FLUX1.diffusers_names() if not name.startswith("time_text_embed")),
    ),
)

FAMILIES = (QWEN_IMAGE, QWEN_IMAGE21, FLUX1, FLUX2, Z_IMAGE, LONGCAT_IMAGE)


def family_of(modules: Iterable[str]) -> Family | None:
    """Returns the family of a transformer with these modules; None where clora has no table of its names."""
    modules = set(modules)
    return next((family for family in FAMILIES if modules.issuperset(family.marks)), None)


def families_with(names: Iterable[str]) -> list[str]:
    """Returns the families that have every one of these names, in diffusers' or the original naming, in any spelling.

    Args:
        names: module names as in a file, dotted or underscored, without the format's prefix.
    """
    names = list(names)
    found = []
    for family in FAMILIES:
        known = sorted(family.diffusers_names() | set(family.originals))
        # As escaped, "blocks.N.x" is "blocks\.N\.x"; it becomes "blocks[._]\d+[._]x".
        pattern = re.compile(
            "|".join(re.escape(name).replace(r"\.", "[._]").replace("]N[", r"]\d+[") for name in known)
        )
        if names and all(map(pattern.fullmatch, names)):
            found.append(family.name)
    return found


def is_original_only(name: str) -> bool:
    """Returns True for a dotted name that original repositories have and no diffusers class has."""
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
            if all(other in shapes for other in part.modules):
                stops = accumulate(shapes[other][0] for other in part.modules)
                table[part.name] = tuple(
                    Route(other, stop - shapes[other][0], stop, part.swap_halves)
                    for other, stop in zip(part.modules, stops, strict=True)
                )
    # The transformer's own names win over an original name that happens to be spelled alike.
    table |= {module: (Route(module, 0, out),) for module, (out, _) in shapes.items()}
    return {name.replace(".", "_"): route for name, route in table.items()} | table


def _general(module: str) -> tuple[str, str]:
    """Returns a module's name with N for its block, and the block's number, empty outside the blocks."""
    match = re.match(r"(\w+\.)(\d+)(\..+)", module)
    return (module, "") if match is None else (f"{match[1]}N{match[3]}", match[2])
