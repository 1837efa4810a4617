"""Writes LoRA files; none is ever left half-written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clora.errors import CloraError, nearest
from clora.files import replacing, write_atomic
from clora.hashing import tensor_digest
from clora.lora.adapter_config import METADATA_KEY, PEFT_CONFIG, PEFT_WEIGHTS
from clora.lora.families import Family, Part, original_part, reordered
from clora.lora.keys import PREFIXES, UNDERSCORED
from clora.lora.layers import LayerShapes
from clora.lora.state import LoRAModule, LoRAState

FORMATS = ("diffusers", "peft", "kohya", "comfyui", "bare")
_PREFIX = {format_name: prefix for prefix, format_name in PREFIXES.items()} | {"bare": ""}
NAME_THE_MODEL = "name the LoRA's base model with --pipeline FOLDER (its transformer/config.json is enough)"
_WIDE_PART = ".proj_mlp"  # fused with q, k and v in FLUX.1's single blocks, with more rows than they have


def save_lora(
    state: LoRAState,
    path: str | Path,
    format: str = "diffusers",
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    family: Family | None = None,
    shapes: LayerShapes | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA in one of five formats.

    ``diffusers`` is read alike by diffusers (any version), ComfyUI and, for FLUX, sglang. Its modules are zero-padded to
    the largest rank and have alpha = rank unstated: diffusers up to 0.39 mis-scales mixed ranks, and several loaders lose
    stated alphas. In the other formats ranks may differ. ``comfyui`` (ai-toolkit's too) states no alpha either, nor does ``bare``:
    diffusers' names without a prefix, for LightX2V and DiffSynth.

    Args:
        state: the LoRA to write.
        path: the ``.safetensors`` file, or the folder for ``peft``.
        format: one of `FORMATS`.
        alpha: for ``peft`` and ``kohya``, stated for every module, ``lora_B`` being rescaled to it; each module's own
            rank by default.
        dtype: stored type.
        family: for ``kohya`` and ``comfyui``, whose original names the modules get, where q, k and v may be one module;
            diffusers' names by default.
        shapes: of the transformer's layers; needed where a module is fused of unequal parts, of which the state lacks
            one.
        metadata: entries for the header of the weights, under your own keys.

    Raises:
        CloraError: an unknown format, the file cannot be written, a value is not finite, `shapes` are needed, or `metadata` takes
            diffusers' own key. Also where alpha is not above 0, or has no place in the format.
    """
    check_choice("format", format, FORMATS)
    path = Path(path)
    if format == "diffusers" and METADATA_KEY in (metadata or {}):
        raise CloraError(f"metadata key {METADATA_KEY!r} is diffusers' own and alpha = rank needs none; rename yours")
    tensors = _tensors(_stored_modules(state, format, family, shapes), format, dtype, alpha)
    if format != "peft" and path.suffix != ".safetensors":
        raise CloraError(f"{path}: expected a name that ends in .safetensors")
    _refuse_nonfinite(tensors, path)
    with replacing(path / PEFT_WEIGHTS if format == "peft" else path) as weights:
        _write_and_compare(tensors, weights, metadata)
        if format == "peft":
            # In place before the weights are: without it they would be read with alpha = rank.
            write_atomic(path / PEFT_CONFIG, _peft_config(state, alpha))


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raises CloraError, with the nearest names, for a value that is not one of those known."""
    if value not in known:
        raise CloraError(f"{what}: expected one of {', '.join(known)}, found {value!r}{nearest(value, known)}")


def check_storable(state: LoRAState, path: Path, dtype: torch.dtype) -> str:
    """Returns the `tensor_digest` of a diffusers file before it is written.

    Raises:
        CloraError: a value is not finite in the type it is to be stored in.
    """
    tensors = _tensors(_stored_modules(state, "diffusers", None, None), "diffusers", dtype)
    _refuse_nonfinite(tensors, path)
    return tensor_digest(tensors)


def _refuse_nonfinite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise CloraError(f"{path}: {name} holds NaN or infinite values as {tensor.dtype}; nothing was written")


def _write_and_compare(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None) -> None:
    """Raises OSError where the file does not hold what was written, as on a full or failing disk."""
    # safetensors refuses tensors that share memory, as the parts of a fused module do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | dict(metadata or {})
    # safetensors 0.8 makes files that only their owner can read, so an ordinary new file lends its permissions.
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)
    _sort_metadata(file)
    file.chmod(mode)
    with safe_open(file, framework="pt") as opened:
        if opened.metadata() != metadata or set(opened.keys()) != set(tensors):
            raise OSError("the header read back differs from what was written")
        for name, tensor in tensors.items():
            if not torch.equal(opened.get_tensor(name), tensor):
                raise OSError(f"{name} read back differs from what was written")


def _sort_metadata(file: Path) -> None:
    """Sorts the metadata of a safetensors file, which has another order at each writing: equal runs give equal bytes."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        if len(text) > length:
            raise OSError("its header cannot be sorted in place")
        opened.seek(8)
        opened.write(text.ljust(length))


