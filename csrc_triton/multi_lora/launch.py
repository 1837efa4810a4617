"""Launches of the multi-adapter linear layer's kernels: grids, workspaces, tiles. No value is read on the host.

Shapes are as in `reference.py`; factors are of x's dtype. ``low`` is `[B, T, sum of ranks]`: the ranks of the projections
that share an input stand side by side, and `offset` is where one begins. Rows of base samples in it are never written nor read.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from csrc_triton.multi_lora.kernels import (
    expand_kernel,
    fused_kernel,
    gradients_kernel,
    linear_kernel,
    reduce_kernel,
    shrink_kernel,
)
from csrc_triton.multi_lora.tiles import (
    expand_tiles,
    fused_tiles,
    gradient_tiles,
    linear_tiles,
    machine_of,
    reduce_tiles,
    shrink_tiles,
)
from csrc_triton.registration import wrap_triton
from csrc_triton.replay import do, launch

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
        group = list(factors[first : first + MAX_SHARED])
        if len(group) > 1:  # the kernel takes one stride of channels
            group = [_unit_stride(factor) for factor in group]
        ranks = [int(factor.shape[1]) for factor in group]
        tiles = shrink_tiles(machine_of(x.device), tokens, int(channels), sum(ranks), x.element_size())
        row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
        # The kernel takes three factors; those of rank 0 are not read.
        missing = MAX_SHARED - len(group)
        group += [group[0]] * missing
        strides = [stride for factor in group for stride in factor.stride()[:2]]
        r0, r1, r2 = ranks + [0] * missing
        _launch(
            shrink_kernel, num_samples * row_tiles * triton.cdiv(sum(ranks), tiles["BLOCK_R"]),
            x, low, *group, scale, ids, tokens, channels, r0, r1, r2, low.shape[2], offset, row_tiles,
            x.stride(0), x.stride(1), *strides, group[0].stride(2),
            FACTORS=len(ranks), ALIGNED=len(ranks) > 1 and _aligned(*group), **tiles,
        )  # fmt: skip
        offset += sum(ranks)


def expand(
    low: Tensor, offset: int, factor: Tensor, ids: Tensor, bias: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """``base + bias + low[b, :, offset:] @ factor[e].T``; rows without an adapter are ``base + bias``.

    Args:
        factor: `[E, N, R]`, any strides.
        bias: `[N]`, or None for zero.
        base: `[B, T, N]`, or None for zero.

    Returns:
        `[B, T, N]`.
    """
    (num_samples, tokens, ranks), (_, outputs, rank) = low.shape, factor.shape
    y = do(Tensor.new_empty, low, num_samples, tokens, outputs)
    tiles = expand_tiles(machine_of(low.device), tokens, int(outputs), int(rank), low.element_size())
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    _launch(
        expand_kernel, num_samples * row_tiles * triton.cdiv(outputs, tiles["BLOCK_N"]),
        y if base is None else _contiguous(base), y if bias is None else bias, y, low, factor, ids,
        tokens, outputs, rank, ranks, offset, row_tiles, *factor.stride(),
        HAS_BIAS=bias is not None, ADD=base is not None, **tiles,
    )  # fmt: skip
    return y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, offset: int, factor: Tensor, ids: Tensor,
    y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x @ weight.T + bias`` plus the low-rank part as in `expand`, in one kernel.

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
        weight = _contiguous(weight)
    num_samples, tokens, channels = x.shape
    (adapters, outputs, rank), ranks = factor.shape, low.shape[2]
    out = do(Tensor.new_empty, x, num_samples, tokens, outputs) if y is None else y
    machine = machine_of(x.device)
    modes = {"WEIGHT_CN": transposed, "HAS_BIAS": bias is not None, "ADD": y is not None}
    of_rows = (int(outputs), int(channels), int(rank), x.element_size())
    arguments = (x, weight, weight if bias is None else bias, out, low, factor, ids)
    if machine.descriptors and _aligned(x, weight, out, low, factor, first=offset):
        by_rank = factor.stride(1) == 1  # memory holds it as [E, R, N]
        tiles = fused_tiles(machine, tokens, *of_rows)
        row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
        all_row_tiles = num_samples * row_tiles
        do(triton.set_allocator, _descriptor_memory)
        _launch(
            fused_kernel, min(machine.multiprocessors, all_row_tiles * triton.cdiv(outputs, tiles["BLOCK_N"])),
            *arguments, num_samples, adapters, tokens, channels, outputs, rank, offset, row_tiles, all_row_tiles,
            *x.stride()[:2], out.stride(0), *low.stride()[:2], factor.stride(0), factor.stride(2 if by_rank else 1),
            FACTOR_RN=by_rank, **modes, **tiles,
        )  # fmt: skip
        return out
    tiles = linear_tiles(machine, tokens, *of_rows)
    row_tiles = triton.cdiv(tokens, tiles["BLOCK_M"])
    all_row_tiles = num_samples * row_tiles
    _launch(
        linear_kernel, all_row_tiles * triton.cdiv(outputs, tiles["BLOCK_N"]),
        *arguments, tokens, channels, outputs, rank, ranks, offset, row_tiles, all_row_tiles,
        x.stride(0), x.stride(1), *factor.stride(), **modes, **tiles,
    )  # fmt: skip
    return out


def gradients(
    x: Tensor, low_in: Tensor, rank: int, ids: Tensor, offset: int = 0,
    shrunk: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Tensor:  # fmt: skip
    """Partial sums of ``x^T low_in[:, :, offset : offset + rank]``; in the same pass over x, optionally, its shrink.

    Args:
        x: `[B, T, C]`.
        low_in: `[B, T, ...]` of x's dtype.
        shrunk: ``(factor [E, R, C], scale, low, offset)``: also writes low as `shrink` does.

    Returns:
        `[B, chunks, C, rank]` fp32; the entries of base samples are not written.
    """
    x = _unit_stride(x)
    num_samples, tokens, channels = x.shape
    tiles = gradient_tiles(machine_of(x.device), tokens, int(channels), rank, x.element_size())
    chunks = triton.cdiv(tokens, tiles["CHUNK"])
    partial = do(Tensor.new_empty, x, (num_samples, chunks, channels, rank), dtype=torch.float32)
    # Without shrunk these three are neither read nor written.
    factor, scale, low, low_offset = (low_in, ids, partial, 0) if shrunk is None else shrunk
    # A program takes a block of channels for the partial sums, or a tile of rows for the shrink.
    per_rank_block = triton.cdiv(int(channels), tiles["BLOCK_C"])
    if shrunk is not None:
        per_rank_block += tiles["CHUNK"] // tiles["BLOCK_M"]
    _launch(
        gradients_kernel, num_samples * chunks * per_rank_block * triton.cdiv(rank, tiles["BLOCK_R"]),
        x, low_in, partial, low, factor, scale, ids,
        tokens, channels, rank, low_in.shape[2], offset, low.shape[2], low_offset, chunks,
        x.stride(0), x.stride(1), *factor.stride(), SHRINK=shrunk is not None, **tiles,
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
        partial, out, ids, num_samples, chunks, channels, rank, ranks, offset,
        per_adapter, per_channel, per_rank, **tiles,
    )  # fmt: skip
    return out


def _descriptor_memory(size: int, alignment: int, stream) -> Tensor:
    """Memory in which a kernel makes its tensor maps."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(kernel, programs: int, *arguments, **constants) -> None:
    """Launches a kernel on a grid of programs, which may be empty."""
    if programs:
        launch(kernel, programs, arguments, constants, wrap_triton)


def _contiguous(x: Tensor) -> Tensor:
    # Where there is nothing to copy, a replay has one step less.
    return x if x.is_contiguous() else do(Tensor.contiguous, x)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else do(Tensor.contiguous, x)


def _aligned(*tensors: Tensor, first: int = 0) -> bool:
    """Tests whether all rows begin at multiples of 16 bytes; descriptors and hints would misread others without an error.

    Args:
        tensors: of which one stride is 1: that within a row.
        first: an element at which rows may begin, too.
    """
    for tensor in tensors:
        strides = list(tensor.stride())
        if 1 not in strides or 0 in strides:
            return False
        strides.remove(1)
        if _start(tensor) % 16 or any(elements * tensor.element_size() % 16 for elements in (first, *strides)):
            return False
    return True


def _start(tensor: Tensor) -> int:
    """The address of the first element; of a tensor that is traced its place in the storage, which PyTorch aligns."""
    if type(tensor) in (Tensor, Parameter):
        return tensor.data_ptr()  # a storage may begin anywhere: in a file that is mapped, in memory of other libraries
    return tensor.storage_offset() * tensor.element_size()
