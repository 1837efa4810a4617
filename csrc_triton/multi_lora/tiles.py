"""Tile sizes of the multi-adapter linear layer, per shape and machine; never by the number of samples in a batch.

A sample's result is then the same to the bit by itself and in any batch. The sizes follow from arithmetic on shared memory
and registers and from the compiler's output (`csrc_triton/README.md`).
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

MAX_BLOCK_R = 256
"""Largest number of ranks per program: 64 rows of fp32 sums, 128 registers of each thread of four warps."""
LINEAR_BLOCK_R = 64
"""Ranks per step behind the base product: their operands reuse the shared memory of its channel loop."""

HOPPER = 200_000
"""Bytes of shared memory of which every GPU since Hopper has more."""
RESERVED = 16384
"""Bytes of shared memory left to the compiler, for values that change their layout."""
DESCRIPTORS = 2048
"""Bytes of shared memory in which a kernel makes its tensor maps, and for its barriers."""


class Machine(NamedTuple):
    """The properties of a GPU that the tile sizes depend on.

    Attributes:
        shared_memory: bytes that one program may use.
        descriptors: tensor descriptors become hardware copies (TMA: sm_90 and later).
        multiprocessors: programs of a persistent kernel.
    """

    shared_memory: int
    descriptors: bool
    multiprocessors: int


INTERPRETER = Machine(shared_memory=232448, descriptors=False, multiprocessors=4)
Tiles = dict[str, int | bool]


@lru_cache
def machine_of(device: torch.device) -> Machine:
    """The machine of a tensor's device; the interpreter's for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    multiprocessors = properties.multi_processor_count
    if torch.version.hip is not None:
        return Machine(properties.shared_memory_per_block, False, multiprocessors)
    return Machine(properties.shared_memory_per_block_optin, properties.major >= 9, multiprocessors)


def up_to(limit: int, size: int) -> int:
    """The smallest power of two from 16 to `limit` that holds `size`; by comparisons only, so that a size may be symbolic."""
    block = 16
    while block < limit and block < size:
        block *= 2
    return block


