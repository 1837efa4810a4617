"""Reads a LoRA of any common format into a `LoRAState`, or says exactly what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clora.errors import CloraError, nearest
from clora.lora.adapters import Adapter, change, decompose_weight, find_strength, read_adapter
from clora.lora.algebra import MAX_ERROR, MAX_RANK, factorise
from clora.lora.families import Route, routes
from clora.lora.keys import FileKeys, sort_keys, split_prefix
from clora.lora.layers import linear_shapes, linear_weights, transformer_of
from clora.lora.source import LoRASource, open_lora
from clora.lora.state import LoRAModule, LoRAState

_LISTED_KEYS = 8


def load_lora(path: str | Path, pipeline_or_transformer: Any, *, max_error: float = MAX_ERROR) -> LoRAState:
    """Reads a LoRA of any common format for a model.

    ::

        state = clora.load_lora("snow.safetensors", pipe)

    Args:
        path: a ``.safetensors`` file, or a folder with one.
        pipeline_or_transformer: a diffusers pipeline or its transformer, whose layers the LoRA must fit.
        max_error: the largest error ``|change - B A| / |change|`` of factors that stand for a change that is not of low
            rank.

    Returns:
        The update of each layer as fp32 factors, ``lora_B @ lora_A`` being exactly what the file means; ``errors``
        names the layers for which it is not exact.

    Raises:
        CloraError: as `read_lora`, or there is no transformer, or one that carries LoRAs already.
    """
    transformer = transformer_of(pipeline_or_transformer)
    return read_lora(path, linear_shapes(transformer), linear_weights(transformer), max_error=max_error)


def read_lora(
    path: str | Path,
    target_modules: Mapping[str, tuple[int, int]],
    base_weights: Mapping[str, Tensor] | None = None,
    *,
    max_rank: int = MAX_RANK,
    max_error: float = MAX_ERROR,
) -> LoRAState:
    """Loads a LoRA so that ``lora_B @ lora_A`` is exactly the update that the file means.

    A LoRA is exact at any rank, LoHa and LoKr where exact factors have at most `max_rank`. Any other change (of whole
    matrices, ``.diff``, DoRA) is replaced by factors within `max_error`, and the result states each module's error.

    Args:
        path: a ``.safetensors`` file or a folder with one (see `clora.lora.source.open_lora`).
        target_modules: what the LoRA must fit, from `linear_shapes`.
        base_weights: from `linear_weights`; needed for DoRA alone, whose update depends on them.
        max_rank: the highest rank that factors of a dense change may have.
        max_error: the largest error ``|change - B A| / |change|`` that they may have.

    Returns:
        fp32 modules under the target's own names, alpha folded into ``lora_B``.

    Raises:
        CloraError: an unreadable file, an unsupported adapter type, unknown or incomplete keys, a shape that does not
            fit, a value that is not finite, DoRA without its base, or a dense change that `max_rank` does not hold
            within `max_error`. The message names file, key and shape.
    """
    source = open_lora(path)
    keys = sort_keys(source.shapes)
    table = routes(target_modules)
    _refuse_unsupported(source.file, keys)
    _refuse_unknown(source.file, keys, table, target_modules)
    modules: dict[str, LoRAModule] = {}
    errors: dict[str, float] = {}
    for stem, parts in keys.modules.items():
        adapter, targets = read_adapter(source, stem, parts), table[split_prefix(stem)[1]]
        check_fit(source, adapter, [target_modules[route.module] for route in targets])
        for name, (module, error) in updates(source, adapter, targets, base_weights, max_rank, max_error).items():
            if name in modules:
                raise CloraError(f"{source.file}: {stem} gives {name} a second time; expected each module once")
            check_error(source, adapter, name, module, error, max_error)
            modules[name] = module
            if error:
                errors[name] = error
    return LoRAState(modules, source.metadata, keys.format, errors)


def lora_ranks(path: str | Path, target_modules: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The rank that each module of a LoRA will have, from the file's header alone.

    Returns:
        module of the target to rank; for a change that is not of low rank, the highest that its factors may have.

    Raises:
        CloraError: as `read_lora`, for what names and shapes tell; values are not read.
    """
    source = open_lora(path)
    keys = sort_keys(source.shapes)
    table = routes(target_modules)
    _refuse_unsupported(source.file, keys)
    _refuse_unknown(source.file, keys, table, target_modules)
    ranks = {}
    for stem, parts in keys.modules.items():
        adapter, targets = read_adapter(source, stem, parts), table[split_prefix(stem)[1]]
        check_fit(source, adapter, [target_modules[route.module] for route in targets])
        ranks |= {route.module: min(adapter.exact_rank, MAX_RANK) for route in targets}
    return ranks


