"""Launches of the multi-adapter linear layer's kernels: grids, workspaces, tiles. No value is read on the host.

Shapes are as in `reference.py`. ``low`` is `[B, T, sum of ranks]`: the ranks of the projections that share an input stand
side by side, and an `offset` says where one begins. Rows of base samples in it are never written nor read.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from csrc_triton.multi_lora.kernels import (
    expand_add_kernel,
    gradients_kernel,
    linear_kernel,
    reduce_kernel,
    shrink_kernel,
)
from csrc_triton.multi_lora.tiles import (
    Machine,
    expand_tiles,
    gradient_tiles,
    linear_tiles,
    machine_of,
    reduce_tiles,
    shrink_tiles,
)
from csrc_triton.registration import wrap_triton

MAX_SHARED = 3
"""Projections whose ranks one shrink computes in one pass over their input."""


def shrink(x: Tensor, factors: Sequence[Tensor], scale: Tensor, ids: Tensor, low: Tensor, offset: int = 0) -> None:
    """``low[b, :, offset:] = scale[e] x[b] @ concat(factors)[e].T`` for every sample with an adapter.

    Args:
        x: `[B, T, C]`.
        factors: of each projection `[E, R, C]`, any strides.
        low: written, in the dtype of x.
    """
    for first in range(0, len(factors), MAX_SHARED):
        group = _of_one_layout(factors[first : first + MAX_SHARED])
        _shrink_group(_unit_stride(x), group, scale, ids, low, offset)
        offset += sum(factor.shape[1] for factor in group)


def expand_add(y: Tensor, low: Tensor, offset: int, factor: Tensor, ids: Tensor) -> None:
    """``y[b] += low[b, :, offset:] @ factor[e].T`` in place.

    Args:
        y: `[B, T, N]` contiguous.
        factor: `[E, N, R]`, any strides.
    """
    num_samples, tokens, outputs = y.shape
    rank = int(factor.shape[2])
    tiles = expand_tiles(machine_of(y.device), tokens, int(outputs), rank, y.element_size())
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    programs = num_samples * row_tiles * triton.cdiv(int(outputs), tiles["BLOCK_N"])
    if programs:
        wrap_triton(expand_add_kernel)[(programs,)](
            y, low, factor, ids, tokens, row_tiles, *factor.stride(),
            N=int(outputs), R=rank, LOW_R=int(low.shape[2]), LOW_OFFSET=offset, **tiles,
        )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, offset: int, factor: Tensor, ids: Tensor,
    y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias`` plus the low-rank part as in `expand_add`, in one kernel.

    Args:
        x: `[B, T, C]`.
        weight: `[N, C]`.
        y: `[B, T, N]` contiguous, to which the result is added in place.

    Returns:
        `[B, T, N]`: y where it was given.
    """
    x, weight, transposed = _unit_stride(x), *_contiguous_weight(weight)
    (num_samples, tokens, channels), outputs, rank = x.shape, int(weight.shape[0]), int(factor.shape[2])
    out = x.new_empty(num_samples, tokens, outputs) if y is None else y
    machine = _with_descriptors_if_aligned(machine_of(x.device), x, weight.mT if transposed else weight)
    tiles = linear_tiles(machine, tokens, outputs, int(channels), rank, x.element_size())
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    all_row_tiles = num_samples * row_tiles
    programs = all_row_tiles * triton.cdiv(outputs, tiles["BLOCK_N"])
    if programs:
        if tiles["DESCRIPTORS"]:
            triton.set_allocator(_descriptor_memory)
        wrap_triton(linear_kernel)[(programs,)](
            x, weight, weight if bias is None else bias, out, low, factor, ids,
            tokens, row_tiles, all_row_tiles, x.stride(0), x.stride(1), *factor.stride(),
            C=int(channels), N=outputs, R=rank, LOW_R=int(low.shape[2]), LOW_OFFSET=offset,
            WEIGHT_CN=transposed, HAS_BIAS=bias is not None, ADD=y is not None, **tiles,
        )  # fmt: skip
    return out


