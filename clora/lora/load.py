"""Reads a LoRA of any common format into a `LoRAState`, or reports exactly what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clora.errors import CloraError, nearest
from clora.lora.adapters import Adapter, change, decompose_weight, find_strength, read_adapter
from clora.lora.algebra import MAX_ERROR, MAX_RANK, factorise
from clora.lora.families import Route, reordered, routes
from clora.lora.keys import PREFIXES, module_name
from clora.lora.layers import LayerShapes, linear_shapes, linear_weights, transformer_of
from clora.lora.source import LoRASource, open_lora
from clora.lora.state import LoRAModule, LoRAState


def load_lora(
    path: str | Path, pipeline_or_transformer: Any, *, max_error: float = MAX_ERROR, ignore: Sequence[str] = ()
) -> LoRAState:
    """Reads a LoRA of any common format for a model.

    ::

        state = clora.load_lora("snow.safetensors", pipe)

    Args:
        path: a ``.safetensors`` file, or a folder with one.
        pipeline_or_transformer: a diffusers pipeline or its transformer, whose layers the LoRA must fit.
        max_error: the largest error ``|change - B A| / |change|`` of factors that stand for a change that is not of low
            rank.
        ignore: the beginnings of the tensor names to leave out, such as those of a text encoder; ``*`` stands for any
            text (``lora_te``, ``*.norm``).

    Returns:
        The update of each layer as fp32 factors, ``lora_B @ lora_A`` being exactly the change that the file means; ``errors``
        names the layers for which it is not exact.

    Raises:
        CloraError: as `read_lora`, or there is no transformer, or one that carries LoRAs already.
    """
    transformer = transformer_of(pipeline_or_transformer)
    shapes, weights = linear_shapes(transformer), linear_weights(transformer)
    return read_lora(path, shapes, weights, max_error=max_error, ignore=ignore)


def read_lora(
    path: str | Path,
    shapes: LayerShapes,
    base_weights: Mapping[str, Tensor] | None = None,
    *,
    max_error: float = MAX_ERROR,
    ignore: Sequence[str] = (),
) -> LoRAState:
    """Reads a LoRA so that ``lora_B @ lora_A`` is exactly the update that the file means.

    A LoRA is exact at any rank, LoHa and LoKr where exact factors have at most `MAX_RANK` ranks. Any other change (of whole
    matrices, ``.diff``, DoRA) is replaced by factors within `max_error`, and the result states each module's error.

    Args:
        path: a ``.safetensors`` file or a folder with one (see `clora.lora.source.open_lora`).
        shapes: of the layers that the LoRA must fit.
        base_weights: the layers' weights; needed only for DoRA, whose update depends on them.
        max_error: the largest error ``|change - B A| / |change|`` that factors of a dense change may have.
        ignore: as in `load_lora`.

    Returns:
        fp32 modules under the transformer's own names, alpha folded into ``lora_B``.

    Raises:
        CloraError: an unreadable file, an unsupported adapter type, unknown or incomplete keys, or a shape that does not
            fit. Also a value that is not finite, DoRA without its base, or a dense change that `MAX_RANK` ranks do
            not hold within `max_error`. The message names file, key and shape.
    """
    source = open_lora(path, ignore)
    modules: dict[str, LoRAModule] = {}
    errors: dict[str, float] = {}
    stems: dict[str, str] = {}
    for adapter, places in _placed(source, shapes):
        for name, (module, error) in updates(adapter, places, base_weights, max_error).items():
            if name in modules:
                raise CloraError(f"{source.file}: {second_time(name, [stems[name], adapter.stem])}")
            if problem := excess(adapter, name, module, error, max_error):
                raise CloraError(problem)
            modules[name] = module
            stems[name] = adapter.stem
            if error:
                errors[name] = error
    return LoRAState(modules, source.metadata, source.keys.format, errors)


def lora_ranks(path: str | Path, shapes: LayerShapes, ignore: Sequence[str] = ()) -> dict[str, int]:
    """Returns the rank that each module of a LoRA will have, and checks its values one module at a time.

    Returns:
        Module of the transformer to rank; for a change that is not of low rank, the highest that its factors may have.

    Raises:
        CloraError: as `read_lora`, but for the error of changes without low rank, or the LoRA changes nothing.
    """
    source = open_lora(path, ignore)
    ranks: dict[str, int] = {}
    stems: dict[str, str] = {}
    changes = False
    for adapter, places in _placed(source, shapes):
        changes |= not adapter.changes_nothing(adapter.read(), find_strength(adapter).scale)
        for route in places:
            if route.module in ranks:
                raise CloraError(f"{source.file}: {second_time(route.module, [stems[route.module], adapter.stem])}")
            ranks[route.module] = min(adapter.exact_rank, MAX_RANK)
            stems[route.module] = adapter.stem
    if not changes:
        raise CloraError(f"{source.file}: {NOTHING}")
    return ranks


NOTHING = (
    "the LoRA changes nothing: the product of the matrices is zero in every module (lora_B or alpha is zero), as after "
    "a training that never reached them; train or export it again"
)


def second_time(module: str, stems: Sequence[str]) -> str:
    """Returns the message about a layer that several modules of a file change."""
    return (
        f"{stems[-1]} changes {module} a second time, after {', '.join(stems[:-1])}; expected each module once, since programs "
        f"take the sum or the last. Leave out the wrong one, for example with --ignore '{stems[-1]}.'"
    )


def misfit(adapter: Adapter, places: Sequence[Route], shapes: LayerShapes) -> str | None:
    """Returns what is wrong with a module of a file that does not fit its layers; None where it does.

    Args:
        adapter: the file's module.
        places: its rows in the layers; fused ones stack their rows.
        shapes: of the layers.
    """
    out_features = places[-1].stop
    in_features = shapes[places[0].module][1]
    if adapter.shape == (out_features, in_features):
        return None
    expected = f"expected [rank, {in_features}] and [{out_features}, rank]"
    if adapter.kind != "LoRA":
        expected = f"together {list(adapter.shape)}, expected {[out_features, in_features]}"
    return f"{adapter.source.file}: wrong shape, {adapter.sizes()}; {expected}. Choose the LoRA's own base model"


def updates(
    adapter: Adapter, places: Sequence[Route], base_weights: Mapping[str, Tensor] | None, max_error: float
) -> dict[str, tuple[LoRAModule, float]]:
    """Reads one module of a file, which is several of the transformer's where the file fuses them.

    Args:
        adapter: the file's module.
        places: the rows of it that each module of the transformer has.
        base_weights, max_error: as in `read_lora`.

    Returns:
        Module of the transformer to its update and that one's relative error, 0 where it is exact.

    Raises:
        CloraError: a value is not finite or absurd, alpha is not known, or DoRA comes without its base.
    """
    tensors = adapter.read()
    delta = change(adapter, tensors, find_strength(adapter).scale, MAX_RANK)
    if adapter.is_dora:
        # The lengths of rows and columns depend on the whole weight, so DoRA is applied before a fused module is cut.
        dense = delta.lora_B.double() @ delta.lora_A.double() if isinstance(delta, LoRAModule) else delta
        delta = decompose_weight(_stacked_base(adapter, places, base_weights), dense, tensors["magnitude"])
    # The rows of a change in factors are those of lora_B.
    rows = delta.lora_B if isinstance(delta, LoRAModule) else delta
    found = {}
    for route in places:
        block = reordered(rows[route.start : route.stop], route.swap_halves)
        if not isinstance(delta, LoRAModule):
            found[route.module] = factorise(block, MAX_RANK, max_error)
        elif len(places) == 1:
            found[route.module] = (LoRAModule(delta.lora_A, block), 0.0)
        else:
            # A fused module of rank 3r is usually block-diagonal: two thirds of the ranks do nothing for this part.
            used = (block != 0).any(dim=0)
            used[0] |= not used.any()  # a part of zeros keeps one rank
            found[route.module] = (LoRAModule(delta.lora_A[used], block[:, used]), 0.0)
    return found


def excess(adapter: Adapter, name: str, module: LoRAModule, error: float, max_error: float) -> str | None:
    """Returns what is wrong with factors of a dense change that are too far from it; None where they are not."""
    if error <= max_error:
        return None
    kind = f"DoRA on {adapter.kind}" if adapter.is_dora else adapter.kind
    return (
        f"{adapter.source.file}: {adapter.stem} is a {kind} whose change of {name} is not of low rank: at rank "
        f"{module.rank} an error of {error:.2%} is left, {max_error:.2%} is allowed. Allow a higher "
        "max_error if that is good enough"
    )


def _placed(source: LoRASource, shapes: LayerShapes) -> Iterator[tuple[Adapter, tuple[Route, ...]]]:
    """Yields each module of a file and the rows that each layer has of it, names and shapes being checked."""
    table = routes(shapes)
    _refuse_unsupported(source)
    _refuse_unknown(source, table, shapes)
    for stem, parts in source.keys.modules.items():
        adapter = read_adapter(source, stem, parts)
        places = table[module_name(stem, table)]
        if problem := misfit(adapter, places, shapes):
            raise CloraError(problem)
        yield adapter, places


def _refuse_unsupported(source: LoRASource) -> None:
    keys = source.keys
    if keys.unsupported:
        found = [f"{len(names)} key(s) are {reason}: {_listed(names, 3)}" for reason, names in keys.unsupported.items()]
        names = list(chain.from_iterable(keys.unsupported.values()))
        raise CloraError(f"{source.file}: {'; '.join(found)}. {leave_out(names, source)}")
    if keys.twice:
        first, second = keys.twice[0]
        raise CloraError(f"{source.file}: {first} and {second} are the same tensor by two names; expected each once")
    if problem := several_adapters(source):
        raise CloraError(f"{source.file}: {problem}")


def several_adapters(source: LoRASource) -> str | None:
    """Returns what is wrong with a file of several adapters; None where there is one."""
    names = source.keys.adapters
    if len(names) < 2:
        return None
    return f"it holds {len(names)} adapters, {_listed(names, 5)}; expected one. Leave out the others: --ignore '*.{names[0]}.'"


def leave_out(keys: Sequence[str], source: LoRASource) -> str:
    """Returns the advice for keys that clora cannot apply: the option that leaves them out."""
    # One pattern where all begin alike and nothing else does; else one for the first of them, as an example.
    start = os.path.commonprefix(list(keys))
    if sum(key.startswith(start) for key in source.shapes) > len(keys):
        start = keys[0]
    return (
        f"If the LoRA is right without them, leave them out by the beginning of their names: --ignore '{start}' of clora "
        "export and inspect, `ignore` of an effect in a config and of clora.load_lora"
    )


def _refuse_unknown(source: LoRASource, table: Mapping[str, tuple[Route, ...]], layers: Iterable[str]) -> None:
    """Refuses a key that is not understood: diffusers and ComfyUI skip it, and the effect changes."""
    keys = source.keys
    unmatched = [stem for stem in keys.modules if module_name(stem, table) not in table]
    if len(unmatched) == len(keys.modules):
        raise CloraError(f"{source.file}: {_no_layer(unmatched, keys.unknown, table, layers)}")
    unknown = list(keys.unknown)
    for stem in unmatched:
        unknown += keys.modules[stem].values()
    if unknown:
        hint = nearest(module_name(unmatched[0], table), table) if unmatched else ""
        raise CloraError(
            f"{source.file}: {len(unknown)} unknown key(s): {_listed(unknown, 8)}. Expected only LoRA matrices of the "
            f"transformer{hint}; choose the LoRA's own base model. {leave_out(unknown, source)}"
        )


def _no_layer(stems: Sequence[str], unknown: Sequence[str], table: Collection[str], layers: Iterable[str]) -> str:
    """Returns what is wrong with a file none of whose modules is one of the model."""
    if not stems:
        return (
            f"no key names a LoRA's matrix. Found for example {_listed(unknown, 3)}; expected names that end in "
            ".lora_A.weight and .lora_B.weight, or as another program of docs/models.md writes them. Choose the LoRA's file, "
            "or rename the tensors"
        )
    if prefix := _unknown_prefix(stems, table):
        return (
            f"all names are layers of the model but for their beginning {prefix!r}, which may stand for another part of a "
            f"pipeline. Expected none or one of {', '.join(PREFIXES)}; if it is this model's, rename the tensors without it"
        )
    return (
        f"no key fits the model, this is a LoRA for another architecture (or none). Found for example "
        f"{_listed([*stems, *unknown], 3)}; expected modules like {_listed(layers, 3)}. Choose the LoRA's own base model"
    )


def _unknown_prefix(stems: Sequence[str], table: Collection[str]) -> str | None:
    """Returns the beginning that makes layers of the model of all names once it is removed; None where there is none."""
    for end in (i + 1 for i, letter in enumerate(stems[0]) if letter in "._/"):
        start = stems[0][:end]
        if all(stem.startswith(start) and stem.removeprefix(start) in table for stem in stems):
            return start
    return None


def _listed(names: Iterable[str], limit: int) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _stacked_base(adapter: Adapter, places: Sequence[Route], base_weights: Mapping[str, Tensor] | None) -> Tensor:
    """Returns the base's weights in the order of the file's rows, ``[out, in]`` fp64.

    Raises:
        CloraError: they are missing, or stored in a form that cannot be read.
    """
    reason = f"{adapter.source.file}: {adapter.stem} is DoRA, whose update depends on the weights of the base"
    if base_weights is None:
        raise CloraError(
            f"{reason}; load it beside its base model (base_weights), or for clora export name the base's folder, weights "
            "included, with --pipeline"
        )
    blocks = []
    for route in places:
        if route.module not in base_weights:
            raise CloraError(f"{reason}, but the weights of {route.module} are missing; expected the whole base")
        weight = base_weights[route.module].detach()
        shape = (route.stop - route.start, adapter.shape[1])
        # Packed 4-bit weights have another shape, 8-bit codes another type, and a model that is not loaded is on meta.
        if weight.shape != shape or weight.is_meta or not weight.is_floating_point():
            found = f"those of {route.module} are {list(weight.shape)} {weight.dtype} on {weight.device}"
            raise CloraError(f"{reason}, but {found}; load a base that is not quantised")
        blocks.append(reordered(weight.cpu().double(), route.swap_halves))
    return torch.cat(blocks)
