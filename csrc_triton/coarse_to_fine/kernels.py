"""Triton kernels of the coarse-to-fine loss (docs/method.md section 4(c)); maths and tiling: `csrc_triton/README.md`.

Legend: R rows of `numel` elements, the first `scored` of them distribution-matching rows and the rest anchors. A row is
cut into `chunks` chunks of TILES tiles of TILE elements; one program takes one chunk of one row.
Prefixes: p_ pointer, s_ row stride, b_ block of values, o_ offsets, m_ mask, i_ index. All maths is fp32.
"""

import triton
import triton.language as tl

from csrc_triton.coarse_to_fine import reference

MIN_NORMALIZER = tl.constexpr(reference.MIN_NORMALIZER)
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _chunk(i_program, numel, chunks, SPAN: tl.constexpr):
    """Row of a program, its chunk's first element and the number of elements there; int64, rows may be large."""
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
    row, start, left = _chunk(tl.program_id(0), numel, chunks, TILE * TILES)
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
def _partials(p_partials, o_row, m_row, chunks, CHUNKS: tl.constexpr):
    """`[ROWS, CHUNKS]` of which all but the first `chunks` columns are 0."""
    o_chunk = tl.arange(0, CHUNKS)
    # The pitch is a constant and only rows are masked, so that the loads are wide for every number of chunks.
    b_partials = tl.load(p_partials + o_row[:, None] * CHUNKS + o_chunk[None, :], mask=m_row[:, None], other=0.0)
    return tl.where((o_chunk < chunks)[None, :], b_partials, 0.0)


@triton.jit
def _rows(p_distance, p_square, p_sigma, p_weight, o_row, m_row, scored, numel, chunks, CHUNKS: tl.constexpr):
    """Of some rows, `[ROWS]` each: weighted term, gradient norm and factor: d (weight row) / d v = factor d.

    ::

        normalizer  = max(distance / numel, 1e-8)
        row         = 0.5 square / numel / normalizer^2       d row / d v = -sigma d / (normalizer numel)
        row         = square / numel                          d row / d v = 2 d / numel                    # anchor rows
    """
    b_weight = tl.load(p_weight + o_row, mask=m_row, other=0.0).to(tl.float32)
    b_sigma = tl.load(p_sigma + o_row, mask=m_row, other=0.0).to(tl.float32)
    size = tl.cast(numel, tl.float32)  # not numel.to: Triton passes a plain 1 where numel is 1
    b_squares = _partials(p_square, o_row, m_row, chunks, CHUNKS)
    b_distances = _partials(p_distance, o_row, m_row, chunks, CHUNKS)
    b_square = tl.sum(b_squares, axis=1)  # after all loads: a sum across warps waits for those before it
    b_mean = tl.div_rn(tl.sum(b_distances, axis=1), size)
    # A comparison, not tl.maximum, which would return 1e-8 for NaN. Infinity becomes NaN: dividing by it would
    # turn a non-finite row into a gradient of zero.
    b_normalizer = tl.where(b_mean < MIN_NORMALIZER, MIN_NORMALIZER, b_mean)
    b_normalizer = tl.where(b_normalizer <= MAX_FLOAT, b_normalizer, float("nan"))
    b_dmd = tl.div_rn(tl.div_rn(0.5 * tl.div_rn(b_square, size), b_normalizer), b_normalizer)
    b_term = b_weight * tl.where(o_row < scored, b_dmd, tl.div_rn(b_square, size))
    b_slope = tl.where(o_row < scored, -tl.div_rn(b_sigma, b_normalizer), 2.0)
    b_norm = tl.div_rn(tl.sqrt_rn(b_square) * tl.abs(b_slope), size)
    return b_term, b_norm, tl.div_rn(b_weight * b_slope, size)


@triton.jit(do_not_specialize=["rows", "scored"])
def finish_kernel(
    p_direction, p_distance, p_square, p_sigma, p_kind, p_weight,
    p_loss,  # [] fp32
    p_terms,  # [3] fp32: the loss's part of each kind
    p_gradient_norm,  # [R] fp32: |d row / d velocity|
    p_nonfinite,  # [R] bool
    p_gradient,  # [R, numel]: d loss / d velocity; may be p_direction
    rows, scored, numel, chunks,
    TILE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """First program: the loss and the reports per row, ROWS of them at a time. Others: a chunk of the gradient.

    ::

        gradient = factor / count[kind] d
    """
    o_all = tl.arange(0, ROWS * BLOCKS)
    b_kinds = tl.load(p_kind + o_all, mask=o_all < rows, other=-1)
    if tl.program_id(0) == 0:
        # Sums [kind, ROWS] over blocks of rows, then over a block: the mean of each kind's weighted terms.
        o_kind = tl.arange(0, 4)  # three, and one that no row has
        b_counts = tl.sum((b_kinds[None, :] == o_kind[:, None]).to(tl.float32), axis=1)
        b_sums = tl.zeros([4, ROWS], tl.float32)
        for i_block in range(BLOCKS):
            o_row = i_block * ROWS + tl.arange(0, ROWS)
            m_row = o_row < rows
            b_term, b_norm, _ = _rows(
                p_distance, p_square, p_sigma, p_weight, o_row, m_row, scored, numel, chunks, CHUNKS
            )
            tl.store(p_gradient_norm + o_row, b_norm, mask=m_row)
            tl.store(p_nonfinite + o_row, (b_term - b_term) != 0.0, mask=m_row)
            b_kind = tl.load(p_kind + o_row, mask=m_row, other=-1)
            b_sums += tl.where(b_kind[None, :] == o_kind[:, None], b_term[None, :], 0.0)
        b_terms = tl.div_rn(tl.sum(b_sums, axis=1), tl.where(b_counts > 0, b_counts, 1.0))
        tl.store(p_terms + o_kind, b_terms, mask=o_kind < 3)
        tl.store(p_loss, tl.sum(b_terms))
    else:
        row, start, left = _chunk(tl.program_id(0) - 1, numel, chunks, TILE * TILES)
        o_row = row + tl.arange(0, 1)
        _, _, b_factor = _rows(
            p_distance, p_square, p_sigma, p_weight, o_row, o_row < rows, scored, numel, chunks, CHUNKS
        )
        count = tl.sum((b_kinds == tl.load(p_kind + row)).to(tl.float32))
        # d loss / d velocity of the whole row is one number times its direction.
        coefficient = tl.div_rn(tl.sum(b_factor), count)
        p_direction += row * numel + start
        p_gradient += row * numel + start
        for i_tile in range(TILES):
            o_tile = i_tile * TILE + tl.arange(0, TILE)
            m_tile = o_tile < left
            b_gradient = coefficient * _load(p_direction, o_tile, m_tile)
            tl.store(p_gradient + o_tile, b_gradient.to(p_gradient.dtype.element_ty), mask=m_tile)
