"""Triton kernels of the coarse-to-fine loss (docs/method.md section 4(c)); maths and tiling: `csrc_triton/README.md`.

Legend: R rows of `numel` elements, the first `scored` of them distribution-matching rows and the rest anchors. One
program of the element-wise kernels takes one chunk of one row: TILES tiles of TILE elements.
Prefixes: p_ pointer, s_ row stride, b_ block of values, o_ offsets, m_ mask, i_ index. All maths is fp32.
"""

import triton
import triton.language as tl

from csrc_triton.coarse_to_fine import reference

MIN_NORMALIZER = tl.constexpr(reference.MIN_NORMALIZER)
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _chunk(numel, chunks, SPAN: tl.constexpr):
    """Row of this program, its chunk's first element and the number of elements there; int64, rows may be large."""
    i_program = tl.program_id(0)
    start = (i_program % chunks).to(tl.int64) * SPAN
    return (i_program // chunks).to(tl.int64), start, tl.minimum(numel - start, SPAN).to(tl.int32)


@triton.jit
def _load(p_row, o_tile, m_tile):
    return tl.load(p_row + o_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["scored"])
def partials_kernel(
    p_velocity, p_x, p_sigma, p_renoised, p_score_sigma, p_critic, p_teacher, p_uncond, p_target,
    p_direction,  # [R, numel] fp32: d (below), of which the gradient is a multiple per row
    p_distance,  # [R, CHUNKS] fp32: sum |x_g - x0_real|, 0 for anchor rows; the first `chunks` columns are written
    p_square,  # [R, CHUNKS] fp32: sum d^2, likewise
    s_velocity, s_x, s_renoised, s_critic, s_teacher, s_uncond, s_target,
    scored, numel, chunks, guidance,
    TILE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Direction and partial sums of one chunk.

    ::

        guided  = teacher + guidance (teacher - uncond)
        d       = sigma_s (guided - critic)               # = x0_fake - x0_real: renoised cancels exactly
        x0_real = renoised - sigma_s guided
        d       = velocity - target                       # anchor rows
    """
    row, start, left = _chunk(numel, chunks, TILE * TILES)
    p_velocity += row * s_velocity + start
    p_direction += row * numel + start
    b_distance = tl.zeros([TILE], tl.float32)
    b_square = tl.zeros([TILE], tl.float32)
    if row < scored:
        sigma = tl.load(p_sigma + row).to(tl.float32)
        score_sigma = tl.load(p_score_sigma + row).to(tl.float32)
        p_x += row * s_x + start
        p_renoised += row * s_renoised + start
        p_critic += row * s_critic + start
        p_teacher += row * s_teacher + start
        p_uncond += row * s_uncond + start
        for i_tile in range(TILES):
            o_tile = i_tile * TILE + tl.arange(0, TILE)
            m_tile = o_tile < left
            b_teacher = _load(p_teacher, o_tile, m_tile)
            b_guided = b_teacher + guidance * (b_teacher - _load(p_uncond, o_tile, m_tile))
            b_x_g = _load(p_x, o_tile, m_tile) - sigma * _load(p_velocity, o_tile, m_tile)
            b_real = _load(p_renoised, o_tile, m_tile) - score_sigma * b_guided
            b_direction = score_sigma * (b_guided - _load(p_critic, o_tile, m_tile))
            b_distance += tl.abs(b_x_g - b_real)
            b_square += b_direction * b_direction
            tl.store(p_direction + o_tile, b_direction, mask=m_tile)
    else:
        p_target += (row - scored) * s_target + start
        for i_tile in range(TILES):
            o_tile = i_tile * TILE + tl.arange(0, TILE)
            m_tile = o_tile < left
            b_direction = _load(p_velocity, o_tile, m_tile) - _load(p_target, o_tile, m_tile)
            b_square += b_direction * b_direction
            tl.store(p_direction + o_tile, b_direction, mask=m_tile)
    i_partial = row * CHUNKS + tl.program_id(0) % chunks
    tl.store(p_distance + i_partial, tl.sum(b_distance))
    tl.store(p_square + i_partial, tl.sum(b_square))


@triton.jit
def _row_sums(p_partials, o_row, m_row, chunks, CHUNKS: tl.constexpr):
    """Sums `[ROWS]` of the first `chunks` columns; their order depends on the size of a row alone."""
    o_chunk = tl.arange(0, CHUNKS)
    # The pitch is a constant and only rows are masked, so that the loads are wide whatever the number of chunks.
    b_partial = tl.load(p_partials + o_row[:, None] * CHUNKS + o_chunk[None, :], mask=m_row[:, None], other=0.0)
    return tl.sum(tl.where((o_chunk < chunks)[None, :], b_partial, 0.0), axis=1)


@triton.jit(do_not_specialize=["rows", "scored"])
def finish_kernel(
    p_distance, p_square, p_sigma, p_kind, p_weight,
    p_loss,  # [] fp32
    p_terms,  # [3] fp32: the loss's part of each kind
    p_gradient_norm,  # [R] fp32: |d row / d velocity|
    p_nonfinite,  # [R] bool
    p_coefficient,  # [R] fp32: d loss / d velocity = coefficient * direction
    rows, scored, numel, chunks,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Everything per row and the loss, in one program that takes ROWS rows at a time.

    ::

        normalizer  = max(distance / numel, 1e-8)
        row         = 0.5 square / numel / normalizer^2       d row / d v = -sigma d / (normalizer numel)
        row         = square / numel                          d row / d v = 2 d / numel                    # anchor rows
        coefficient = weight / count[kind] * (d row / d v) / d
    """
    o_all = tl.arange(0, ROWS * BLOCKS)
    b_kinds = tl.load(p_kind + o_all, mask=o_all < rows, other=-1)
    num_bs = tl.sum((b_kinds == 0).to(tl.float32))
    num_ts = tl.sum((b_kinds == 1).to(tl.float32))
    num_anchor = tl.sum((b_kinds == 2).to(tl.float32))
    size = tl.cast(numel, tl.float32)  # not numel.to: Triton passes a plain 1 where numel is 1
    b_bs = tl.zeros([ROWS], tl.float32)
    b_ts = tl.zeros([ROWS], tl.float32)
    b_anchor = tl.zeros([ROWS], tl.float32)
    for i_block in range(BLOCKS):
        o_row = i_block * ROWS + tl.arange(0, ROWS)
        m_row = o_row < rows
        m_scored = o_row < scored
        b_kind = tl.load(p_kind + o_row, mask=m_row, other=-1)
        b_weight = tl.load(p_weight + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_sigma = tl.load(p_sigma + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_square = _row_sums(p_square, o_row, m_row, chunks, CHUNKS)
        b_mean = tl.div_rn(_row_sums(p_distance, o_row, m_row, chunks, CHUNKS), size)
        # A comparison, not tl.maximum, which would return 1e-8 for NaN. Infinity becomes NaN: dividing by it would
        # turn a non-finite row into a gradient of zero.
        b_normalizer = tl.where(b_mean < MIN_NORMALIZER, MIN_NORMALIZER, b_mean)
        b_normalizer = tl.where(b_normalizer <= MAX_FLOAT, b_normalizer, float("nan"))
        b_dmd = tl.div_rn(tl.div_rn(0.5 * tl.div_rn(b_square, size), b_normalizer), b_normalizer)
        b_term = b_weight * tl.where(m_scored, b_dmd, tl.div_rn(b_square, size))
        b_slope = tl.where(m_scored, -tl.div_rn(b_sigma, b_normalizer), 2.0)
        b_count = tl.where(b_kind == 0, num_bs, tl.where(b_kind == 1, num_ts, num_anchor))
        b_coefficient = tl.div_rn(tl.div_rn(b_weight, b_count) * b_slope, size)
        tl.store(p_gradient_norm + o_row, tl.div_rn(tl.sqrt_rn(b_square) * tl.abs(b_slope), size), mask=m_row)
        tl.store(p_nonfinite + o_row, (b_term - b_term) != 0.0, mask=m_row)
        tl.store(p_coefficient + o_row, b_coefficient, mask=m_row)
        b_bs += tl.where(b_kind == 0, b_term, 0.0)
        b_ts += tl.where(b_kind == 1, b_term, 0.0)
        b_anchor += tl.where(b_kind == 2, b_term, 0.0)
    bs = tl.div_rn(tl.sum(b_bs), tl.where(num_bs > 0, num_bs, 1.0))
    ts = tl.div_rn(tl.sum(b_ts), tl.where(num_ts > 0, num_ts, 1.0))
    anchor = tl.div_rn(tl.sum(b_anchor), tl.where(num_anchor > 0, num_anchor, 1.0))
    tl.store(p_terms, bs)
    tl.store(p_terms + 1, ts)
    tl.store(p_terms + 2, anchor)
    tl.store(p_loss, bs + ts + anchor)


@triton.jit
def gradient_kernel(
    p_direction, p_coefficient,
    p_upstream,  # [] gradient of the loss
    p_gradient,  # [R, numel] of velocity's dtype
    numel, chunks,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of one chunk: `upstream * coefficient * direction`, rounded once."""
    row, start, left = _chunk(numel, chunks, TILE * TILES)
    p_direction += row * numel + start
    p_gradient += row * numel + start
    factor = tl.load(p_coefficient + row) * tl.load(p_upstream).to(tl.float32)
    for i_tile in range(TILES):
        o_tile = i_tile * TILE + tl.arange(0, TILE)
        m_tile = o_tile < left
        b_gradient = factor * tl.load(p_direction + o_tile, mask=m_tile, other=0.0)
        tl.store(p_gradient + o_tile, b_gradient.to(p_gradient.dtype.element_ty), mask=m_tile)