def gradients(
    x: Tensor, low_in: Tensor, rank: int, ids: Tensor, offset: int = 0,
    shrunk: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Partial sums of ``x^T low_in[:, :, offset : offset + rank]``; in the same pass over x, optionally, its shrink.

    Args:
        x: `[B, T, C]`.
        low_in: `[B, T, ...]` of x's dtype.
        shrunk: ``(factor [E, R, C], scale, low)``: also writes low as `shrink` does.

    Returns:
        `[B, chunks, C, rank]` fp32; the entries of base samples are not written.
    """
    x = _unit_stride(x)
    num_samples, tokens, channels = x.shape
    factor_bytes = (low_in if shrunk is None else shrunk[0]).element_size()
    tiles = gradient_tiles(machine_of(x.device), tokens, int(channels), rank, x.element_size(), factor_bytes)
    chunks = triton.cdiv(tokens, tiles["CHUNK"])
    partial = x.new_empty((num_samples, chunks, channels, rank), dtype=torch.float32)
    # Without shrunk these three are neither read nor written.
    factor, scale, low = (low_in, ids, partial) if shrunk is None else shrunk
    programs = num_samples * chunks * _programs_per_chunk(tiles, int(channels), rank, shrunk is not None)
    if programs:
        wrap_triton(gradients_kernel)[(programs,)](
            x, low_in, partial, low, factor, scale, ids,
            tokens, chunks, x.stride(0), x.stride(1), *factor.stride(),
            C=int(channels), R=rank, LOW_R=int(low_in.shape[2]), LOW_OFFSET=offset, SHRINK=shrunk is not None, **tiles,
        )  # fmt: skip
    return partial


def reduce(partial: Tensor, offset: int, out: Tensor, ids: Tensor, transposed: bool = False) -> Tensor:
    """Sums ``partial[..., offset:]`` over the samples of each adapter, in the order of the batch.

    Args:
        partial: `[B, chunks, C, ranks]`.
        out: `[E, C, R]`, or `[E, R, C]` where transposed; written whole, in its dtype, and returned.
    """
    num_samples, chunks, channels, ranks = partial.shape
    per_adapter, per_channel, per_rank = out.stride()
    rank = int(out.shape[2])
    if transposed:
        per_channel, per_rank, rank = per_rank, per_channel, int(out.shape[1])
    tiles = reduce_tiles(rank)
    programs = out.shape[0] * triton.cdiv(int(channels), tiles["BLOCK_C"])
    wrap_triton(reduce_kernel)[(programs,)](
        partial, out, ids, num_samples, chunks, per_adapter, per_channel, per_rank,
        C=int(channels), R=rank, PARTIAL_R=int(ranks), PARTIAL_OFFSET=offset, **tiles,
    )  # fmt: skip
    return out


def _shrink_group(x, factors, scale, ids, low, offset: int) -> None:
    num_samples, tokens, channels = x.shape
    ranks = [int(factor.shape[1]) for factor in factors]
    tiles = shrink_tiles(
        machine_of(x.device), tokens, int(channels), sum(ranks), x.element_size(), factors[0].element_size()
    )
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    programs = num_samples * row_tiles * triton.cdiv(sum(ranks), tiles["BLOCK_R"])
    if not programs:
        return
    missing = MAX_SHARED - len(factors)
    factors, ranks = [*factors, *[factors[0]] * missing], ranks + [0] * missing
    strides = [stride for factor in factors for stride in factor.stride()[:2]]
    wrap_triton(shrink_kernel)[(programs,)](
        x, low, *factors, scale, ids, tokens, row_tiles, x.stride(0), x.stride(1), *strides, factors[0].stride(2),
        C=int(channels), R0=ranks[0], R1=ranks[1], R2=ranks[2],
        LOW_R=int(low.shape[2]), LOW_OFFSET=offset, **tiles,
    )  # fmt: skip


def _programs_per_chunk(tiles, channels: int, rank: int, shrinks: bool) -> int:
    per_rank = triton.cdiv(channels, tiles["BLOCK_C"]) + shrinks * (tiles["CHUNK"] // tiles["BLOCK_M"])
    return per_rank * triton.cdiv(rank, tiles["BLOCK_R"])


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_one_layout(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors with one dtype and one stride of channels, which the kernel shares among them."""
    if len(factors) == 1:
        return list(factors)
    dtype = factors[0].dtype if len({factor.dtype for factor in factors}) == 1 else torch.float32
    return [_unit_stride(factor.to(dtype)) for factor in factors]


def _contiguous_weight(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight `[N, C]` and whether memory holds it as `[C, N]`."""
    if weight.mT.is_contiguous() and not weight.is_contiguous():
        return weight, True
    return weight.contiguous(), False


def _with_descriptors_if_aligned(machine: Machine, *tensors: Tensor) -> Machine:
    """A descriptor's start and row strides are multiples of 16 bytes; otherwise it reads wrong values without an error."""
    return machine._replace(descriptors=machine.descriptors and all(map(_aligned, tensors)))


def _aligned(tensor: Tensor) -> bool:
    outer = tensor.stride()[:-1]
    return 0 not in outer and all(n * tensor.element_size() % 16 == 0 for n in (tensor.storage_offset(), *outer))


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
