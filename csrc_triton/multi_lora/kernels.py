"""Triton kernels of the multi-adapter linear layer (docs/method.md section 2); maths and tiling: `csrc_triton/README.md`.

Legend: B samples, T tokens, C channels summed over, N output channels, R rank, E adapters; a base row belongs to a sample
with adapter id -1. No tile crosses two samples, so that a sample's result does not depend on its batch.
Prefixes: p_ pointer, s_ stride, b_ block of values, o_ offsets, m_ mask, i_ index. Sums are fp32. A tile's first element
is addressed in int64, once per program; offsets within the tile are int32, which saves registers.
Shapes are numbers of the launch, so that layers share compiled kernels; EVEN is true where no tile passes their edges.
Numbers that follow from the batch are not specialised (do_not_specialize): another batch size compiles nothing.
Only builtins of `tl` are called: tests compile this file for GPUs in a process where Triton's own library is interpreted.
"""

import triton
import triton.language as tl


@triton.jit
def _shrink_rows(
    p_x, s_xt,  # first row of the tile
    p_factor, s_fc,  # [BLOCK_R] first channel of each rank, stride of channels
    scale,
    p_low,  # likewise, first rank of the adapter
    rows,  # of the sample, from the tile's first on
    o_r, m_r, C, low_r,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``low = scale * x @ factor``; the rows are wgmma's M, which needs 64 of them per four warps."""
    o_m, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    # Rows past the sample's end repeat its last one instead of taking a mask: their results are not stored.
    p_block = p_x + tl.minimum(o_m, rows - 1)[:, None] * s_xt + o_c[None, :]
    p_factor = p_factor[None, :] + o_c[:, None] * s_fc
    b_low = tl.full([BLOCK_M, BLOCK_R], 0, tl.float32)
    for i_c in range(0, C, BLOCK_C):
        if EVEN:
            b_x = tl.load(p_block)
            b_factor = tl.load(p_factor, mask=m_r[None, :], other=0)
        else:
            m_c = i_c + o_c < C
            b_x = tl.load(p_block, mask=m_c[None, :], other=0)
            b_factor = tl.load(p_factor, mask=m_c[:, None] & m_r[None, :], other=0)
        b_low = tl.dot(b_x, b_factor, b_low, input_precision="ieee")
        p_block += BLOCK_C
        p_factor += BLOCK_C * s_fc
    b_low = (b_low * scale.to(tl.float32)).to(p_low.dtype.element_ty)
    tl.store(p_low + o_m[:, None] * low_r + o_r[None, :], b_low, mask=(o_m[:, None] < rows) & m_r[None, :])


@triton.jit
def _channels_times_rank(
    p_x, s_xt, o_c, m_c,  # first row of the chunk
    p_low, o_r, m_r,  # likewise
    rows,  # of the sample, from the chunk's first on
    low_r,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``x^T low`` over the rows of a chunk, ``[BLOCK_C, BLOCK_R]``: the channels are wgmma's M at every rank."""
    o_t = tl.arange(0, BLOCK_T)
    p_x = p_x + o_t[:, None] * s_xt + o_c[None, :]
    p_low = p_low + o_t[:, None] * low_r + o_r[None, :]
    b_sum = tl.full([BLOCK_C, BLOCK_R], 0, tl.float32)
    for i_t in range(0, CHUNK, BLOCK_T):
        m_t = i_t + o_t < rows
        b_x = tl.load(p_x, mask=m_t[:, None] & m_c[None, :], other=0)
        b_low = tl.load(p_low, mask=m_t[:, None] & m_r[None, :], other=0)
        b_sum = tl.dot(tl.trans(b_x), b_low, b_sum, input_precision="ieee")
        p_x += BLOCK_T * s_xt
        p_low += BLOCK_T * low_r
    return b_sum


@triton.jit
def _add_low_rank(
    b_sum,  # [BLOCK_M, BLOCK_N]
    p_low, low_r,  # first row of the tile, first rank of the layer
    p_factor, s_fn, s_fr,  # first output of the tile, first rank of the sample's adapter
    o_m, m_m, o_n, m_n, R,
    RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``b_sum + low @ factor^T``, in rank blocks one after the other: unrolled, a rank of 256 would spill registers."""
    for i_r in range(0, RANK_BLOCKS * BLOCK_R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_low = tl.load(p_low + o_m[:, None] * low_r + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0)
        p_block = p_factor + o_n[None, :] * s_fn + o_r[:, None] * s_fr
        b_factor = tl.load(p_block, mask=m_r[:, None] & m_n[None, :], other=0)
        b_sum = tl.dot(b_low, b_factor, b_sum, input_precision="ieee")
    return b_sum


@triton.jit(do_not_specialize=["row_tiles"])
def shrink_kernel(
    p_x,  # [B, T, C], unit stride of C
    p_low,  # [B, T, low_r]
    p_factor0, p_factor1, p_factor2,  # [E, R0 or R1 or R2, C]
    p_scale, p_ids,  # [E], [B]
    T, C, R0, R1, R2, low_r, low_offset, row_tiles, s_xb, s_xt, s_fe0, s_fr0, s_fe1, s_fr1, s_fe2, s_fr2, s_fc,
    FACTORS: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,  # every rank of several factors begins at a multiple of 16 bytes
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Projects the rows of each sample to the ranks of its adapter, of up to three factors in one pass over x.

    ::

        low[b, t, low_offset:] = scale[e] * x[b, t] @ concat(factor0[e], factor1[e], factor2[e]).T    # e = ids[b] >= 0
    """
    R = R0 + R1 + R2
    # A program's place: rank blocks are innermost, so that programs that read the same rows are neighbours.
    rank_blocks = (R + BLOCK_R - 1) // BLOCK_R
    i_tile = tl.program_id(0) // rank_blocks
    i_b = (i_tile // row_tiles).to(tl.int64)
    i_e = tl.load(p_ids + i_b).to(tl.int64)
    if i_e < 0:
        return
    # The ranks of the three factors stand side by side: each of the block's ranks points into its own factor.
    o_r = (tl.program_id(0) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_factor = p_factor0 + i_e * s_fe0 + o_r * s_fr0
    if FACTORS > 1:
        p_factor = tl.where(o_r < R0, p_factor, p_factor1 + i_e * s_fe1 + (o_r - R0) * s_fr1)
    if FACTORS > 2:
        p_factor = tl.where(o_r < R0 + R1, p_factor, p_factor2 + i_e * s_fe2 + (o_r - R0 - R1) * s_fr2)
    if ALIGNED:  # Triton 3.9 does not see it through tl.where: it would copy 4 bytes at a time, and spill
        p_factor = tl.multiple_of(p_factor, 16)
    i_t = (i_tile % row_tiles).to(tl.int64) * BLOCK_M
    _shrink_rows(
        p_x + i_b * s_xb + i_t * s_xt, s_xt, p_factor, s_fc, tl.load(p_scale + i_e),
        p_low + (i_b * T + i_t) * low_r + low_offset, (T - i_t).to(tl.int32), o_r, o_r < R, C, low_r,
        EVEN, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["row_tiles"])
def expand_kernel(
    p_base,  # [B, T, N] contiguous, read where ADD
    p_bias,  # [N], or anything without HAS_BIAS
    p_y,  # [B, T, N] contiguous, written
    p_low,  # [B, T, low_r]
    p_factor,  # [E, N, R]
    p_ids,
    T, N, R, low_r, low_offset, row_tiles, s_fe, s_fn, s_fr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[b] = (base[b] if ADD) + bias + low[b, :, low_offset:] @ factor[e].T``; base rows are without the product."""
    column_tiles = (N + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) // column_tiles
    i_b = (i_tile // row_tiles).to(tl.int64)
    i_e = tl.load(p_ids + i_b).to(tl.int64)
    i_t = (i_tile % row_tiles).to(tl.int64) * BLOCK_M
    i_n = (tl.program_id(0) % column_tiles) * BLOCK_N
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < T - i_t, o_n < N - i_n
    first = (i_b * T + i_t) * N + i_n
    o_y = o_m[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    # Loads before the product, in the layout in which y is stored: one latency instead of two.
    if ADD:
        b_base = tl.load(p_base + first + o_y, mask=m_y, other=0)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + i_n + o_n, mask=m_n, other=0)
    b_y = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    if i_e >= 0:
        p_low += (i_b * T + i_t) * low_r + low_offset
        p_factor += i_e * s_fe + i_n.to(tl.int64) * s_fn
        b_y = _add_low_rank(b_y, p_low, low_r, p_factor, s_fn, s_fr, o_m, m_m, o_n, m_n, R, RANK_BLOCKS, BLOCK_R)
    if HAS_BIAS:
        b_y += b_bias.to(tl.float32)[None, :]
    if ADD:
        b_y += b_base.to(tl.float32)
    tl.store(p_y + first + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _place(tile, all_row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row tile and column tile: GROUP row tiles at a time, so that the weight tiles they share stay in L2."""
    i_group = tile // (GROUP * column_tiles)
    in_group = tl.minimum(all_row_tiles - i_group * GROUP, GROUP)
    in_tiles = tile % (GROUP * column_tiles)
    return i_group * GROUP + in_tiles % in_group, in_tiles // in_group


@triton.jit(do_not_specialize=["row_tiles", "all_row_tiles"])
def linear_kernel(
    p_x,  # [B, T, C], unit stride of C
    p_weight,  # [N, C], or [C, N] where WEIGHT_CN; contiguous
    p_bias,  # [N], or anything without HAS_BIAS
    p_y,  # [B, T, N] contiguous
    p_low, p_factor, p_ids,  # as in expand_kernel
    T, C, N, R, low_r, low_offset, row_tiles, all_row_tiles, s_xb, s_xt, s_fe, s_fn, s_fr,
    WEIGHT_CN: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The base layer with the low-rank part added before it is rounded.

    ::

        y[b] = (y[b] if ADD) + x[b] @ weight.T + bias
        y[b] += low[b, :, low_offset:] @ factor[e].T                             # e = ids[b] >= 0

    The rank's product stands after the channel loop: inside or before it, its operands would take pipeline stages from
    shared memory, and a test of the adapter there would keep the loop from being pipelined.
    """
    column_tiles = (N + BLOCK_N - 1) // BLOCK_N
    i_tile, i_column = _place(tl.program_id(0), all_row_tiles, column_tiles, GROUP)
    i_n = i_column * BLOCK_N
    i_b = (i_tile // row_tiles).to(tl.int64)
    i_t = i_tile % row_tiles * BLOCK_M
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < T - i_t, o_n < N - i_n
    p_x += i_b * s_xb
    p_y = p_y + (i_b * T + i_t) * N + i_n + o_m[:, None] * N + o_n[None, :]
    if ADD:
        b_y = tl.load(p_y, mask=m_m[:, None] & m_n[None, :], other=0).to(tl.float32)
    else:
        b_y = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    # Rows past the sample's end repeat its last one, as in _shrink_rows.
    o_c = tl.arange(0, BLOCK_C)
    p_block = p_x + i_t.to(tl.int64) * s_xt + tl.minimum(o_m, T - 1 - i_t)[:, None] * s_xt + o_c[None, :]
    if WEIGHT_CN:
        p_weight = p_weight + i_n + o_c[:, None] * N + o_n[None, :]
    else:
        p_weight = p_weight + i_n.to(tl.int64) * C + o_n[None, :] * C + o_c[:, None]
    for i_c in range(0, C, BLOCK_C):
        if EVEN:
            b_x = tl.load(p_block)
            b_weight = tl.load(p_weight)
        else:
            b_x = tl.load(p_block, mask=i_c + o_c[None, :] < C, other=0)
            b_weight = tl.load(p_weight, mask=(i_c + o_c[:, None] < C) & m_n[None, :], other=0)
        b_y = tl.dot(b_x, b_weight, b_y, input_precision="ieee")
        p_block += BLOCK_C
        p_weight += BLOCK_C * N if WEIGHT_CN else BLOCK_C
    # The low-rank part, on the fp32 sums of the base: [BLOCK_M, R] @ [R, BLOCK_N].
    i_e = tl.load(p_ids + i_b).to(tl.int64)
    if i_e >= 0:
        p_low += (i_b * T + i_t) * low_r + low_offset
        p_factor += i_e * s_fe + i_n.to(tl.int64) * s_fn
        b_y = _add_low_rank(b_y, p_low, low_r, p_factor, s_fn, s_fr, o_m, m_m, o_n, m_n, R, RANK_BLOCKS, BLOCK_R)
    if HAS_BIAS:
        b_y += tl.load(p_bias + i_n + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(
    do_not_specialize=[
        *("B", "E", "T", "C", "N", "R", "low_offset", "row_tiles", "all_row_tiles"),
        *("s_xb", "s_xt", "s_yb", "s_lb", "s_lt", "s_fe", "s_fo"),
    ]
)
def fused_kernel(
    p_x,  # [B, T, C], unit stride of C
    p_weight,  # [N, C], or [C, N] where WEIGHT_CN; contiguous
    p_bias,  # [N], or anything without HAS_BIAS
    p_y,  # [B, T, N] contiguous
    p_low,  # [B, T, low_offset + R or more]
    p_factor,  # [E, N, R], or [E, R, N] where FACTOR_RN; unit stride of the last
    p_ids,
    B, E, T, C, N, R, low_offset, row_tiles, all_row_tiles, s_xb, s_xt, s_yb, s_lb, s_lt, s_fe, s_fo,
    WEIGHT_CN: tl.constexpr, FACTOR_RN: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`linear_kernel` by hardware copies (TMA): as many programs as multiprocessors, each takes one tile after the other.

    Every row begins at a multiple of 16 bytes. Tensor maps are made once per program; their copies read zeros and write
    nothing past the last token of a sample and past C, N and R. No number of a shape is compiled in: shapes share a kernel.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    d_x = tl.make_tensor_descriptor(p_x, [B, T, C], [s_xb, s_xt, 1], [1, BLOCK_M, BLOCK_C])
    if WEIGHT_CN:
        d_weight = tl.make_tensor_descriptor(p_weight, [C, N], [N, 1], [BLOCK_C, BLOCK_N])
    else:
        d_weight = tl.make_tensor_descriptor(p_weight, [N, C], [C, 1], [BLOCK_N, BLOCK_C])
    d_low = tl.make_tensor_descriptor(p_low + low_offset, [B, T, R], [s_lb, s_lt, 1], [1, BLOCK_M, BLOCK_R])
    if FACTOR_RN:
        d_factor = tl.make_tensor_descriptor(p_factor, [E, R, N], [s_fe, s_fo, 1], [1, BLOCK_R, BLOCK_N])
    else:
        d_factor = tl.make_tensor_descriptor(p_factor, [E, N, R], [s_fe, s_fo, 1], [1, BLOCK_N, BLOCK_R])
    d_y = tl.make_tensor_descriptor(p_y, [B, T, N], [s_yb, N, 1], [1, BLOCK_M, HALF])
    column_tiles = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), all_row_tiles * column_tiles, tl.num_programs(0)):
        i_tile, i_column = _place(tile, all_row_tiles, column_tiles, GROUP)
        i_b = i_tile // row_tiles
        i_t = i_tile % row_tiles * BLOCK_M
        i_n = i_column * BLOCK_N
        # The id and the bias are on their way while the channels are summed.
        i_e = tl.load(p_ids + i_b).to(tl.int32)
        ranks = tl.where(i_e >= 0, R, 0)
        if HAS_BIAS:
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_bias = tl.load(p_bias + o_n, mask=o_n < N, other=0)
        b_y = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
        for i_c in range(0, C, BLOCK_C):
            b_x = d_x.load([i_b, i_t, i_c]).reshape(BLOCK_M, BLOCK_C)
            b_weight = d_weight.load([i_c, i_n]) if WEIGHT_CN else tl.trans(d_weight.load([i_n, i_c]))
            b_y = tl.dot(b_x, b_weight, b_y, input_precision="ieee")
        # The low-rank part, on the fp32 sums of the base, through the shared memory of the loop above.
        for i_r in range(0, ranks, BLOCK_R):
            b_low = d_low.load([i_b, i_t, i_r]).reshape(BLOCK_M, BLOCK_R)
            if FACTOR_RN:
                b_factor = d_factor.load([i_e, i_r, i_n]).reshape(BLOCK_R, BLOCK_N)
            else:
                b_factor = tl.trans(d_factor.load([i_e, i_n, i_r]).reshape(BLOCK_N, BLOCK_R))
            b_y = tl.dot(b_low, b_factor, b_y, input_precision="ieee")
        if HAS_BIAS:
            b_y += b_bias.to(tl.float32)[None, :]
        # In two halves of N: a whole tile would take shared memory of a pipeline stage.
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_y, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        if ADD:
            b_left += d_y.load([i_b, i_t, i_n]).reshape(BLOCK_M, HALF).to(tl.float32)
        d_y.store([i_b, i_t, i_n], b_left.to(p_y.dtype.element_ty).reshape(1, BLOCK_M, HALF))
        if ADD:
            b_right += d_y.load([i_b, i_t, i_n + HALF]).reshape(BLOCK_M, HALF).to(tl.float32)
        d_y.store([i_b, i_t, i_n + HALF], b_right.to(p_y.dtype.element_ty).reshape(1, BLOCK_M, HALF))


@triton.jit(do_not_specialize=["chunks"])
def gradients_kernel(
    p_x,  # [B, T, C], unit stride of C: the layer's input, or the gradient of its output
    p_in,  # [B, T, in_r] low-rank rows that belong to x
    p_partial,  # [B, chunks, C, R] fp32
    p_low,  # [B, T, low_r], written
    p_factor, p_scale, p_ids,  # [E, R, C]
    T, C, R, in_r, in_offset, low_r, low_offset, chunks, s_xb, s_xt, s_fe, s_fr, s_fc,
    SHRINK: tl.constexpr, EVEN: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One pass over x for partial factor gradients and, where SHRINK, for ``low`` as in `shrink_kernel`.

    ::

        partial[b, chunk] = sum of x[b, t].T in[b, t, in_offset:] over the chunk's t                # ids[b] >= 0
        low[b, t, low_offset:] = scale[e] * x[b, t] @ factor[e].T

    A program has one of two roles. The programs of one chunk are neighbours in the launch order: the second role
    finds in L2 the rows that the first read from memory.
    """
    # Of a chunk's programs the first shrink its rows and the rest sum its channels, each once per rank block.
    rank_blocks = (R + BLOCK_R - 1) // BLOCK_R
    shrink_programs = CHUNK // BLOCK_M * rank_blocks if SHRINK else 0
    programs = shrink_programs + (C + BLOCK_C - 1) // BLOCK_C * rank_blocks
    i_chunk = tl.program_id(0) // programs
    i_role = tl.program_id(0) % programs
    i_b = (i_chunk // chunks).to(tl.int64)
    i_e = tl.load(p_ids + i_b).to(tl.int64)
    if i_e < 0:
        return
    first = (i_chunk % chunks).to(tl.int64) * CHUNK
    p_x += i_b * s_xb
    o_r = i_role % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    if i_role < shrink_programs:
        if SHRINK:  # else this role is not compiled
            i_t = first + i_role // rank_blocks * BLOCK_M
            if i_t < T:  # the sample's last chunk may have fewer tiles
                _shrink_rows(
                    p_x + i_t * s_xt, s_xt, p_factor + i_e * s_fe + o_r * s_fr, s_fc, tl.load(p_scale + i_e),
                    p_low + (i_b * T + i_t) * low_r + low_offset, (T - i_t).to(tl.int32), o_r, m_r, C, low_r,
                    EVEN, BLOCK_M, BLOCK_K, BLOCK_R,
                )  # fmt: skip
    else:
        i_c = (i_role - shrink_programs) // rank_blocks * BLOCK_C
        o_c = tl.arange(0, BLOCK_C)
        m_c = o_c < C - i_c
        b_sum = _channels_times_rank(
            p_x + first * s_xt + i_c, s_xt, o_c, m_c, p_in + (i_b * T + first) * in_r + in_offset, o_r, m_r,
            (T - first).to(tl.int32), in_r, CHUNK, BLOCK_T, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        p_sum = p_partial + (i_chunk.to(tl.int64) * C + i_c) * R + o_c[:, None] * R + o_r[None, :]
        tl.store(p_sum, b_sum, mask=m_c[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["num_samples", "chunks"])
def reduce_kernel(
    p_partial,  # [B, chunks, C, partial_r] fp32
    p_out,  # [E, C, R]
    p_ids,
    num_samples, chunks, C, R, partial_r, partial_offset, s_oe, s_oc, s_or,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums the partials of each adapter's samples, always in the batch's order; zero for an adapter without any."""
    channel_blocks = (C + BLOCK_C - 1) // BLOCK_C
    i_e = tl.program_id(0) // channel_blocks
    o_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    m_out = (o_c[:, None] < C) & (o_r[None, :] < R)
    p_partial += o_c[:, None] * partial_r + partial_offset + o_r[None, :]
    # Every program visits all partials in one order, and adds those of its adapter: the same sum in each run.
    b_sum = tl.full([BLOCK_C, BLOCK_R], 0, tl.float32)
    for i_b in range(num_samples):
        mine = tl.load(p_ids + i_b) == i_e
        for _ in tl.range(chunks, loop_unroll_factor=4):
            # In the interpreter of Triton 3.9 `mine` is a plain number, with which the mask would be one of int32.
            b_sum += tl.load(p_partial, mask=(m_out & mine) != 0, other=0)
            p_partial += C * partial_r
    p_out += i_e.to(tl.int64) * s_oe + o_c[:, None] * s_oc + o_r[None, :] * s_or
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), mask=m_out)
