"""The forward: statistics of every tile's rows; the logits stay in registers.

Step 1 of docs/algorithm.md. A program owns BLOCK_N rows and one of SPLITS stretches of the vocabulary and walks along
it, carrying each row's maximum and sum; ``outputs_kernel`` (rows.py) joins the splits in ascending order, so the bits
are the same every run. With MAPS the statistics of every BLOCK_V entries are stored too, for the filter. A vocabulary
with its own order is processed in windows: copies of the rows of c that are consecutive in it.
"""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import (
    LN2,
    LOG2E,
    NEG_INF,
    cap,
    finite,
    logit_tile,
    store_as_held,
    wide,
)


@triton.jit
def unit_of(pid, blocks, SPLITS, GROUP_N: tl.constexpr):
    """Row block and split of a program: GROUP_N row blocks run side by side, so that they share reads."""
    group = pid // (GROUP_N * SPLITS)
    first = group * GROUP_N
    size = tl.minimum(blocks - first, GROUP_N)
    inside = pid - group * GROUP_N * SPLITS
    return first + inside % size, inside // size


@triton.jit
def add_tile(
    z, t, rows, weight, entries, m, s, gap, weighted, best,
    N, V, stride_t, first_tile, tile_max, tile_log_sum, tile_entropy,
    ONLINE: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, PREDICTION: tl.constexpr,
    MAPS: tl.constexpr, TILE_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile: compute its statistics in blocks of BLOCK_V, store them for maps, and add them to the row's.

    s = sum exp(z - m) and gap = sum exp(z - m) (m - z); every term of gap is at least 0, and so is the entropy
    log s + gap / s. The sums of a block are relative to its own maximum, with ONLINE to the running one. A maximum may
    hide a NaN; a sum does not, nor does anything computed from it.
    """
    TILES: tl.constexpr = TILE_V // BLOCK_V
    z3 = tl.reshape(z, (BLOCK_N, TILES, BLOCK_V))
    tile_m = tl.max(z3, 2)  # [BLOCK_N, TILES]
    row_m = tl.max(tile_m, 1)  # [BLOCK_N]
    m_new = tl.maximum(m, row_m)
    if ONLINE:
        shift = tl.broadcast_to(finite(m_new)[:, None], (BLOCK_N, TILES))
    else:
        # For a masked block use the row's own maximum: exp(0 - m) may be inf, and times the sum, 0, would be NaN.
        shift = tl.where(tile_m == NEG_INF, finite(m_new)[:, None], finite(tile_m))
    p = tl.exp2((z3 - shift[:, :, None]) * LOG2E)
    tile_s = tl.sum(p, 2)
    if ENTROPY:
        tile_gap = tl.sum(tl.where(p > 0, p * (shift[:, :, None] - z3), 0.0), 2)
    if MAPS:
        where = ((first_tile + t) * TILES + tl.arange(0, TILES))[None, :].to(tl.int64) * stride_t + rows[:, None]
        inside = tl.broadcast_to((rows < N)[:, None], (BLOCK_N, TILES))
        log_sum = tl.log2(tile_s) * LN2
        if ONLINE:
            log_sum += shift - tile_m
        # The sum is at least 0. All entries may be masked, or vanish relative to the running maximum; NaN stays.
        log_sum = tl.where((tile_s == 0) | (log_sum < 0), 0.0, log_sum)
        store_as_held(tile_max + where, tile_m, inside)
        store_as_held(tile_log_sum + where, log_sum, inside)
        if TILE_ENTROPY:
            tile_h = tl.where(tile_s > 0, tl.log2(tile_s) * LN2 + tile_gap / tile_s, 0.0)
            store_as_held(tile_entropy + where, tile_h, inside)

    safe = finite(m_new)
    old = tl.exp2((m - safe) * LOG2E)  # 0 for the first tile, where m = -inf
    new = tl.exp2((shift - safe[:, None]) * LOG2E)  # [BLOCK_N, TILES]; 1 with ONLINE
    if ENTROPY:
        moved = tl.where(s > 0, (gap + s * (safe - m)) * old, 0.0)
        gap = moved + tl.sum((tile_gap + tile_s * (safe[:, None] - shift)) * new, 1)
    s = s * old + tl.sum(tile_s * new, 1)
    if WEIGHTED:
        u = tl.load(weight + entries)
        # Only columns beyond V are left out: 0 times -inf is NaN, as in PyTorch.
        columns = (t * TILE_V + tl.arange(0, TILE_V) < V)[None, :]
        weighted += tl.sum(tl.where(columns, z * u[None, :], 0.0), 1)
    if PREDICTION:
        # Replace NaN, which a row not in use may hold: the interpreter refuses to find its maximum.
        place = (first_tile + t) * TILE_V + tl.argmax(tl.where(z == z, z, NEG_INF), 1, tie_break_left=True)
        best = tl.where(row_m > m, place, best)
    return m_new, s, gap, weighted, best


@triton.jit
def statistics_kernel(
    e, c, bias, weight, in_use,
    split_max, split_sum, split_gap, split_weighted, split_best,  # [SPLITS, N]
    tile_max, tile_log_sum, tile_entropy,  # [T, N]
    N, V, D, stride_en, stride_ed, stride_cv, stride_cd, stride_t, scale, softcap, SPLITS, first_tile,
    E_TMA: tl.constexpr, C_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ONLINE: tl.constexpr,
    ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, PREDICTION: tl.constexpr,
    MAPS: tl.constexpr, TILE_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, FLATTEN: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of a window of the vocabulary: V rows of c, after ``first_tile`` tiles of earlier windows.

    CARRY: there were earlier windows; each split continues from the results of the split of the same number.
    """
    # Tile origin: the rows of block i, and for each t of the split TILE_V places of the window from t TILE_V.
    i, split = unit_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), SPLITS, GROUP_N)
    row0 = i * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_N)
    if tl.max(tl.load(in_use + rows, mask=rows < N, other=0).to(tl.int32), 0) == 0:
        return
    read = wide(tl.minimum(rows, N - 1), WIDE)
    tiles = tl.cdiv(V, TILE_V)
    whole = V // TILE_V
    first, last = split * tiles // SPLITS, (split + 1) * tiles // SPLITS

    kept = split.to(tl.int64) * N + rows
    m = tl.full((BLOCK_N,), NEG_INF, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    gap = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.zeros((BLOCK_N,), tl.int32)
    if CARRY:
        m = tl.load(split_max + kept, mask=rows < N, other=NEG_INF)
        s = tl.load(split_sum + kept, mask=rows < N, other=0.0)
        if ENTROPY:
            gap = tl.load(split_gap + kept, mask=rows < N, other=0.0)
        if WEIGHTED:
            weighted = tl.load(split_weighted + kept, mask=rows < N, other=0.0)
        if PREDICTION:
            best = tl.load(split_best + kept, mask=rows < N, other=0)
    for t in tl.range(first, tl.minimum(last, whole), flatten=FLATTEN):
        # Logit tile: z = softcap tanh(scale (e c^T + bias) / softcap).
        entries = wide(tl.minimum(t * TILE_V + tl.arange(0, TILE_V), V - 1), WIDE)
        z = logit_tile(e, c, row0, read, t * TILE_V, entries, D, stride_en, stride_ed, stride_cv, stride_cd,
                       E_TMA, C_TMA, EVEN_D, DOT, PRECISION, BLOCK_N, TILE_V, BLOCK_D)  # fmt: skip
        z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
        m, s, gap, weighted, best = add_tile(
            z, t, rows, weight, entries, m, s, gap, weighted, best,
            N, V, stride_t, first_tile, tile_max, tile_log_sum, tile_entropy,
            ONLINE, ENTROPY, WEIGHTED, PREDICTION, MAPS, TILE_ENTROPY, BLOCK_N, TILE_V, BLOCK_V)  # fmt: skip
    if last > whole:
        # The ragged last tile: its columns beyond V are masked after the softcap, which would undo it.
        entries = wide(tl.minimum(whole * TILE_V + tl.arange(0, TILE_V), V - 1), WIDE)
        z = logit_tile(e, c, row0, read, whole * TILE_V, entries, D, stride_en, stride_ed, stride_cv, stride_cd,
                       E_TMA, C_TMA, EVEN_D, DOT, PRECISION, BLOCK_N, TILE_V, BLOCK_D)  # fmt: skip
        z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
        z = tl.where((whole * TILE_V + tl.arange(0, TILE_V) < V)[None, :], z, NEG_INF)
        m, s, gap, weighted, best = add_tile(
            z, whole, rows, weight, entries, m, s, gap, weighted, best,
            N, V, stride_t, first_tile, tile_max, tile_log_sum, tile_entropy,
            ONLINE, ENTROPY, WEIGHTED, PREDICTION, MAPS, TILE_ENTROPY, BLOCK_N, TILE_V, BLOCK_V)  # fmt: skip

    # Store: one number per row and split, in the layout of the product's rows, whose lanes hold copies.
    inside = rows < N
    store_as_held(split_max + kept, m, inside)
    store_as_held(split_sum + kept, s, inside)
    if ENTROPY:
        store_as_held(split_gap + kept, gap, inside)
    if WEIGHTED:
        store_as_held(split_weighted + kept, weighted, inside)
    if PREDICTION:
        store_as_held(split_best + kept, best, inside)
