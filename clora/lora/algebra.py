"""Low-rank updates as matrices: factors of a dense change, lower ranks, errors, and merges of several LoRAs.

Ranks and errors are found in fp64 and without the ``[out, in]`` product of factors wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clora.errors import CloraError, nearest
from clora.lora.layers import LayerShapes
from clora.lora.state import LoRAModule, LoRAState

# The kernels take ranks up to this one; a bank with a higher one runs on eager PyTorch.
MAX_RANK = 256
# Relative error in the Frobenius norm up to which a dense change may be replaced by factors.
MAX_ERROR = 0.01

# Ridge of a least-squares fit, relative to the mean second moment of a layer's inputs: keeps directions that hardly any
# input has from growing.
RIDGE = 1e-2

# Columns of the random sketch beyond the wanted rank, and power iterations. On random matrices, the hardest case, the
# error stays within 1 % of a full SVD's, which would take minutes for one layer of 12288 x 3072 on a core.
_OVERSAMPLING = 16
_ITERATIONS = 4


def factorise(delta: Tensor, max_rank: int = MAX_RANK, max_error: float = MAX_ERROR) -> tuple[LoRAModule, float]:
    """Factorises a dense change at the lowest rank whose error is small enough, or at the highest allowed one.

    Args:
        delta: ``[out, in]``.
        max_rank: the most ranks.
        max_error: the error to stay within.

    Returns:
        The factors, which share the singular values evenly, and ``|delta - B A| / |delta|`` in the Frobenius norm. Where
        `max_rank` does not suffice, the error is above `max_error`. Both are the same at every call.
    """
    delta = delta.float()
    # The sketch is random: its own seed makes the result repeatable, and the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(delta, min(max_rank + _OVERSAMPLING, *delta.shape), _ITERATIONS)
    # Squared norm of the sketch's residual, and of the ranks dropped, from the last one on.
    missed = (delta - (left * values) @ right.T).double().square().sum()
    lost = values.double().square().flip(0).cumsum(0).flip(0)
    total = delta.double().square().sum()
    errors = ((missed + torch.cat([lost[1:], lost.new_zeros(1)])[:max_rank]) / total).sqrt().nan_to_num(0.0)
    # errors[r - 1] is that of rank r, and they fall, so the ranks that miss the limit come first.
    rank = min(int((errors > max_error).sum()) + 1, len(errors))
    root = values[:rank].sqrt()
    return LoRAModule(root[:, None] * right[:, :rank].T, left[:, :rank] * root), errors[rank - 1].item()


def truncated(module: LoRAModule, rank: int) -> LoRAModule:
    """Returns the best approximation of an update of that rank, in fp64 inside.

    Returns:
        Factors that share the singular values evenly, ``U sqrt(S)`` and ``sqrt(S) V^T``.
    """
    lora_A, lora_B = _cut(module.lora_A.double(), module.lora_B.double(), rank)
    return LoRAModule(lora_A.float(), lora_B.float())


def _cut(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns ``sqrt(S) V^T`` and ``U sqrt(S)`` of the largest singular values of ``B A``, in the factors' dtype.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the SVD of ``B A`` follows from that of ``R_B R_A^T``. This core is at most
    ``[rank, rank]``.
    """
    basis_B, factor_B = torch.linalg.qr(lora_B)  # [out, r], [r, r]
    basis_A, factor_A = torch.linalg.qr(lora_A.T)  # [in, r], [r, r]
    # The bases are orthonormal, so the singular values of the small core are those of the product.
    left, values, right = torch.linalg.svd(factor_B @ factor_A.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]) @ basis_A.T, basis_B @ (left[:, :rank] * root)


