"""The forward: statistics of every tile's rows, then of the rows; the logits stay in registers.

Steps 1 and 2 of docs/algorithm.md. A program owns BLOCK_N rows and one of SPLITS stretches of the vocabulary and walks
along it, carrying each row's maximum and sum; ``reduce_kernel`` joins the splits in ascending order, so the bits are
the same every run. With MAPS the statistics of every BLOCK_V entries are stored too, for the filter. A vocabulary with
its own order is processed in windows: copies of the rows of c that are consecutive in it.
"""

import triton
import triton.language as tl

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
def forward_kernel(
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


@triton.jit
def reduce_kernel(
    split_max, split_sum, split_gap, split_weighted, split_best,  # [SPLITS, N]
    target_logits, targets, in_use, order, lse, lse_low, nll, entropy, weighted_logit, prediction,
    N, K, SPLITS,
    ORDER: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, PREDICTION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Join the splits of some rows; ignored rows get 0, and -1 for the prediction."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, BLOCK_S)[:, None]
    used = tl.load(in_use + rows, mask=rows < N, other=0) != 0
    inside = (splits < SPLITS) & used[None, :]
    where = splits.to(tl.int64) * N + rows[None, :]
    m = tl.load(split_max + where, mask=inside, other=NEG_INF)  # [BLOCK_S, BLOCK_N]
    s = tl.load(split_sum + where, mask=inside, other=0.0)

    row_m = tl.max(m, 0)
    # Subtract only maxima from each other, never other numbers that contain the offset of a row's logits.
    shifted = m - finite(row_m)[None, :]
    log_sum = log_of_sum(tl.sum(s * tl.exp2(shifted * LOG2E), 0))
    has_softmax = store_totals(row_m, log_sum, rows, used, N, K, target_logits, targets, lse, lse_low, nll)
    if ENTROPY:
        # The chain rule: H = sum_k w_k (H_k - log w_k) with w_k = exp(lse_k - lse), H_k = log s_k + gap_k / s_k.
        gap = tl.load(split_gap + where, mask=inside & (s > 0), other=0.0)
        s_safe = tl.where(s > 0, s, 1.0)
        log_s = tl.log2(s_safe) * LN2
        log_w = tl.where(s > 0, shifted + (log_s - log_sum[None, :]), 0.0)
        terms = tl.exp2(log_w * LOG2E) * (log_s + gap / s_safe - log_w)
        h = tl.sum(tl.where(s > 0, terms, 0.0), 0)
        h = tl.where(has_softmax, tl.where(h < 0, 0.0, h), float("nan"))
        tl.store(entropy + rows, tl.where(used, h, 0.0), mask=rows < N)
    if WEIGHTED:
        parts = tl.load(split_weighted + where, mask=inside, other=0.0)
        tl.store(weighted_logit + rows, tl.sum(parts, 0), mask=rows < N)
    if PREDICTION:
        # The first place of the largest logit; a row of NaN has none and gets 0.
        parts = tl.load(split_best + where, mask=inside, other=0)
        NONE: tl.constexpr = 2**31 - 1
        place = tl.min(tl.where(inside & (m == row_m[None, :]), parts, NONE), 0)
        place = tl.where(place == NONE, 0, place)
        if ORDER:
            entry = tl.load(order + place, mask=used, other=-1)
        else:
            entry = place.to(tl.int64)
        tl.store(prediction + rows, tl.where(used, entry, -1), mask=rows < N)


@triton.jit
def target_kernel(
    e, c, bias, targets, target_logits, used_e,
    D, K, stride_en, stride_ed, stride_cv, stride_cd, scale, softcap,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, COPY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute z[i, target] of one row and one of its K targets, a dot product; 0 without a target.

    COPY: also copy the rows of e to used_e [N, D], with zeros where there is no target, whatever e holds there; K is 1.
    """
    i, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(targets + i * K + k)
    used = target >= 0
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (d < D) & used
        e_row = tl.load(e + i * stride_en + d * stride_ed, mask=inside, other=0.0)
        if COPY:
            tl.store(used_e + i * D + d, e_row, mask=d < D)
        c_row = tl.load(c + target * stride_cv + d * stride_cd, mask=inside, other=0.0).to(tl.float32)
        products += e_row.to(tl.float32) * c_row
    total = 0.0
    if used:
        z = cap(tl.sum(products, 0) + tl.zeros((1, 1), tl.float32), target + tl.zeros((1,), tl.int64),
                bias, scale, softcap, BIAS, SCALE, SOFTCAP)  # fmt: skip
        total = tl.sum(tl.sum(z, 1), 0)
    tl.store(target_logits + i * K + k, total)


@triton.jit
def mass_kernel(
    tile_max, tile_log_sum, lse, lse_low, in_use, tile_mass, tile_entropy, map_entropy,
    N, T, stride_t, stride_mass, log_threshold,
    LEAST_HIT: tl.constexpr, ELEMENT: tl.constexpr, TILE_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Fill the backward's map: exp((m - lse) + (log_sum - lse_low)), negated where the filter keeps the tile.

    It keeps a tile unless its quantity is at most the threshold: the largest softmax value for "element", the mass
    itself for "tile". The map is NaN in all blocks of a row that has no softmax, and so are the row's gradients.
    """
    tiles = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (tiles < T) & (rows < N)
    used = tl.load(in_use + rows, mask=rows < N, other=0) != 0
    row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
    row_lse = tl.where(tl.abs(row_lse) < INF, row_lse, float("nan"))
    low = tl.load(lse_low + rows, mask=rows < N, other=0.0)
    where = tiles.to(tl.int64) * stride_t + rows
    below = tl.load(tile_max + where, mask=inside & used, other=NEG_INF) - row_lse
    log_mass = below + (tl.load(tile_log_sum + where, mask=inside & used, other=0.0) - low)
    mass = tl.where(used, tl.exp2(log_mass * LOG2E), 0.0)
    if ELEMENT:
        small = below - low <= log_threshold
    else:
        small = log_mass <= log_threshold
    # Not tl.maximum: for NaN it would lose the sign.
    mass = tl.where(small | (used == 0), mass, -tl.where(mass > LEAST_HIT, mass, LEAST_HIT))
    place = tiles.to(tl.int64) * stride_mass + rows
    tl.store(tile_mass + place, mass, mask=inside)
    if TILE_ENTROPY:
        tl.store(map_entropy + place, tl.load(tile_entropy + where, mask=inside & used, other=0.0), mask=inside)
