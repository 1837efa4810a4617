"""Writes LoRA files; none is ever left half-written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clora.errors import CloraError
from clora.files import replacing
from clora.lora.families import Family, Part, original_part, original_parts
from clora.lora.source import METADATA_KEY, PEFT_CONFIG, PEFT_WEIGHTS
from clora.lora.state import LoRAModule, LoRAState

_WIDE_PART = ".proj_mlp"  # fused with q, k and v in FLUX.1's single blocks, with more rows than they have


def save_diffusers_lora(
    state: LoRAState,
    path: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the file that diffusers (any version), ComfyUI and, for FLUX, sglang read alike.

    Its keys are ``transformer.X.lora_A.weight`` and ``lora_B``, every module has the same rank, and alpha = rank
    without being written: diffusers up to 0.39 mis-scales mixed ranks, and several loaders lose stated alphas.

    Args:
        state: what to write.
        path: the ``.safetensors`` file.
        rank: rank of every module, zero-padded; the largest one by default.
        dtype: stored type.
        metadata: entries for the file's header, under your own keys.

    Raises:
        CloraError: the file cannot be written, a value is not finite, or `metadata` takes diffusers' own key.
        ValueError: `rank` is below that of a module.
    """
    metadata = dict(metadata or {})
    if METADATA_KEY in metadata:
        raise CloraError(f"metadata key {METADATA_KEY!r} is diffusers' own and alpha = rank needs none; rename yours")
    padded = state.padded(state.max_rank if rank is None else rank)
    write_safetensors(_named(padded.modules, "transformer.", dtype), path, metadata)


