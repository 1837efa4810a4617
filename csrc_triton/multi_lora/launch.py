"""Launches of the multi-adapter linear layer's kernels: grids, workspaces, tiles. No value is read on the host.

Shapes are as in `reference.py`. ``low`` is `[B, T, sum of ranks]`: the ranks of the projections that share an input stand
side by side, and `offset` is where one begins. Rows of base samples in it are never written nor read.
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
    x = _unit_stride(x)
    num_samples, tokens, channels = x.shape
    for first in range(0, len(factors), MAX_SHARED):
        group = _of_one_layout(factors[first : first + MAX_SHARED])
        ranks = [int(factor.shape[1]) for factor in group]
        tiles = shrink_tiles(
            machine_of(x.device), tokens, int(channels), sum(ranks), x.element_size(), group[0].element_size()
        )
        row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
        # The kernel takes three factors; those of rank 0 are not read.
        missing = MAX_SHARED - len(group)
        group += [group[0]] * missing
        strides = [stride for factor in group for stride in factor.stride()[:2]]
        r0, r1, r2 = ranks + [0] * missing
        _launch(
            shrink_kernel, num_samples * row_tiles * triton.cdiv(sum(ranks), tiles["BLOCK_R"]),
            x, low, *group, scale, ids, tokens, row_tiles, x.stride(0), x.stride(1), *strides, group[0].stride(2),
            C=int(channels), R0=r0, R1=r1, R2=r2, LOW_R=int(low.shape[2]), LOW_OFFSET=offset,
            ALIGNED=len(ranks) > 1 and _aligned(*group), **tiles,
        )  # fmt: skip
        offset += sum(ranks)


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
    _launch(
        expand_add_kernel, num_samples * row_tiles * triton.cdiv(int(outputs), tiles["BLOCK_N"]),
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
    x = _unit_stride(x)
    transposed = weight.mT.is_contiguous() and not weight.is_contiguous()  # memory holds it as [C, N]
    if not transposed:
        weight = weight.contiguous()
    num_samples, tokens, channels = x.shape
    outputs = int(weight.shape[0])
    out = x.new_empty(num_samples, tokens, outputs) if y is None else y
    machine = machine_of(x.device)
    if machine.descriptors and not _aligned(x, weight.mT if transposed else weight):
        machine = machine._replace(descriptors=False)
    tiles = linear_tiles(machine, tokens, outputs, int(channels), int(factor.shape[2]), x.element_size())
    if tiles["DESCRIPTORS"]:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    all_row_tiles = num_samples * row_tiles
    _launch(
        linear_kernel, all_row_tiles * triton.cdiv(outputs, tiles["BLOCK_N"]),
        x, weight, weight if bias is None else bias, out, low, factor, ids,
        tokens, row_tiles, all_row_tiles, x.stride(0), x.stride(1), *factor.stride(),
        C=int(channels), N=outputs, R=int(factor.shape[2]), LOW_R=int(low.shape[2]), LOW_OFFSET=offset,
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
    # A program takes a block of channels for the partial sums, or a tile of rows for the shrink.
    per_rank_block = triton.cdiv(int(channels), tiles["BLOCK_C"])
    if shrunk is not None:
        per_rank_block += tiles["CHUNK"] // tiles["BLOCK_M"]
    _launch(
        gradients_kernel, num_samples * chunks * per_rank_block * triton.cdiv(rank, tiles["BLOCK_R"]),
        x, low_in, partial, low, factor, scale, ids, tokens, chunks, x.stride(0), x.stride(1), *factor.stride(),
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
    _launch(
        reduce_kernel, out.shape[0] * triton.cdiv(int(channels), tiles["BLOCK_C"]),
        partial, out, ids, num_samples, chunks, per_adapter, per_channel, per_rank,
        C=int(channels), R=rank, PARTIAL_R=int(ranks), PARTIAL_OFFSET=offset, **tiles,
    )  # fmt: skip
    return out


def _launch(kernel, programs: int, *arguments, **constants) -> None:
    """Launches a kernel on a grid of programs, which may be empty."""
    if programs:
        wrap_triton(kernel)[(programs,)](*arguments, **constants)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_one_layout(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors with one dtype and one stride of channels, which the kernel shares among them."""
    if len(factors) == 1:
        return list(factors)
    dtype = factors[0].dtype if len({factor.dtype for factor in factors}) == 1 else torch.float32
    return [_unit_stride(factor.to(dtype)) for factor in factors]


def _aligned(*tensors: Tensor) -> bool:
    """Tests whether all rows begin at multiples of 16 bytes; descriptors and hints would misread others without an error."""
    for tensor in tensors:
        outer = tensor.stride()[:-1]
        starts = [elements * tensor.element_size() for elements in (tensor.storage_offset(), *outer)]
        if 0 in outer or any(start % 16 for start in starts):
            return False
    return True
