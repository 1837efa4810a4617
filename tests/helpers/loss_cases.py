"""Random inputs of `coarse_to_fine_loss`, for the tests of the reference and of the kernels."""

from __future__ import annotations

import torch

from clora.ops import Scores

LATENT = (3, 4, 5)
GUIDANCE = 4.0
CASES = {
    "all_kinds": [0, 1, 0, 1, 1, 2, 2],
    "bs_only": [0, 0, 0],
    "ts_only": [1],
    "anchor_only": [2, 2],
    "bs_and_anchor": [0, 2],
    "empty": [],
}


def make(kinds, latent=LATENT, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    level = lambda n: torch.rand(n, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    r, d = len(kinds), sum(k < 2 for k in kinds)
    scores = Scores(rand(d, *latent), level(d), *(rand(d, *latent) for _ in range(3)))
    return {
        "velocity": rand(r, *latent).requires_grad_(),
        "x": rand(r, *latent),
        "sigma": level(r),
        "kind": torch.tensor(kinds, dtype=torch.int64),
        "weight": 0.5 + level(r),
        "scores": scores,
        "anchor_target": rand(r - d, *latent),
        "guidance": GUIDANCE,
    }
