"""Loss and gradients in one pass, where all logits fit into the scratch memory (docs/decisions/0003).

``store_kernel`` keeps exp(z - m) of every tile, relative to the tile's own maximum; once the row's log-sum-exp is
known, ``scale_kernel`` turns it into the gradient in place: no logit is computed twice.
"""

import triton
import triton.language as tl

from cce.backends.triton.kernels.gradient import chunk_tile
from cce.backends.triton.kernels.tiles import (
    INF,
    LN2,
    LOG2E,
    NEG_INF,
    cap,
    finite,
    logit_tile,
    store_as_held,
    wide,
)
from cce.backends.triton.kernels.totals import log_of_sum, store_totals


@triton.jit
def store_kernel(
    e, c, bias, q, tile_max, tile_sum,  # q [N, V], the others [T, N]
    N, V, D, stride_en, stride_ed, stride_cv, stride_cd, stride_q, scale, softcap,
    E_TMA: tl.constexpr, C_TMA: tl.constexpr, Q_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Store q = exp(z - m), and m and the sum of q of each row and tile."""
    blocks, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, TILE_V)
    for tile in tl.range(tl.program_id(0), blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        # Tile origin.
        i, t = chunk_tile(tile, blocks, tiles, GROUP_N)
        rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
        read = wide(tl.minimum(rows, N - 1), WIDE)
        place = t * TILE_V + tl.arange(0, TILE_V)
        entries = wide(tl.minimum(place, V - 1), WIDE)
        # Logit tile, as in the forward.
        z = logit_tile(e, c, i * BLOCK_N, read, t * TILE_V, entries, D, stride_en, stride_ed, stride_cv, stride_cd,
                       E_TMA, C_TMA, EVEN_D, DOT, PRECISION, BLOCK_N, TILE_V, BLOCK_D)  # fmt: skip
        z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
        if MASK:
            z = tl.where((place < V)[None, :], z, NEG_INF)
        # Epilogue: statistics of the tile.
        m = tl.max(z, 1)
        p = tl.exp2((z - finite(m)[:, None]) * LOG2E)
        where = t.to(tl.int64) * N + rows
        store_as_held(tile_max + where, m, rows < N)
        store_as_held(tile_sum + where, tl.sum(p, 1), rows < N)
        # Store.
        if Q_TMA:
            q.store([i * BLOCK_N, t * TILE_V], p.to(q.dtype))
        else:
            where = q + rows.to(tl.int64)[:, None] * stride_q + place[None, :]
            tl.store(where, p.to(q.dtype.element_ty), mask=(rows < N)[:, None] & (place < V)[None, :])


@triton.jit
def join_kernel(
    tile_max, tile_sum, target_logits, targets, lse, lse_low, nll, N, K, T, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Compute lse, lse_low and nll of some rows from their tiles, in ascending order; 0 where a row has no target."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.full((BLOCK_N,), NEG_INF, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)[:, None]
        inside = (tiles < T) & (rows < N)[None, :]
        where = tiles.to(tl.int64) * N + rows[None, :]
        tile_m = tl.load(tile_max + where, mask=inside, other=NEG_INF)
        tile_s = tl.load(tile_sum + where, mask=inside, other=0.0)
        m_new = tl.maximum(m, tl.max(tile_m, 0))
        s *= tl.exp2((m - finite(m_new)) * LOG2E)
        s += tl.sum(tile_s * tl.exp2((tile_m - finite(m_new)[None, :]) * LOG2E), 0)
        m = m_new
    used = rows < 0
    for k in range(K):
        used = used | (tl.load(targets + rows.to(tl.int64) * K + k, mask=rows < N, other=-1) >= 0)
    store_totals(m, log_of_sum(s), rows, used, N, K, target_logits, targets, lse, lse_low, nll)


@triton.jit
def scale_kernel(
    q, dz, tile_max, lse, lse_low, nll, targets, a, g,
    N, V, K, stride_q, stride_a, softcap, SOFTCAP: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Replace q by dz = a p - sum_k g_k [j = target_k], with p = q exp((m - lse) - lse_low), or exp(-nll) at a target.

    With SOFTCAP times 1 - (z / softcap)^2, with z = m + log q, or lse - nll at a target.

    a and g have been multiplied by the scale; their values at a target -1 are ignored. A row with no other target may
    hold NaN. A row whose log-sum-exp is infinite has no softmax, and becomes NaN.
    """
    t = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = t * TILE_V + tl.arange(0, TILE_V)
    inside = (rows < N)[:, None] & (place < V)[None, :]
    row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
    row_lse = tl.where(tl.abs(row_lse) < INF, row_lse, float("nan"))
    low = tl.load(lse_low + rows, mask=rows < N, other=0.0)
    row_a = tl.load(a + rows * stride_a, mask=rows < N, other=0.0)
    m = tl.load(tile_max + t.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    factor = tl.exp2(((m - row_lse) - low) * LOG2E) * row_a
    where = rows.to(tl.int64)[:, None] * stride_q + place[None, :]
    x = tl.load(q + where, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = m[:, None] + tl.log2(x) * LN2
    x *= factor[:, None]
    used = rows < 0
    for k in range(K):
        target = tl.load(targets + rows.to(tl.int64) * K + k, mask=rows < N, other=-1)
        used = used | (target >= 0)
        loss = tl.load(nll + rows.to(tl.int64) * K + k, mask=rows < N, other=0.0)
        p = tl.exp2(-loss * LOG2E) * row_a
        x = tl.where(place[None, :] == target[:, None], p[:, None], x)
        if SOFTCAP:
            z = tl.where(place[None, :] == target[:, None], (row_lse - loss)[:, None], z)
    for k in range(K):
        target = tl.load(targets + rows.to(tl.int64) * K + k, mask=rows < N, other=-1)
        row_g = tl.load(g + rows.to(tl.int64) * K + k, mask=rows < N, other=0.0)
        x -= tl.where(place[None, :] == target[:, None], row_g[:, None], 0.0)
    if SOFTCAP:
        ratio = tl.maximum(z * (1 / softcap), -1.0)  # a masked entry's logit is -inf, and its derivative 0
        x *= tl.maximum(1 - ratio * ratio, 0.0)
    x = tl.where(used[:, None], x, 0.0)
    tl.store(dz + where, x.to(dz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def value_kernel(weights, nll, value, size, BLOCK: tl.constexpr):
    """Write value = sum of weights times nll, in ascending order. Runs as one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        inside = where < size
        loss = tl.load(nll + where, mask=inside, other=0.0)
        total += tl.load(weights + where, mask=inside, other=0.0) * loss
    tl.store(value, tl.sum(total, 0))


@triton.jit
def multiply_kernel(
    x, y, factor, targets, x_size, y_size, N, K, D,
    SECOND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply x and y, contiguous, in place by factor; most often the factor is 1, and nothing is done.

    With ROWS x is (N, D), and its rows without a target become 0; without any target, all of x and y do.
    """
    by = tl.load(factor).to(tl.float32)
    clear = tl.program_id(0) < 0  # false
    if (tl.abs(by) < INF) == 0:
        clear = most(targets, N * K, BLOCK) < 0
    if ROWS:
        multiply_rows(x, by, clear, targets, N, K, D, BLOCK)
    if by != 1.0:
        if ROWS == 0:
            multiply_one(x, by, clear, x_size, BLOCK)
        if SECOND:
            multiply_one(y, by, clear, y_size, BLOCK)


@triton.jit
def most(targets, size, BLOCK: tl.constexpr):
    """The largest target; -1 if there is none."""
    found = tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(targets + where, mask=where < size, other=-1))
    return tl.max(found, 0)


@triton.jit
def multiply_one(x, by, clear, size, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        where = start + tl.arange(0, BLOCK)
        product = tl.load(x + where, mask=where < size, other=0.0).to(tl.float32) * by
        product = tl.where(clear, 0.0, product)
        tl.store(x + where, product.to(x.dtype.element_ty), mask=where < size)


@triton.jit
def multiply_rows(x, by, clear, targets, N, K, D, BLOCK: tl.constexpr):
    """Multiply the rows of x that have a target; the others become 0."""
    for row in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        unused = most(targets + row * K, K, 16) < 0
        if unused | (by != 1.0):
            for start in range(0, D, BLOCK):
                column = start + tl.arange(0, BLOCK)
                where = x + row * D + column
                product = tl.load(where, mask=column < D, other=0.0).to(tl.float32) * by
                product = tl.where(unused | clear, 0.0, product)
                tl.store(where, product.to(x.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["v", "ignore_index", "size"])
def prepare_kernel(targets, out, v, ignore_index, size, BLOCK: tl.constexpr):
    """Write out int64 = targets, with -1 for ``ignore_index``; any other outside [0, v) is a device-side assertion.

    It must be launched with ``debug=True``: without it, Triton leaves assertions out.
    """
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        where = start + tl.arange(0, BLOCK)
        inside = where < size
        target = tl.load(targets + where, mask=inside, other=0).to(tl.int64)
        ignored = target == ignore_index
        counts = (target >= 0) & (target < v)
        tl.device_assert(counts | ignored, "cce: a target outside [0, V) that is not ignore_index", mask=inside)
        tl.store(out + where, tl.where(counts & (ignored == 0), target, -1), mask=inside)


@triton.jit(do_not_specialize=["v", "ignore_index", "size"])
def prepare_mean_kernel(targets, out, weights, v, ignore_index, size, BLOCK: tl.constexpr):
    """Write out like ``prepare_kernel``; weights = 1 / (number of targets that are not -1) for these, 0 for the others.

    It runs as one program, launched with ``debug=True``.
    """
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        inside = where < size
        target = tl.load(targets + where, mask=inside, other=0).to(tl.int64)
        ignored = target == ignore_index
        counts = (target >= 0) & (target < v)
        tl.device_assert(counts | ignored, "cce: a target outside [0, V) that is not ignore_index", mask=inside)
        counts = counts & (ignored == 0)
        tl.store(out + where, tl.where(counts, target, -1), mask=inside)
        total += (counts & inside).to(tl.int32)
    count = tl.sum(total, 0).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        target = tl.load(targets + where, mask=where < size, other=0).to(tl.int64)
        used = ((target >= 0) & (target < v) & (target != ignore_index)).to(tl.float32)
        tl.store(weights + where, tl.div_rn(used, count), mask=where < size)