def check_fit(source: LoRASource, adapter: Adapter, targets: Sequence[tuple[int, int]]) -> None:
    """Refuses a module of a file that does not fit the layers it is for.

    Args:
        source: the open file.
        adapter: the file's module.
        targets: (out, in) of each layer that it changes; fused ones stack their rows.

    Raises:
        CloraError: another number of rows or columns.
    """
    out_features, in_features = sum(out for out, _ in targets), targets[0][1]
    if adapter.shape != (out_features, in_features):
        found = " and ".join(
            f"{adapter.parts[part]} is {list(source.shapes[adapter.parts[part]])}"
            for matrix in adapter.matrices
            for part in reversed(matrix)
        )
        expected = f"expected [rank, {in_features}] and [{out_features}, rank]"
        if adapter.kind != "LoRA":
            expected = f"together {list(adapter.shape)}, expected {[out_features, in_features]}"
        raise CloraError(f"{source.file}: wrong shape, {found}; {expected}. Choose the LoRA's own base model")


def updates(
    source: LoRASource,
    adapter: Adapter,
    targets: Sequence[Route],
    base_weights: Mapping[str, Tensor] | None,
    max_rank: int,
    max_error: float,
) -> dict[str, tuple[LoRAModule, float]]:
    """Reads one module of a file, which is several of the target where the file fuses them.

    Args:
        source: the open file.
        adapter: its module.
        targets: the rows that are each module of the target.
        base_weights, max_rank, max_error: as in `read_lora`.

    Returns:
        target module to its update and that one's relative error, 0 where it is exact.

    Raises:
        CloraError: a value is not finite, alpha is not known, or DoRA comes without its base.
    """
    tensors = source.read_finite({part: key for part, key in adapter.parts.items() if part != "alpha"})
    delta = change(adapter, tensors, find_strength(source, adapter).scale, max_rank)
    if adapter.is_dora:
        dense = delta.lora_B.double() @ delta.lora_A.double() if isinstance(delta, LoRAModule) else delta
        delta = decompose_weight(_stacked_base(source, adapter, targets, base_weights), dense, tensors["magnitude"])
    if isinstance(delta, LoRAModule):
        return {route.module: (_cut_factors(route, delta, len(targets) > 1), 0.0) for route in targets}
    return {route.module: factorise(_rows(route, delta), max_rank, max_error) for route in targets}


def check_error(
    source: LoRASource, adapter: Adapter, name: str, module: LoRAModule, error: float, max_error: float
) -> None:
    """Raises CloraError where the factors of a dense change are too far from it."""
    if error > max_error:
        kind = f"DoRA on {adapter.kind}" if adapter.is_dora else adapter.kind
        raise CloraError(
            f"{source.file}: {adapter.stem} is a {kind} whose change of {name} is not of low rank: at rank "
            f"{module.rank} an error of {error:.2%} is left, {max_error:.2%} is allowed. Allow a higher "
            "max_error if that is good enough"
        )


def _refuse_unsupported(file: Path, keys: FileKeys) -> None:
    if keys.unsupported:
        found = "; ".join(
            f"{len(names)} key(s) are {reason}: {_listed(names, 3)}" for reason, names in keys.unsupported.items()
        )
        raise CloraError(f"{file}: {found}. Leave them out of the file if the LoRA is right without them")
    if keys.twice:
        first, second = keys.twice[0]
        raise CloraError(f"{file}: {first} and {second} are the same tensor by two names; expected each once")


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


def _stacked_base(
    source: LoRASource, adapter: Adapter, targets: Sequence[Route], base_weights: Mapping[str, Tensor] | None
) -> Tensor:
    """The base's weights in the order of the file's rows, ``[out, in]`` fp64. Raises CloraError where there are none."""
    reason = f"{source.file}: {adapter.stem} is DoRA, whose update depends on the weights of the base"
    if base_weights is None:
        raise CloraError(
            f"{reason}; load it beside its base model (base_weights), or for clora export name the base's folder, weights "
            "included, with --pipeline"
        )
    blocks = []
    for route in targets:
        if route.module not in base_weights:
            raise CloraError(f"{reason}, but those of {route.module} are not there; expected the whole base")
        weight = base_weights[route.module].detach()
        if (
            weight.shape != (route.stop - route.start, adapter.shape[1])
            or weight.is_meta
            or not weight.is_floating_point()
        ):
            found = f"those of {route.module} are {list(weight.shape)} {weight.dtype} on {weight.device}"
            raise CloraError(f"{reason}, but {found}; load a base that is not quantised")
        blocks.append(_swapped(weight.cpu().double(), route))
    return torch.cat(blocks)


def _rows(route: Route, delta: Tensor) -> Tensor:
    """Cuts one target module's rows out of those of the file's module, ``[out, ...]``."""
    return _swapped(delta[route.start : route.stop], route)


def _swapped(rows: Tensor, route: Route) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if route.swap_halves else rows


def _cut_factors(route: Route, delta: LoRAModule, is_fused: bool) -> LoRAModule:
    block = _rows(route, delta.lora_B)
    if not is_fused:
        return LoRAModule(delta.lora_A, block)
    # A fused module of rank 3r is usually block-diagonal: two thirds of the ranks do nothing for this part.
    used = (block != 0).any(dim=0)
    used[0] |= not used.any()
    return LoRAModule(delta.lora_A[used], block[:, used])
