"""The only place that knows foreign LoRA key names.

A key is ``<prefix><module>.<side>``. The prefix tells the format:

=============  ====================  =========================================================
format         prefix                written by
=============  ====================  =========================================================
``diffusers``  ``transformer.``      diffusers; alpha in ``lora_adapter_metadata``
``peft``       ``base_model.model.`` PEFT; alpha in ``adapter_config.json``
``comfyui``    ``diffusion_model.``  ai-toolkit, ComfyUI; alpha = rank
``kohya``      ``lora_unet_``        sd-scripts, musubi-tuner; dots become underscores
``bare``       none                  Lightning (``.alpha`` tensors), DiffSynth (``.default.``)
=============  ====================  =========================================================

The module is named as in diffusers or, for FLUX.2, as in the original repository, which fuses q, k and v. Either is
resolved against the modules that the target really has, so that underscores are never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clora.errors import CloraError

PREFIXES = {
    "transformer.": "diffusers",
    "base_model.model.": "peft",
    "diffusion_model.": "comfyui",
    "lora_unet_": "kohya",
}

_KEY = re.compile(
    r"(?P<stem>.+)\.(?:(?P<matrix>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_SIDES = {"lora_down": "lora_A", "lora_up": "lora_B"}

_UNSUPPORTED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr": re.compile(r"\blokr_"),
    "LoHa": re.compile(r"\bhada_"),
    "a full weight difference (.diff)": re.compile(r"\.diff(_b)?$"),
}

# FLUX.2 module in diffusers -> (name in the original repository, which of how many equal row blocks it is there).
# N is the block number. linear1 and linear_in keep their inner order in diffusers, so they map whole.
_ORIGINAL_FLUX2 = {
    "x_embedder": ("img_in", 0, 1),
    "context_embedder": ("txt_in", 0, 1),
    "time_guidance_embed.timestep_embedder.linear_1": ("time_in.in_layer", 0, 1),
    "time_guidance_embed.timestep_embedder.linear_2": ("time_in.out_layer", 0, 1),
    "time_guidance_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", 0, 1),
    "time_guidance_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", 0, 1),
    "double_stream_modulation_img.linear": ("double_stream_modulation_img.lin", 0, 1),
    "double_stream_modulation_txt.linear": ("double_stream_modulation_txt.lin", 0, 1),
    "single_stream_modulation.linear": ("single_stream_modulation.lin", 0, 1),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 1),
    "proj_out": ("final_layer.linear", 0, 1),
    "transformer_blocks.N.attn.to_q": ("double_blocks.N.img_attn.qkv", 0, 3),
    "transformer_blocks.N.attn.to_k": ("double_blocks.N.img_attn.qkv", 1, 3),
    "transformer_blocks.N.attn.to_v": ("double_blocks.N.img_attn.qkv", 2, 3),
    "transformer_blocks.N.attn.to_out.0": ("double_blocks.N.img_attn.proj", 0, 1),
    "transformer_blocks.N.attn.add_q_proj": ("double_blocks.N.txt_attn.qkv", 0, 3),
    "transformer_blocks.N.attn.add_k_proj": ("double_blocks.N.txt_attn.qkv", 1, 3),
    "transformer_blocks.N.attn.add_v_proj": ("double_blocks.N.txt_attn.qkv", 2, 3),
    "transformer_blocks.N.attn.to_add_out": ("double_blocks.N.txt_attn.proj", 0, 1),
    "transformer_blocks.N.ff.linear_in": ("double_blocks.N.img_mlp.0", 0, 1),
    "transformer_blocks.N.ff.linear_out": ("double_blocks.N.img_mlp.2", 0, 1),
    "transformer_blocks.N.ff_context.linear_in": ("double_blocks.N.txt_mlp.0", 0, 1),
    "transformer_blocks.N.ff_context.linear_out": ("double_blocks.N.txt_mlp.2", 0, 1),
    "single_transformer_blocks.N.attn.to_qkv_mlp_proj": ("single_blocks.N.linear1", 0, 1),
    "single_transformer_blocks.N.attn.to_out": ("single_blocks.N.linear2", 0, 1),
}

_FLUX2_NAME = re.compile(
    "|".join(
        re.escape(name).replace(r"\.", "[._]").replace("]N[", r"]\d+[")
        for name in sorted(set(_ORIGINAL_FLUX2) | {original for original, _, _ in _ORIGINAL_FLUX2.values()})
    )
)


@dataclass(frozen=True)
class Route:
    """How one module of a file relates to one module of the transformer.

    Attributes:
        module: the other side's module name.
        part: which of `parts` equal row blocks of the file's ``lora_B`` this is.
        parts: number of row blocks that the file's module fuses.
        swap_halves: the halves of the rows stand the other way round. The original final layer produces
            (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    """

    module: str
    part: int = 0
    parts: int = 1
    swap_halves: bool = False


@dataclass(frozen=True)
class FileKeys:
    """The tensor names of a LoRA file, sorted out.

    Attributes:
        format: one of the formats above, or ``mixed``.
        modules: module name as in the file, prefix included, to its keys: ``{"lora_A" | "lora_B" | "alpha": key}``.
        unknown: keys that are no LoRA tensors.
        unsupported: adapter type that clora cannot read to the first key that shows it.
    """

    format: str
    modules: Mapping[str, Mapping[str, str]]
    unknown: tuple[str, ...]
    unsupported: Mapping[str, str]


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha as PEFT states them beside the weights; everything may be absent."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> AdapterConfig:
        """Reads the fields of ``adapter_config.json`` or of diffusers' ``lora_adapter_metadata``.

        Args:
            values: the JSON object; diffusers' ``transformer.`` prefix is removed.
            where: file name for the error message.

        Raises:
            CloraError: another adapter type than plain LoRA, or a value of the wrong type.
        """
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
        kind = values.get("peft_type") or "LORA"
        if kind != "LORA" or values.get("use_dora"):
            kind = "DoRA" if kind == "LORA" else kind
            raise CloraError(f"{where} describes {kind}, which is not supported yet; expected a plain LoRA")
        try:
            return cls(
                rank=None if values.get("r") is None else int(values["r"]),
                alpha=None if values.get("lora_alpha") is None else _finite(values["lora_alpha"]),
                rank_pattern={key: int(value) for key, value in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={key: _finite(value) for key, value in (values.get("alpha_pattern") or {}).items()},
                use_rslora=bool(values.get("use_rslora")),
            )
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CloraError(f"{where}: r, lora_alpha and their patterns must be numbers ({error})") from error

    def module_rank(self, module: str) -> int | None:
        """The stated rank of a module, None where the config is silent."""
        return _match_pattern(self.rank_pattern, module, self.rank)

    def module_alpha(self, module: str) -> float | None:
        """The stated alpha of a module, None where the config is silent."""
        return _match_pattern(self.alpha_pattern, module, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """The factor on ``lora_B @ lora_A``: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {number}")
    return number


def _match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is, as a regular expression, the module's name or a dotted tail of it."""
    for key, value in pattern.items():
        try:
            if key == module or re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as error:
            raise CloraError(f"adapter config: {key!r} is no valid module pattern ({error})") from error
    return default


def sort_keys(keys: Iterable[str]) -> FileKeys:
    """Groups the tensor names of a file by module and names its format."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    unsupported: dict[str, str] = {}
    for key in sorted(keys):
        kind = next((kind for kind, pattern in _UNSUPPORTED.items() if pattern.search(key)), None)
        if kind is not None:
            unsupported.setdefault(kind, key)
        elif match := _KEY.fullmatch(key):
            side = match["alpha"] or _SIDES.get(match["matrix"], match["matrix"])
            modules.setdefault(match["stem"], {})[side] = key
        else:
            unknown.append(key)
    formats = {split_prefix(stem)[0] for stem in modules}
    return FileKeys(formats.pop() if len(formats) == 1 else "mixed", modules, tuple(unknown), unsupported)


def split_prefix(stem: str) -> tuple[str, str]:
    """Splits a module name as in a file into (format, name without the format's prefix)."""
    for prefix, format_name in PREFIXES.items():
        if stem.startswith(prefix):
            return format_name, stem.removeprefix(prefix)
    return "bare", stem


def has_flux2_name(stem: str) -> bool:
    """Whether a module name as in a file is one of FLUX.2's, in diffusers' or the original naming."""
    return _FLUX2_NAME.fullmatch(split_prefix(stem)[1]) is not None


def original_route(module: str) -> Route:
    """Where a diffusers module stands in the original FLUX.2 naming; itself where that naming has no such module."""
    number = re.search(r"\.(\d+)\.", module)
    general = module if number is None else module.replace(number[0], ".N.", 1)
    if general not in _ORIGINAL_FLUX2:
        return Route(module)
    name, part, parts = _ORIGINAL_FLUX2[general]
    name = name if number is None else name.replace(".N.", number[0])
    return Route(name, part, parts, swap_halves=general == "norm_out.linear")


def routes(target_modules: Iterable[str]) -> dict[str, tuple[Route, ...]]:
    """Every spelling under which a file may name the target's modules.

    Args:
        target_modules: module paths of the transformer's linear layers.

    Returns:
        name without format prefix (diffusers or original naming, with dots or kohya's underscores) to the modules it
        stands for; a fused name stands for several.
    """
    targets = list(target_modules)
    originals: dict[str, list[Route]] = {}
    for module in targets:
        there = original_route(module)
        here = Route(module, there.part, there.parts, there.swap_halves)
        originals.setdefault(there.module, []).append(here)
    table = {name: tuple(parts) for name, parts in originals.items() if len(parts) == parts[0].parts}
    # The target's own names win over an original name that happens to be spelled alike.
    table.update({module: (Route(module),) for module in targets})
    return {name.replace(".", "_"): route for name, route in table.items()} | table
