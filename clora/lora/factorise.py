"""A dense change of a weight as low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor

from clora.lora.state import LoRAModule

# The kernels take ranks up to this one; a bank with a higher one runs on eager PyTorch.
MAX_RANK = 256
# Relative error in the Frobenius norm up to which a dense change may be replaced by factors.
MAX_ERROR = 0.01

# Columns of the random sketch beyond the wanted rank, and power iterations. On random matrices, the hardest case, the
# error stays within 1 % of a full SVD's, which would take minutes for one layer of 12288 x 3072 on a core.
_OVERSAMPLING = 16
_ITERATIONS = 4


def factorise(delta: Tensor, max_rank: int = MAX_RANK, max_error: float = MAX_ERROR) -> tuple[LoRAModule, float]:
    """The lowest rank whose error is small enough, or the highest allowed one.

    Args:
        delta: ``[out, in]``.
        max_rank: the most ranks.
        max_error: the error to stay within.

    Returns:
        The factors, which share the singular values evenly, and ``|delta - B A| / |delta|`` in the Frobenius norm, which
        is above `max_error` where `max_rank` does not suffice. It is the same at every call.
    """
    delta = delta.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the sketch
        left, values, right = torch.svd_lowrank(delta, min(max_rank + _OVERSAMPLING, *delta.shape), _ITERATIONS)
    # What no rank of the sketch holds, then what is lost with each rank from the last one on.
    missed = (delta - (left * values) @ right.T).double().square().sum()
    lost = values.double().square().flip(0).cumsum(0).flip(0)
    total = delta.double().square().sum()
    errors = ((missed + torch.cat([lost[1:], lost.new_zeros(1)])[:max_rank]) / total).sqrt().nan_to_num(0.0)
    rank = min(int((errors > max_error).sum()) + 1, len(errors))
    root = values[:rank].sqrt()
    return LoRAModule(root[:, None] * right[:, :rank].T, left[:, :rank] * root), errors[rank - 1].item()
