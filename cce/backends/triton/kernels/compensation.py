"""Compensation for the dead tiles (docs/algorithm.md, step 5): their mass, and each vocabulary block's mean row."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import LN2, entries_of


@triton.jit
def dead_mass_kernel(
    tile_mass, tile_entropy, live, row_order, lse, entropy, a, h, m,
    N, V, blocks, stride_mass, softcap, t0,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write m [tiles, N], rows in the work list's order: sum of dx over the columns of a dead tile, 0 if it is live.

    ``softcap'(zbar) mass (a + h (tile_entropy - log mass - H))``; a and h have been multiplied by the scale, and zbar,
    the log of the tile's mean exp z, stands for its logits in the softcap's derivative.
    """
    t = t0 + tl.program_id(0)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < N
    rows = tl.load(row_order + position, mask=inside, other=0).to(tl.int64)
    dead = inside & (tl.load(live + t * blocks + position // BLOCK_N, mask=inside, other=1) == 0)
    where = t.to(tl.int64) * stride_mass + rows
    p = tl.maximum(tl.load(tile_mass + where, mask=dead, other=0.0).to(tl.float32), 0.0)
    weight = tl.load(a + rows, mask=inside, other=0.0)
    log_p = tl.where(p > 0, tl.log2(p) * LN2, -1e4)
    if ENTROPY:
        gap = tl.load(tile_entropy + where, mask=dead, other=0.0).to(tl.float32) - log_p
        row_h = tl.load(h + rows, mask=inside, other=0.0)
        weight += row_h * (gap - tl.load(entropy + rows, mask=inside, other=0.0))
    total = p * weight
    if SOFTCAP:
        columns = tl.minimum(BLOCK_V, V - t * BLOCK_V).to(tl.float32)
        zbar = log_p + tl.load(lse + rows, mask=inside, other=0.0) - tl.log2(columns) * LN2
        ratio = tl.minimum(tl.maximum(zbar / softcap, -1.0), 1.0)
        total *= 1 - ratio * ratio
    total = tl.where(dead, total, 0.0)
    tl.store(m + tl.program_id(0).to(tl.int64) * N + position, total.to(m.dtype.element_ty), mask=inside)


@triton.jit
def mean_rows_kernel(
    c, order, means, V, D, stride_cv, stride_cd,
    ORDER: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write means [cdiv(V, ROWS), D]: the mean of every ROWS rows of c."""
    t = tl.program_id(0)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    sums = tl.zeros((STEP, BLOCK_D), tl.float32)
    for start in range(t * ROWS, tl.minimum((t + 1) * ROWS, V), STEP):
        place = start + tl.arange(0, STEP)
        entries = entries_of(place, order, V, ORDER, True)
        inside = (place < tl.minimum((t + 1) * ROWS, V))[:, None] & (d < D)[None, :]
        rows = tl.load(c + entries[:, None] * stride_cv + d[None, :] * stride_cd, mask=inside, other=0.0)
        sums += rows.to(tl.float32)
    total = tl.sum(sums, 0) / tl.minimum(ROWS, V - t * ROWS).to(tl.float32)
    tl.store(means + t.to(tl.int64) * D + d, total.to(means.dtype.element_ty), mask=d < D)