def least_squares(lora_B: Tensor, moments_A: Tensor, moments: Tensor, rank: int, ridge: float = RIDGE) -> LoRAModule:
    """Returns one update that changes the inputs of several updates as each of them changes its own.

    It is the D of that rank that minimises ``sum_k sum_x |D x - B_k A_k x|^2 + lambda |D|^2`` over the inputs x of each
    update k, in fp64 inside.

    Args:
        lora_B: ``[out, R]`` the updates' ``B_k``, side by side.
        moments_A: ``[R, in]`` their ``A_k sum_x x x^T``, one under the other, each over its own inputs.
        moments: ``[in, in]`` S, the sum of ``x x^T`` over all inputs; also over those that are to stay as they are.
        rank: of the result; less where the updates together have less.
        ridge: lambda over the mean of the diagonal of S, which is not zero.

    Returns:
        Factors that share the singular values of D evenly.
    """
    S = moments.to(torch.float64, copy=True)
    S.diagonal().add_(ridge * S.diagonal().mean())
    C = torch.linalg.cholesky(S)  # S + lambda = C C^T
    # At full rank D = B M (S + lambda)^-1 with these B and M = A S. Any other D has a loss that is larger by the square of
    # the Frobenius norm of their difference times C, so that the SVD of D C = B (M C^-T) cuts best.
    scaled = torch.linalg.solve_triangular(C, moments_A.double().T, upper=False).T
    lora_A, lora_B = _cut(scaled, lora_B.double(), rank)
    lora_A = torch.linalg.solve_triangular(C, lora_A, upper=False, left=False)
    lora_A, lora_B = _cut(lora_A, lora_B, rank)
    return LoRAModule(lora_A.float(), lora_B.float())


def reduce_to_rank(state: LoRAState, rank: int) -> LoRAState:
    """Reduces every module to at most this rank; one that already is stays as it is, to the bit.

    Raises:
        CloraError: a rank below 1.
    """
    if rank < 1:
        raise CloraError(f"expected a rank of at least 1, found {rank}")
    return _reduced(state, dict.fromkeys(state.modules, rank))


def reduce_to_energy(state: LoRAState, energy: float, uniform: bool) -> LoRAState:
    """Reduces every module to the lowest rank at which it keeps a share of its energy.

    The energy of a module is the sum of its squared singular values.

    Args:
        state: the LoRA to reduce.
        energy: the share to keep, above 0 and at most 1.
        uniform: for a file of one rank: the largest of these ranks for every module that has it.

    Raises:
        CloraError: a share outside the range.
    """
    if not 0 < energy <= 1:
        raise CloraError(f"expected a share of energy above 0 and at most 1, found {energy:g}")
    ranks = {}
    for name, module in state.modules.items():
        # The ranks that keep too little come first; a module of zeros needs one rank.
        kept = _kept_energy(module)
        ranks[name] = int((kept < energy * kept[-1]).sum()) + 1
    return _reduced(state, dict.fromkeys(ranks, max(ranks.values(), default=1)) if uniform else ranks)


def _reduced(state: LoRAState, ranks: Mapping[str, int]) -> LoRAState:
    modules = dict(state.modules)
    for name, module in state.modules.items():
        if module.rank > ranks[name]:
            modules[name] = truncated(module, ranks[name])
    return LoRAState(modules, state.metadata, state.format)


def energy_share(module: LoRAModule, rank: int) -> float:
    """Returns the share of a module's energy that its best approximation of that rank keeps."""
    kept = _kept_energy(module)
    return (kept[rank - 1] / kept[-1]).item() if kept[-1] > 0 else 1.0


def _kept_energy(module: LoRAModule) -> Tensor:
    """Returns the energy that each rank from 1 on keeps, ``[rank]`` fp64."""
    return torch.linalg.svd(_core(module), full_matrices=False).S.square().cumsum(0)


def stored_as(module: LoRAModule, dtype: torch.dtype) -> LoRAModule:
    """Returns the module, in fp32, that a reader finds after it was written in that type."""
    return LoRAModule(module.lora_A.to(dtype).float(), module.lora_B.to(dtype).float())


def balanced(module: LoRAModule) -> LoRAModule:
    """Returns the same update, exactly, with both factors of each rank about equally large, for fp8's narrow range.

    They are scaled by powers of two, since fp8 has a smallest step of 0.002 and no place for a scale of its own.
    """
    size_A = module.lora_A.abs().amax(dim=1)  # [rank]
    size_B = module.lora_B.abs().amax(dim=0)  # [rank]
    # B 2^-e times 2^e A is the same product to the bit; the exponent is half of the ratio of sizes.
    exponent = ((size_B / size_A).log2() / 2).round()
    factor = torch.where((size_A > 0) & (size_B > 0), exponent, 0.0).exp2()
    return LoRAModule(module.lora_A * factor[:, None], module.lora_B / factor)


def relative_error(before: LoRAModule, after: LoRAModule) -> float:
    """Returns ``|after - before| / |before|`` of the updates, in the Frobenius norm; 0 where both are zero."""
    # Up to its sign, the difference is itself an update, of the sum of both ranks.
    difference = LoRAModule(torch.cat([before.lora_A, after.lora_A]), torch.cat([before.lora_B, -after.lora_B], dim=1))
    norm = _core(before).norm().item()
    change = _core(difference).norm().item()
    return change / norm if norm else (float("inf") if change else 0.0)


