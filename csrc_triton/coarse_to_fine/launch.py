"""Tile sizes, workspaces and launches of the coarse-to-fine kernels: two for the loss and its gradient together."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from csrc_triton.coarse_to_fine.kernels import finish_kernel, partials_kernel
from csrc_triton.coarse_to_fine.reference import gradient_dtype
from csrc_triton.registration import wrap_triton

TILE = 2048
"""Elements per loop iteration of a program: 8 per thread, one 16-byte load of bf16 or two of fp32."""
WARPS = 8
MAX_CHUNKS = 128
"""Chunks per row at most: each program of `finish_kernel` reads the partial sums of a whole row."""
ROWS = 8
"""Rows at a time, a warp each, in the program of `finish_kernel` that makes the loss; 16 spilled on sm_90."""


class Chunks(NamedTuple):
    """The division of a row: a function of its size only, so that a row's result does not depend on its batch.

    Attributes:
        count: chunks per row.
        tiles: tiles per chunk, a power of two, so that few kernel variants are compiled.
    """

    count: int
    tiles: int


def chunks_of(numel: int) -> Chunks:
    tiles = triton.cdiv(numel, TILE)
    per_chunk = _power_of_two(triton.cdiv(tiles, MAX_CHUNKS))
    return Chunks(triton.cdiv(tiles, per_chunk), per_chunk)


def loss_kernels(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    renoised: Tensor,
    score_sigma: Tensor,
    critic: Tensor,
    teacher: Tensor,
    teacher_uncond: Tensor,
    anchor_target: Tensor,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches both kernels.

    Args:
        velocity, x, renoised, critic, teacher, teacher_uncond, anchor_target: `[rows, ...]`, any float dtype.
        sigma, kind, weight, score_sigma: `[rows]`.
        guidance: w of the teacher.

    Returns:
        loss `[]`, terms `[3]`, gradient_norm `[R]` (fp32), nonfinite `[R]` (bool) and the gradient with respect to
        velocity `[R, ...]` in `gradient_dtype`.
    """
    # Rows are read in place, also from wider tensors; a tensor is copied only if its rows are not contiguous themselves.
    latents = [
        t if t.shape[0] == 0 or t[0].is_contiguous() else t.contiguous()
        for t in (velocity, x, renoised, critic, teacher, teacher_uncond, anchor_target)
    ]
    velocity, x, renoised, critic, teacher, teacher_uncond, anchor_target = latents
    sigma, kind, weight, score_sigma = (t.contiguous() for t in (sigma, kind, weight, score_sigma))
    rows = velocity.shape[0]
    scored = score_sigma.shape[0]
    numel = velocity.shape[1:].numel()
    chunks = chunks_of(numel)
    outputs = loss_outputs(velocity)
    # The direction of an fp32 gradient is written where the gradient will be, which replaces it element by element.
    gradient = outputs[-1]
    direction = gradient if gradient.dtype == torch.float32 else _empty(velocity, tuple(velocity.shape))
    pitch = _power_of_two(chunks.count)
    distance, square = (_empty(velocity, (rows, pitch)) for _ in range(2))
    programs = rows * chunks.count
    sizes = {"TILE": TILE, "TILES": chunks.tiles, "CHUNKS": pitch, "num_warps": WARPS}
    with torch.cuda.device_of(velocity):
        if programs > 0:
            wrap_triton(partials_kernel)[(programs,)](
                velocity, x, sigma, renoised, score_sigma, critic, teacher, teacher_uncond, anchor_target,
                direction, distance, square, *(t.stride(0) for t in latents),
                scored, numel, chunks.count, guidance, **sizes,
            )  # fmt: skip
        wrap_triton(finish_kernel)[(1 + programs,)](
            direction, distance, square, sigma, kind, weight, *outputs,
            rows, scored, numel, chunks.count, ROWS=ROWS, BLOCKS=_power_of_two(triton.cdiv(rows, ROWS)), **sizes,
        )  # fmt: skip
    return outputs


def loss_outputs(velocity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of `loss_kernels`."""
    rows = velocity.shape[0]
    return (
        _empty(velocity, ()),
        _empty(velocity, (3,)),
        _empty(velocity, (rows,)),
        _empty(velocity, (rows,), torch.bool),
        _empty(velocity, tuple(velocity.shape), gradient_dtype(velocity.dtype)),
    )


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _power_of_two(n: int) -> int:
    """The smallest power of two not below n, at least 1; by comparisons only, so that a traced n is not fixed."""
    power = 1
    while power < n:
        power *= 2
    return power
