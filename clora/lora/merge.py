"""Training-free merges of LoRAs: the baselines to beat, and a start for the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clora.errors import CloraError, nearest
from clora.lora.reduce import module_svd
from clora.lora.state import LoRAModule, LoRAState

# The methods of PEFT that take adapters of unequal rank.
MERGE_METHODS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")

# Share of each update that the pruning methods keep; half is in the middle of what TIES and DARE report as good.
_DENSITY = 0.5


def merge_states(
    states: Sequence[LoRAState],
    target_modules: Mapping[str, tuple[int, int]],
    method: str,
    rank: int,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> LoRAState:
    """Merges LoRAs with PEFT's ``add_weighted_adapter``.

    Each layer is merged on its own bare ``nn.Linear``, so that no copy of the model is needed. A LoRA without some
    module counts as zero there.

    Args:
        states: at least one; ranks and modules may differ.
        target_modules: from `clora.lora.files.linear_shapes`.
        method: one of `MERGE_METHODS`.
        rank: rank of the result (at most the layer's smaller side).
        weights: one factor per LoRA, all 1 by default: each effect at full strength.
        seed: for the methods that drop weights at random.

    Raises:
        CloraError: no states, an unknown method or module, a rank below 1, or a wrong number of weights.
    """
    weights = _checked_weights(states, rank, weights)
    if method not in MERGE_METHODS:
        raise CloraError(
            f"unknown merge method {method!r}; expected one of {', '.join(MERGE_METHODS)}{nearest(method, MERGE_METHODS)}"
        )
    modules = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parts in _by_module(states, weights).items():
            if name not in target_modules:
                raise CloraError(f"{name} is no linear layer of the model{nearest(name, target_modules)}")
            modules[name] = _peft_merge(parts, target_modules[name], method, rank)
    return LoRAState(modules, format=f"merge_{method}")


def sum_svd(states: Sequence[LoRAState], rank: int, weights: Sequence[float] | None = None) -> LoRAState:
    """The best rank-`rank` approximation of the weighted sum of all updates, in fp64 inside.

    It is the SVD of ``B A`` with ``B = [w_1 B_1, ...]`` and ``A = [A_1; ...]`` (see `clora.lora.reduce.module_svd`).

    Args:
        states: at least one; ranks and modules may differ.
        rank: rank of the result; less where the sum itself has less. Pad it for a uniform file, but a rank that is
            zero in both factors never trains: give such rows random ``lora_A`` first.
        weights: one factor per LoRA, all 1 by default.

    Returns:
        Factors that share the singular values evenly, ``U sqrt(S)`` and ``sqrt(S) V^T``.

    Raises:
        CloraError: no states, a rank below 1, or a wrong number of weights.
    """
    weights = _checked_weights(states, rank, weights)
    modules = {name: _truncated_sum(parts, rank) for name, parts in _by_module(states, weights).items()}
    return LoRAState(modules, format="merge_sum_svd")


def _checked_weights(states: Sequence[LoRAState], rank: int, weights: Sequence[float] | None) -> list[float]:
    if not states:
        raise CloraError("nothing to merge; expected at least one LoRA")
    if rank < 1:
        raise CloraError(f"the rank of a merge must be at least 1, found {rank}")
    weights = [1.0] * len(states) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(states):
        raise CloraError(f"expected one weight per LoRA, found {len(weights)} weights for {len(states)} LoRAs")
    return weights


def _by_module(states: Sequence[LoRAState], weights: Sequence[float]) -> dict[str, list[tuple[LoRAModule, float]]]:
    """The (update, weight) pairs of each module, over the LoRAs that have it."""
    gathered: dict[str, list[tuple[LoRAModule, float]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, module in state.modules.items():
            gathered.setdefault(name, []).append((module, weight))
    return gathered


def _peft_merge(
    parts: Sequence[tuple[LoRAModule, float]], shape: tuple[int, int], method: str, rank: int
) -> LoRAModule:
    """Merges the updates of one layer of ``shape`` (out, in)."""
    from peft import LoraConfig, get_peft_model

    tree = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], bias=False)})
    configs = [LoraConfig(r=part.rank, lora_alpha=part.rank, target_modules=["layer"]) for part, _ in parts]
    names = [f"teacher_{index}" for index in range(len(parts))]
    model = get_peft_model(tree, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer: Any = tree["layer"]  # PEFT has put its own layer there
    for name, (part, _) in zip(names, parts, strict=True):
        layer.lora_A[name].weight.data.copy_(part.lora_A)
        layer.lora_B[name].weight.data.copy_(part.lora_B)
    merger: Any = model.base_model
    merger.add_weighted_adapter(
        names,
        [weight for _, weight in parts],
        "merged",
        combination_type=method,
        svd_rank=rank,
        # Only the first `rank` vectors are used, and the full U of a 12288-row layer alone takes 600 MB.
        svd_full_matrices=False,
        density=_DENSITY,
    )
    return LoRAModule(layer.lora_A["merged"].weight.data.clone(), layer.lora_B["merged"].weight.data.clone())


def _truncated_sum(parts: Sequence[tuple[LoRAModule, float]], rank: int) -> LoRAModule:
    lora_A = torch.cat([part.lora_A for part, _ in parts])
    lora_B = torch.cat([part.lora_B * weight for part, weight in parts], dim=1)
    return module_svd(lora_A, lora_B).truncated(rank)