def _core(module: LoRAModule) -> Tensor:
    """Returns a matrix of at most ``[rank, rank]`` with the update's singular values and norm, in fp64."""
    factor_B = torch.linalg.qr(module.lora_B.double(), mode="r").R
    factor_A = torch.linalg.qr(module.lora_A.double().T, mode="r").R
    return factor_B @ factor_A.T


# The methods of PEFT that take adapters of unequal rank.
MERGE_METHODS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
# Share of each update that the pruning methods keep; half is in the middle of what TIES and DARE report as good.
_DENSITY = 0.5


def merge_states(
    states: Sequence[LoRAState], shapes: LayerShapes, method: str, rank: int, weights: Sequence[float]
) -> LoRAState:
    """Merges LoRAs with PEFT's ``add_weighted_adapter``.

    Each layer is merged on its own bare ``nn.Linear``, so that no copy of the model is needed. A LoRA without some
    module counts as zero there. Methods that drop weights at random drop the same at every call.

    Args:
        states: at least one; ranks and modules may differ.
        shapes: of the transformer's layers.
        method: one of `MERGE_METHODS`.
        rank: rank of the result (at most the layer's smaller side).
        weights: one factor per LoRA; 1 is an effect at full strength.

    Raises:
        CloraError: no states, an unknown method or module, a rank below 1, or a wrong number of weights.
    """
    gathered = _by_module(states, rank, weights)
    if method not in MERGE_METHODS:
        raise CloraError(
            f"unknown merge method {method!r}; expected one of {', '.join(MERGE_METHODS)}{nearest(method, MERGE_METHODS)}"
        )
    modules = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parts in gathered.items():
            if name not in shapes:
                raise CloraError(f"{name} is not a linear layer of the model{nearest(name, shapes)}")
            modules[name] = _peft_merge(parts, shapes[name], method, rank)
    return LoRAState(modules, format=f"merge_{method}")


def sum_svd(states: Sequence[LoRAState], rank: int, weights: Sequence[float]) -> LoRAState:
    """Returns the best rank-`rank` approximation of the weighted sum of all updates, in fp64 inside.

    It is the SVD of ``B A`` with ``B = [w_1 B_1, ...]`` and ``A = [A_1; ...]`` (see `truncated`).

    Args:
        states: at least one; ranks and modules may differ.
        rank: rank of the result; less where the sum itself has less. Pad it for a uniform file, but a rank that is
            zero in both factors never trains: give such rows random ``lora_A`` first.
        weights: one factor per LoRA.

    Returns:
        Factors that share the singular values evenly, ``U sqrt(S)`` and ``sqrt(S) V^T``.

    Raises:
        CloraError: no states, a rank below 1, or a wrong number of weights.
    """
    modules = {}
    for name, parts in _by_module(states, rank, weights).items():
        # Stacked factors multiply to the sum of all products: [sum of ranks, in] and [out, sum of ranks].
        lora_A = torch.cat([part.lora_A for part, _ in parts])
        lora_B = torch.cat([part.lora_B * weight for part, weight in parts], dim=1)
        modules[name] = truncated(LoRAModule(lora_A, lora_B), rank)
    return LoRAState(modules, format="merge_sum_svd")


def _by_module(
    states: Sequence[LoRAState], rank: int, weights: Sequence[float]
) -> dict[str, list[tuple[LoRAModule, float]]]:
    """Returns the (update, weight) pairs of each module, over the LoRAs that have it. Raises CloraError as both merges."""
    if not states:
        raise CloraError("nothing to merge; expected at least one LoRA")
    if rank < 1:
        raise CloraError(f"the rank of a merge must be at least 1, found {rank}")
    if len(weights) != len(states):
        raise CloraError(f"expected one weight per LoRA, found {len(weights)} weights for {len(states)} LoRAs")
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
    # alpha = rank: PEFT then scales by 1, and each update is merged as it is.
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
        # Only the first `rank` vectors are used, and the full U of a 12288-row layer would take 600 MB.
        svd_full_matrices=False,
        density=_DENSITY,
    )
    return LoRAModule(layer.lora_A["merged"].weight.data.clone(), layer.lora_B["merged"].weight.data.clone())
