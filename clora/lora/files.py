"""Reads a LoRA of any common format into a `LoRAState`, or says exactly what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clora.errors import CloraError, nearest
from clora.lora.keys import FileKeys, Route, routes, sort_keys, split_prefix
from clora.lora.source import LoRASource, open_lora
from clora.lora.state import LoRAModule, LoRAState

_LISTED_KEYS = 8


def linear_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers that a LoRA may change.

    Args:
        transformer: the plain diffusers model, before adapters are put into it.

    Returns:
        module path to (out_features, in_features).
    """
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def load_lora(path: str | Path, target_modules: Mapping[str, tuple[int, int]]) -> LoRAState:
    """Loads a LoRA so that ``lora_B @ lora_A`` is exactly the update that the file means.

    Args:
        path: a ``.safetensors`` file or a folder with one (see `clora.lora.source.open_lora`).
        target_modules: what the LoRA must fit, from `linear_shapes`.

    Returns:
        fp32 modules under the target's own names, alpha folded into ``lora_B``.

    Raises:
        CloraError: an unreadable file, an unsupported adapter type, unknown or incomplete keys, a shape that does not
            fit, or a value that is not finite. The message names file, key and shape.
    """
    source = open_lora(path)
    keys = sort_keys(source.shapes)
    table = routes(target_modules)
    _refuse_unsupported(source.file, keys)
    _refuse_unknown(source.file, keys, table, target_modules)
    modules: dict[str, LoRAModule] = {}
    for stem, parts in keys.modules.items():
        for name, module in _load_module(source, stem, parts, table, target_modules).items():
            if name in modules:
                raise CloraError(f"{source.file}: {stem} gives {name} a second time; expected each module once")
            modules[name] = module
    return LoRAState(modules, source.metadata, keys.format)


def find_alpha(source: LoRASource, stem: str, alpha: float | None, rank: int) -> tuple[float, str]:
    """The alpha of one module of a file and where it is stated.

    Args:
        source: the open file.
        stem: the module's name as in the file.
        alpha: the value of the file's ``.alpha`` tensor, None where it has none.
        rank: rows of its ``lora_A``.

    Returns:
        (alpha, ``"tensor"``, ``"config"`` or ``"rank"``).

    Raises:
        CloraError: the config states another rank than the tensors have, or PEFT weights come without a config.
    """
    module = split_prefix(stem)[1]
    stated_rank = source.config.module_rank(module)
    if stated_rank not in (None, rank):
        message = f"{source.file}: {stem} has rank {rank} but its config says {stated_rank}"
        raise CloraError(f"{message}, so its strength is not known; export it again")
    if alpha is not None:
        return alpha, "tensor"
    stated = source.config.module_alpha(module)
    if stated is None and stem.startswith("base_model.model."):
        raise CloraError(
            f"{source.file}: PEFT keeps alpha in an adapter_config.json beside the weights, none is stated there, so "
            "their strength is not known; put that file there"
        )
    return (float(rank), "rank") if stated is None else (stated, "config")


def check_pair(source: LoRASource, stem: str, parts: Mapping[str, str]) -> None:
    """Refuses a module of a file whose own tensors are incomplete or disagree.

    Raises:
        CloraError: a matrix is missing, is no matrix, the ranks differ, or alpha is not a single number.
    """
    missing = [side for side in ("lora_A", "lora_B") if side not in parts]
    if missing:
        found = ", ".join(parts.values())
        raise CloraError(f"{source.file}: {stem} has no {' and no '.join(missing)} (found only {found})")
    shape_A, shape_B, found = _pair_shapes(source, parts)
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] == 0:
        raise CloraError(f"{source.file}: {found}; expected two matrices, [rank, in] and [out, rank]")
    if shape_A[0] != shape_B[1]:
        raise CloraError(f"{source.file}: rank mismatch, {found}; expected [rank, in] and [out, rank] of one rank")
    if "alpha" in parts and source.shapes[parts["alpha"]] not in ((), (1,)):
        shape = list(source.shapes[parts["alpha"]])
        raise CloraError(f"{source.file}: {parts['alpha']} has shape {shape}; expected a single number")