def _tensors(
    modules: Mapping[str, LoRAModule], format: str, dtype: torch.dtype, alpha: float | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of a file by their keys."""
    if alpha is not None and format not in ("peft", "kohya"):
        raise CloraError(f"{format} files state no alpha, found {alpha}; leave it out, or write peft or kohya")
    if alpha is not None and alpha <= 0:
        raise CloraError(f"alpha must be above 0, found {alpha}")
    down, up = ("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B")
    tensors = {}
    for name, module in modules.items():
        stem = _PREFIX[format] + (name.replace(".", "_") if format in UNDERSCORED else name)
        tensors[f"{stem}.{down}.weight"] = module.lora_A.to(dtype)
        # A loader multiplies the product by the stated alpha / rank.
        scale = 1.0 if alpha is None else module.rank / alpha
        tensors[f"{stem}.{up}.weight"] = (module.lora_B * scale).to(dtype)
        if format == "kohya":
            tensors[f"{stem}.alpha"] = torch.tensor(float(module.rank if alpha is None else alpha))
    return tensors


def _peft_config(state: LoRAState, alpha: float | None) -> str:
    """Returns the text of PEFT's ``adapter_config.json``."""
    from peft import LoraConfig

    ranks = {name: module.rank for name, module in state.modules.items() if module.rank != state.max_rank}
    config = LoraConfig(
        r=state.max_rank,
        lora_alpha=state.max_rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        target_modules=sorted(state.modules),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks) if alpha is None else {},
    )
    # PEFT holds the modules as a set, which JSON has not.
    return json.dumps(config.to_dict(), default=sorted, indent=2, sort_keys=True)


def _stored_modules(
    state: LoRAState, format: str, family: Family | None, shapes: LayerShapes | None
) -> Mapping[str, LoRAModule]:
    """Returns the modules as a format has them: of one rank for diffusers, by the family's names for kohya and ComfyUI."""
    if format == "diffusers":
        return state.padded(state.max_rank).modules
    if format in ("peft", "bare") or family is None:
        return state.modules
    renamed = {}
    for module in state.modules:
        part = original_part(module, family)
        if part.name not in renamed:
            renamed[part.name] = _fused([_block(name, part, state, shapes) for name in part.modules])
    return renamed


def _block(name: str, part: Part, state: LoRAState, shapes: LayerShapes | None) -> LoRAModule:
    """Returns one row block of a fused module; zero where the state lacks it."""
    if name in state.modules:
        module = state.modules[name]
        return LoRAModule(module.lora_A, reordered(module.lora_B, part.swap_halves))
    # With the lora_A of a part that is there, three parts of which one is missing still share one lora_A.
    present = next(state.modules[other] for other in part.modules if other in state.modules)
    if shapes is None and any(other.endswith(_WIDE_PART) for other in part.modules):
        raise CloraError(
            f"{part.modules} are one module in the original naming, the LoRA lacks {name}, and its size is not known; "
            f"{NAME_THE_MODEL}"
        )
    rows = len(present.lora_B) if shapes is None else shapes[name][0]  # q, k and v have the same
    return LoRAModule(present.lora_A, present.lora_B.new_zeros(rows, present.rank))


def _fused(blocks: Sequence[LoRAModule]) -> LoRAModule:
    """Stacks the row blocks of one fused module.

    Returns:
        One shared ``lora_A`` where all have the same, else a block-diagonal module of the sum of their padded ranks.
    """
    first = blocks[0]
    if all(torch.equal(block.lora_A, first.lora_A) for block in blocks):
        return LoRAModule(first.lora_A, torch.cat([block.lora_B for block in blocks]))
    rank = max(block.rank for block in blocks)
    blocks = [block.padded(rank) for block in blocks]
    # Part i must see only its own lora_A: [parts * rank, in] and [sum of rows, parts * rank], zero off the diagonal.
    lora_A = torch.cat([block.lora_A for block in blocks])
    return LoRAModule(lora_A, torch.block_diag(*(block.lora_B for block in blocks)))
