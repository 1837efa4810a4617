"""A dense change of a weight as low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor

from clora.lora.state import LoRAModule

# The kernels take ranks up to this one; a bank with a higher one runs on eager PyTorch.
MAX_RANK = 256
# Relative error in the Frobenius norm up to which a dense change may be replaced by factors.
MAX_ERROR = 0.01

# Columns of the random sketch beyond the wanted rank, and power iterations: together they bring the found singular
# values to those of a full SVD, which takes a minute for one layer of 3072 x 12288 on one core.
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
    delta = delta.double()
    size = min(max_rank + _OVERSAMPLING, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the sketch
        left, values, right = torch.svd_lowrank(delta, q=size, niter=_ITERATIONS)
    total = delta.square().sum()
    # Left is orthonormal and right the SVD of its projection, so what a cut leaves out is exactly the rest of the norm.
    rest = (total - values.square().cumsum(0)).clamp_min(0)[:max_rank]
    errors = (rest / total).sqrt() if total > 0 else torch.zeros(1)
    rank = min(int((errors > max_error).sum()) + 1, len(errors))
    root = values[:rank].sqrt()
    module = LoRAModule((root[:, None] * right[:, :rank].T).float(), (left[:, :rank] * root).float())
    return module, errors[rank - 1].item()