def check_fit(source: LoRASource, parts: Mapping[str, str], targets: Sequence[tuple[int, int]]) -> None:
    """Refuses a module of a file that does not fit the layers it is for.

    Args:
        source: the open file.
        parts: the module's keys; `check_pair` has passed.
        targets: (out, in) of each layer that it changes; fused ones stack their rows.

    Raises:
        CloraError: another number of rows or columns.
    """
    shape_A, shape_B, found = _pair_shapes(source, parts)
    out_features, in_features = sum(out for out, _ in targets), targets[0][1]
    if (shape_B[0], shape_A[1]) != (out_features, in_features):
        expected = f"expected [rank, {in_features}] and [{out_features}, rank]"
        raise CloraError(f"{source.file}: wrong shape, {found}; {expected}. Choose the LoRA's own base model")


def _pair_shapes(source: LoRASource, parts: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    shape_A, shape_B = source.shapes[parts["lora_A"]], source.shapes[parts["lora_B"]]
    return shape_A, shape_B, f"{parts['lora_A']} is {list(shape_A)} and {parts['lora_B']} is {list(shape_B)}"


def _refuse_unsupported(file: Path, keys: FileKeys) -> None:
    if keys.unsupported:
        found = ", ".join(f"{kind} (key {key!r})" for kind, key in keys.unsupported.items())
        raise CloraError(f"{file} is {found}, which is not supported yet; expected a plain LoRA (lora_A and lora_B)")


def _refuse_unknown(
    file: Path, keys: FileKeys, table: Mapping[str, tuple[Route, ...]], target_modules: Iterable[str]
) -> None:
    """Every key must be understood: diffusers and ComfyUI skip what they do not know, and the effect changes."""
    unmatched = [stem for stem in keys.modules if split_prefix(stem)[1] not in table]
    if len(unmatched) == len(keys.modules):
        raise CloraError(
            f"{file}: no key fits the model, this is a LoRA for another architecture (or none). "
            f"Found for example {_listed([*unmatched, *keys.unknown], 3)}; expected modules like "
            f"{_listed(target_modules, 3)}. Choose the LoRA's own base model"
        )
    unknown = [*keys.unknown, *(key for stem in unmatched for key in keys.modules[stem].values())]
    if unknown:
        hint = nearest(split_prefix(unmatched[0])[1], table) if unmatched else ""
        raise CloraError(
            f"{file}: {len(unknown)} unknown key(s): {_listed(unknown, _LISTED_KEYS)}. Expected only LoRA matrices of "
            f"the transformer; remove the others from the file or choose the LoRA's own base model{hint}"
        )


def _listed(names: Iterable[str], limit: int) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _load_module(
    source: LoRASource,
    stem: str,
    parts: Mapping[str, str],
    table: Mapping[str, tuple[Route, ...]],
    target_modules: Mapping[str, tuple[int, int]],
) -> dict[str, LoRAModule]:
    """Reads one module of the file, which is several of the target where the file fuses them."""
    targets = table[split_prefix(stem)[1]]
    check_pair(source, stem, parts)
    check_fit(source, parts, [target_modules[route.module] for route in targets])
    tensors = read_finite(source, parts)
    lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
    stated = tensors["alpha"].item() if "alpha" in tensors else None
    alpha, _ = find_alpha(source, stem, stated, lora_A.shape[0])
    lora_B = lora_B * source.config.scale(alpha, lora_A.shape[0])
    return {route.module: _take(route, lora_A, lora_B) for route in targets}


def read_finite(source: LoRASource, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads one module's tensors by side. Raises CloraError where one holds NaN or infinite values."""
    tensors = dict(zip(parts, source.read(parts.values()).values(), strict=True))
    for side, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CloraError(f"{source.file}: {parts[side]} holds NaN or infinite values; export the LoRA again")
    return tensors


def _take(route: Route, lora_A: Tensor, lora_B: Tensor) -> LoRAModule:
    """Cuts one target module out of a module of the file.

    Args:
        route: which row block.
        lora_A: ``[rank, in]``, shared by the fused parts.
        lora_B: ``[parts * out, rank]``.
    """
    block = lora_B.chunk(route.parts)[route.part]
    if route.swap_halves:
        block = torch.cat(block.chunk(2)[::-1])
    if route.parts == 1:
        return LoRAModule(lora_A, block)
    # A fused module of rank 3r is usually block-diagonal: two thirds of the ranks do nothing for this part.
    used = (block != 0).any(dim=0)
    used[0] |= not used.any()
    return LoRAModule(lora_A[used], block[:, used])