def save_peft_folder(
    state: LoRAState,
    folder: str | Path,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        state: what to write; ranks may differ.
        folder: created where missing.
        alpha: stated for every module, ``lora_B`` being rescaled to it; each module's own rank by default.
        dtype: stored type.
        metadata: entries for the header of the weights.

    Raises:
        CloraError: the folder cannot be written or a value is not finite.
    """
    from peft import LoraConfig

    ranks = {name: module.rank for name, module in state.modules.items() if module.rank != state.max_rank}
    config = LoraConfig(
        r=state.max_rank,
        lora_alpha=state.max_rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        target_modules=sorted(state.modules),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks) if alpha is None else {},
    )
    modules = {name: _with_alpha(module, alpha) for name, module in state.modules.items()}
    folder = Path(folder)
    tensors = _named(modules, "base_model.model.", dtype)
    _refuse_nonfinite(tensors, folder)
    # The inner file, the config, is renamed first: weights without their config would be read with alpha = rank.
    with replacing(folder / PEFT_WEIGHTS) as weights_file, replacing(folder / PEFT_CONFIG) as config_file:
        _write_and_compare(tensors, weights_file, metadata or {})
        # PEFT holds the modules as a set.
        config_file.write_text(json.dumps(config.to_dict(), default=sorted, indent=2, sort_keys=True), encoding="utf-8")


def save_kohya(
    state: LoRAState,
    path: str | Path,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    family: Family | None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes kohya's format: ``lora_unet_*`` with ``lora_down``, ``lora_up`` and ``.alpha``.

    Args:
        state: what to write; ranks may differ.
        path: the ``.safetensors`` file.
        alpha: stated for every module, ``lora_B`` being rescaled to it; each module's own rank by default.
        dtype: stored type.
        family: whose original names the modules get, where q, k and v may be one module; None for diffusers' names.
        shapes: from `clora.lora.layers.linear_shapes`; needed where a module is fused of unequal parts, of which the
            state lacks one.
        metadata: entries for the file's header.

    Raises:
        CloraError: the file cannot be written, a value is not finite, or `shapes` are needed.
    """
    tensors = {}
    for name, module in _renamed(state, family, shapes).items():
        stem, module = "lora_unet_" + name.replace(".", "_"), _with_alpha(module, alpha)
        tensors[f"{stem}.lora_down.weight"] = module.lora_A.to(dtype)
        tensors[f"{stem}.lora_up.weight"] = module.lora_B.to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(float(module.rank if alpha is None else alpha))
    write_safetensors(tensors, path, metadata or {})


def save_comfyui(
    state: LoRAState,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    family: Family | None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the format of ai-toolkit and ComfyUI: ``diffusion_model.*``, alpha = rank.

    Args:
        state: what to write; ranks may differ.
        path: the ``.safetensors`` file.
        dtype: stored type.
        family, shapes: as in `save_kohya`.
        metadata: entries for the file's header.

    Raises:
        CloraError: the file cannot be written, a value is not finite, or `shapes` are needed.
    """
    modules = _renamed(state, family, shapes)
    write_safetensors(_named(modules, "diffusion_model.", dtype), path, metadata or {})


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes under a temporary name, reads back, compares, then renames.

    Args:
        tensors: what to write; all values must be finite.
        path: a ``.safetensors`` file; its folder is created where missing.
        metadata: string entries for the header.

    Raises:
        CloraError: the path cannot be written, or a value is not finite in its stored type.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CloraError(f"{path}: expected a name that ends in .safetensors")
    _refuse_nonfinite(tensors, path)
    with replacing(path) as file:
        _write_and_compare(tensors, file, metadata)


def check_storable(state: LoRAState, path: Path, dtype: torch.dtype) -> None:
    """Raises CloraError where a value is not finite in the type it is to be stored in."""
    _refuse_nonfinite(_named(state.modules, "transformer.", dtype), path)


def _refuse_nonfinite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise CloraError(f"{path}: {name} holds NaN or infinite values as {tensor.dtype}; nothing was written")


def _write_and_compare(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Raises OSError where the file does not hold what was written, as on a full or failing disk."""
    # safetensors refuses tensors that share memory, as the parts of a fused module do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **metadata}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata)
        file.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
        with safe_open(file, framework="pt") as opened:
            if opened.metadata() != metadata or set(opened.keys()) != set(tensors):
                raise OSError("the header read back differs from what was written")
            for name, tensor in tensors.items():
                if not torch.equal(opened.get_tensor(name), tensor):
                    raise OSError(f"{name} read back differs from what was written")
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _named(modules: Mapping[str, LoRAModule], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, module in modules.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = module.lora_A.to(dtype)
        tensors[f"{prefix}{name}.lora_B.weight"] = module.lora_B.to(dtype)
    return tensors


def _with_alpha(module: LoRAModule, alpha: float | None) -> LoRAModule:
    """The factors to store beside a stated alpha: a loader multiplies them by alpha / rank."""
    if alpha is None:
        return module
    if alpha <= 0:
        raise CloraError(f"alpha must be above 0, found {alpha}")
    return LoRAModule(module.lora_A, module.lora_B * (module.rank / alpha))


def _renamed(
    state: LoRAState, family: Family | None, shapes: Mapping[str, tuple[int, int]] | None
) -> Mapping[str, LoRAModule]:
    """The same LoRA under a family's original names."""
    if family is None:
        return state.modules
    groups = {original_part(name, family).name: original_parts(name, family) for name in state.modules}
    return {
        original: _fuse([_part(name, names, state, family, shapes) for name in names])
        for original, names in groups.items()
    }


def _part(
    name: str,
    names: Sequence[str],
    state: LoRAState,
    family: Family,
    shapes: Mapping[str, tuple[int, int]] | None,
) -> LoRAModule:
    """One row block of a fused module; zero where the state lacks it."""
    if name in state.modules:
        return _to_original(state.modules[name], original_part(name, family))
    present = next(state.modules[other] for other in names if other in state.modules)
    if shapes is None and any(other.endswith(_WIDE_PART) for other in names):
        raise CloraError(
            f"{names} are one module in the original naming, the LoRA lacks {name}, and its size is not known; name the "
            "LoRA's base model with --pipeline FOLDER (its transformer/config.json is enough)"
        )
    rows = len(present.lora_B) if shapes is None else shapes[name][0]  # q, k and v have the same
    return LoRAModule(present.lora_A, present.lora_B.new_zeros(rows, present.rank))


def _to_original(module: LoRAModule, part: Part) -> LoRAModule:
    if not part.swap_halves:
        return module
    return LoRAModule(module.lora_A, torch.cat(module.lora_B.chunk(2)[::-1]))


def _fuse(blocks: Sequence[LoRAModule]) -> LoRAModule:
    """Stacks the row blocks of one fused module.

    Returns:
        One shared ``lora_A`` where all have the same, else a block-diagonal module of the sum of their padded ranks.
    """
    first = blocks[0]
    if all(torch.equal(block.lora_A, first.lora_A) for block in blocks):
        return LoRAModule(first.lora_A, torch.cat([block.lora_B for block in blocks]))
    rank = max(block.rank for block in blocks)
    blocks = [block.padded(rank) for block in blocks]
    lora_A = torch.cat([block.lora_A for block in blocks])
    return LoRAModule(lora_A, torch.block_diag(*(block.lora_B for block in blocks)))
