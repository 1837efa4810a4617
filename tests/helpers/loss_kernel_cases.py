"""Inputs of the loss on the kernels' device, and the results of a loss function, for the tests of its Triton kernels.

Import it after `pytest.importorskip("triton")`.
"""

from __future__ import annotations

import torch
from helpers.loss_cases import LATENT, make

from clora.ops import Scores
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def case(kinds, latent=LATENT, dtype=torch.float32, seed=0):
    """Inputs on the device; in the interpreter velocity is never bf16, which it truncates where a GPU rounds."""
    c = make(kinds, latent, dtype, seed)
    velocity = c["velocity"].detach()
    if INTERPRETED and dtype == torch.bfloat16:
        velocity = velocity.float()
    moved = {name: t.to(DEVICE) for name, t in c.items() if isinstance(t, torch.Tensor)}
    scores = Scores(*(t.to(DEVICE) for t in c["scores"]))
    return c | moved | {"velocity": velocity.to(DEVICE).requires_grad_(), "scores": scores}


def run(loss_function, c, upstream=1.0):
    """Loss, terms and gradient as one mapping."""
    velocity = c["velocity"].detach().clone().requires_grad_()
    loss, terms = loss_function(**{**c, "velocity": velocity})
    (gradient,) = torch.autograd.grad(loss * upstream, velocity)
    return terms | {"loss": loss.detach(), "gradient": gradient}


def upcast(c):
    double = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    return {name: double(value) for name, value in c.items()} | {"scores": Scores(*map(double, c["scores"]))}
