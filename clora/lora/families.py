"""The model families whose modules have other names in LoRA files than in diffusers.

The original repositories of FLUX.1, FLUX.2 and Z-Image, and with them ComfyUI and kohya, fuse layers that diffusers
splits, and name them differently. A file's names are resolved against the modules that the target really has, so that
kohya's underscores are never guessed; which table applies is told by modules that only one family has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


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
        """The general names of its modules in diffusers."""
        return {*self.others, *(module for parts in self.originals.values() for module in parts)}


@dataclass(frozen=True)
class Route:
    """Which rows of a file's module are one module of the transformer.

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
    """Where a module of the transformer stands in its family's original naming.

    Attributes:
        name: the original module.
        index: which of its `count` stacked parts this is.
        count: number of modules that diffusers splits it into.
        swap_halves: as in `Route`.
    """

    name: str
    index: int = 0
    count: int = 1
    swap_halves: bool = False


def _double_blocks(mlp_in: str, mlp_out: str) -> dict[str, tuple[str, ...]]:
    """The double blocks of FLUX, which differ in what diffusers calls the layers of their MLPs."""
    block, own = "double_blocks.N.", "transformer_blocks.N."
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
        "single_blocks.N.linear1": (
            f"{_SINGLE}attn.to_q",
            f"{_SINGLE}attn.to_k",
            f"{_SINGLE}attn.to_v",
            f"{_SINGLE}proj_mlp",
        ),
        "single_blocks.N.linear2": (f"{_SINGLE}proj_out",),
        "single_blocks.N.modulation.lin": (f"{_SINGLE}norm.linear",),
    },
)

# linear1 and linear2 keep their inner order in diffusers, so they map whole.
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

# The repository, ComfyUI and every trainer name its layers as diffusers does.
QWEN_IMAGE = Family(
    "Qwen-Image",
    ("img_in", "txt_in", "norm_out.linear"),
    {},
    (
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        *(f"transformer_blocks.N.attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
        *(f"transformer_blocks.N.attn.add_{name}_proj" for name in "qkv"),
        *(
            f"transformer_blocks.N.{side}_{name}"
            for side in ("img", "txt")
            for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
        ),
    ),
)

QWEN_IMAGE21 = Family(
    "Qwen-Image-2.1",
    ("txt_in.in_layer", "modulation.1"),
    {},
    (
        "img_in",
        "txt_in.in_layer",
        "txt_in.out_layer",
        "modulation.1",
        "norm_out.linear",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        *(f"transformer_blocks.N.attn.to_{name}" for name in ("q", "k", "v", "out.0")),
        *(f"transformer_blocks.N.img_mlp.{name}" for name in ("proj", "gate_layer", "out")),
    ),
)

_Z_MODULATED = ("layers.N", "noise_refiner.N")
_Z_BLOCKS = (*_Z_MODULATED, "context_refiner.N", "siglip_refiner.N")

Z_IMAGE = Family(
    "Z-Image",
    ("cap_embedder.1", "t_embedder.mlp.0", "all_x_embedder.2-1"),
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    | {f"{block}.attention.qkv": tuple(f"{block}.attention.to_{name}" for name in "qkv") for block in _Z_BLOCKS}
    | {f"{block}.attention.out": (f"{block}.attention.to_out.0",) for block in _Z_BLOCKS},
    (
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "siglip_embedder.1",
        *(f"{block}.adaLN_modulation.0" for block in _Z_MODULATED),
        *(f"{block}.feed_forward.{name}" for block in _Z_BLOCKS for name in ("w1", "w2", "w3")),
    ),
)

# FLUX.1's layers with another time embedding. It was released in diffusers' layout, there is no other naming.
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


def family_of(target_modules: Iterable[str]) -> Family | None:
    """The family of a transformer, told by its own modules; None where clora has no table of its names."""
    modules = set(target_modules)
    return next((family for family in FAMILIES if modules.issuperset(family.marks)), None)


def families_with(names: Iterable[str]) -> list[str]:
    """The families that know every one of these names, in diffusers' or the original naming, dotted or underscored.

    Args:
        names: module names as in a file, without the format's prefix.
    """
    names = list(names)
    return [family.name for family in FAMILIES if names and all(map(_any_name(family).fullmatch, names))]


def is_original_only(name: str) -> bool:
    """Whether a dotted name is that of a module in an original repository, and of none in diffusers."""
    general = _general(name)[0]
    return any(general in family.originals for family in FAMILIES) and not any(
        general in family.diffusers_names() for family in FAMILIES
    )


def original_part(module: str, family: Family) -> Part:
    """Where a diffusers module stands in the original naming; itself where that naming has no such module."""
    general, number = _general(module)
    for name, parts in family.originals.items():
        if general in parts:
            return Part(name.replace(".N.", f".{number}."), parts.index(general), len(parts), general in _SWAPPED)
    return Part(module)


def original_parts(module: str, family: Family) -> tuple[str, ...]:
    """The diffusers modules that are one module in the original naming with this one, in the order of its rows."""
    general, number = _general(module)
    found = next((parts for parts in family.originals.values() if general in parts), (module,))
    return tuple(part.replace(".N.", f".{number}.") for part in found)


def routes(target_modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Route, ...]]:
    """Every spelling under which a file may name the target's modules.

    Args:
        target_modules: module path to (out_features, in_features) of all of the transformer's linear layers.

    Returns:
        name without format prefix (diffusers or original naming, with dots or kohya's underscores) to the rows of each
        module that it stands for; a fused name stands for several.
    """
    family = family_of(target_modules)
    table = {} if family is None else _original_routes(family, target_modules)
    # The target's own names win over an original name that happens to be spelled alike.
    table |= {module: (Route(module, 0, out),) for module, (out, _) in target_modules.items()}
    return {name.replace(".", "_"): route for name, route in table.items()} | table


def _original_routes(family: Family, target_modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Route, ...]]:
    table = {}
    for name, parts in family.originals.items():
        for number in _block_numbers(parts[0], target_modules):
            modules = [part.replace(".N.", f".{number}.") for part in parts]
            if all(module in target_modules for module in modules):
                table[name.replace(".N.", f".{number}.")] = _stacked(modules, target_modules)
    return table


def _block_numbers(general: str, target_modules: Iterable[str]) -> list[str]:
    """The numbers of the blocks that have this module; one empty string for a module outside the blocks."""
    return [number for found, number in map(_general, target_modules) if found == general]


def _stacked(modules: list[str], target_modules: Mapping[str, tuple[int, int]]) -> tuple[Route, ...]:
    found, start = [], 0
    for module in modules:
        stop = start + target_modules[module][0]
        found.append(Route(module, start, stop, module in _SWAPPED))
        start = stop
    return tuple(found)


def _general(module: str) -> tuple[str, str]:
    """A module's name with N for its block, and the block's number; the number is empty outside the blocks."""
    match = re.match(r"(\w+\.)(\d+)(\..+)", module)
    return (module, "") if match is None else (f"{match[1]}N{match[3]}", match[2])


def _any_name(family: Family) -> re.Pattern[str]:
    names = sorted(family.diffusers_names() | set(family.originals))
    return re.compile("|".join(re.escape(name).replace(r"\.", "[._]").replace("]N[", r"]\d+[") for name in names))