def rank_block(rank: int) -> int:
    """Ranks per block: one block where it holds them, since each reads the rows again; else those that pad the least.

    q, k and v of rank 128 take three blocks of 128 instead of two of 256: a quarter less of products, and of reads in
    `gradients_kernel`, whose blocks of 128 hold twice the channels.
    """
    if rank <= MAX_BLOCK_R:
        return up_to(MAX_BLOCK_R, rank)
    return min(MAX_BLOCK_R, MAX_BLOCK_R // 2, key=lambda block: -(-rank // block) * block)


def shrink_tiles(machine: Machine, tokens: int, channels: int, rank: int, x_bytes: int) -> Tiles:
    """Tiles of `shrink_kernel`, with as many channels in flight as fit.

    Every program reads all of its factor from L2: 128 rows halve these reads where they are more than those of x.
    """
    block_r = rank_block(rank)
    large = x_bytes == 2 and machine.shared_memory > HOPPER and block_r >= 64
    most = 128 if large else 32 if x_bytes == 4 and block_r > 128 else 64
    block_m = up_to(most, tokens)
    # Rows that do not begin at 16 bytes are loaded element by element, through registers: fewer channels then.
    limit = 128 if x_bytes == 2 and channels % 16 == 0 else 32
    stages, block_c = _stages(machine, (block_m + block_r) * x_bytes, up_to(limit, channels))
    return {
        "EVEN": channels % block_c == 0,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "BLOCK_R": block_r,
        "num_warps": 8 if block_m > 64 else 4,
        "num_stages": stages,
    }


def expand_tiles(machine: Machine, tokens: int, outputs: int, rank: int, x_bytes: int) -> Tiles:
    """Tiles of `expand_kernel`, which is bound by writing y; up to 128 ranks go in one step."""
    block_m, block_n = (up_to(128 if x_bytes == 2 else 64, size) for size in (tokens, outputs))
    # Before Hopper the operands of a product stand in registers too.
    most = 16 if x_bytes == 4 else 128 if rank <= 128 and machine.shared_memory > HOPPER else 64
    return {
        **_rank_blocks(most, rank),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_m * block_n > 128 * 64 else 4,
        "num_stages": 2,
    }


def _rank_blocks(most: int, rank: int) -> Tiles:
    """Ranks per step behind a product, and the number of steps."""
    block_r = up_to(most, rank)
    return {"BLOCK_R": block_r, "RANK_BLOCKS": -(-rank // block_r)}


def fused_tiles(machine: Machine, tokens: int, outputs: int, channels: int, rank: int, x_bytes: int) -> Tiles:
    """Tiles of `fused_kernel`: as many stages of both operands as fit beside half a tile of y."""
    limits = (128, 256, 64) if x_bytes == 2 else (64, 64, 16)  # fp32 has no tensor cores: all of it stands in registers
    block_m, block_n, block_c = map(up_to, limits, (tokens, outputs, channels))
    free = machine.shared_memory - DESCRIPTORS - block_m * block_n // 2 * x_bytes
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_R": up_to(LINEAR_BLOCK_R if x_bytes == 2 else 16, rank),
        "GROUP": 8,
        "num_warps": 8 if block_m * block_n > 128 * 64 else 4,
        "num_stages": min(4, free // ((block_m + block_n) * block_c * x_bytes)),
    }


def linear_tiles(machine: Machine, tokens: int, outputs: int, channels: int, rank: int, x_bytes: int) -> Tiles:
    """Tiles of `linear_kernel`."""
    limits = _linear_limits(machine, x_bytes, channels % 16 == 0 and outputs % 16 == 0)
    block_m, block_n, block_c = map(up_to, limits, (tokens, outputs, channels))
    # The base product waits for memory: a third stage of both operands, where shared memory holds it.
    stages = 3 if (block_m + block_n) * block_c * x_bytes * 3 <= machine.shared_memory - RESERVED else 2
    return {
        **_rank_blocks(LINEAR_BLOCK_R if x_bytes == 2 else 16, rank),
        "EVEN": channels % block_c == 0 and outputs % block_n == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "GROUP": 8,
        "num_warps": 8 if block_m * block_n > 128 * 64 else 4,
        "num_stages": stages,
    }


def gradient_tiles(machine: Machine, tokens: int, channels: int, rank: int, x_bytes: int) -> Tiles:
    """Tiles of `gradients_kernel`; a chunk's partials are 4 rank / CHUNK of the bytes of its 16-bit rows."""
    block_r = rank_block(rank)
    shrink = shrink_tiles(machine, tokens, channels, rank, x_bytes)
    # On sm_80 sums of 128 x 128 (rank 128) spilled, and so did 64 rows a step at rank 64.
    large = x_bytes == 2 and machine.shared_memory > HOPPER
    block_c = up_to(128 if large and block_r < MAX_BLOCK_R else 64, channels)
    per_row = (block_c + block_r) * x_bytes
    stages, block_t = _stages(machine, per_row, up_to(64 if large else 32, tokens))
    return {
        "EVEN": shrink["EVEN"],
        "CHUNK": up_to(1024, tokens),
        "BLOCK_M": shrink["BLOCK_M"],
        "BLOCK_K": shrink["BLOCK_C"],
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_R": block_r,
        # fp32 sums and operands stand in registers: with four warps they spilled on sm_90 (Triton 3.6).
        "num_warps": 8 if x_bytes == 4 else shrink["num_warps"],
        "num_stages": min(stages, shrink["num_stages"]),
    }


def reduce_tiles(rank: int) -> Tiles:
    """Tiles of `reduce_kernel`: about 1,024 sums per program, 8 a thread."""
    block_r = up_to(1024, rank)
    return {"BLOCK_C": max(1024 // block_r, 1), "BLOCK_R": block_r, "num_warps": 4, "num_stages": 1}


def _linear_limits(machine: Machine, x_bytes: int, aligned: bool) -> tuple[int, int, int]:
    """Largest numbers of rows, outputs and channels in a tile of the base product."""
    if x_bytes == 4:  # no tensor cores: the sums and both operands stand in registers
        return 64, 64, 16
    if not aligned:
        return 64, 128, 32
    return 128, 128, 64 if machine.shared_memory > 100_000 else 32


def _stages(machine: Machine, per_channel: int, largest: int) -> tuple[int, int]:
    """Pipeline stages and the largest block of channels that fit: at least three stages where any block allows it."""
    blocks = [block for block in (128, 64, 32, 16) if block <= largest]
    for most in ((4, 3), (2,)):
        for block, stages in product(blocks, most):
            if stages * per_channel * block <= machine.shared_memory - RESERVED:
                return stages, block
    return 1, 16
