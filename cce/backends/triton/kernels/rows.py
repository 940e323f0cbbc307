"""Operations on rows around the products: joins of their statistics, the maps, copies in another order, sums."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import INF, LN2, LOG2E, NEG_INF, finite
from cce.backends.triton.kernels.totals import log_of_sum, store_totals


@triton.jit
def outputs_kernel(
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
def fill_maps_kernel(
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


@triton.jit
def gather_rows_kernel(
    x, index, keep, out, rows, D, stride_row, stride_d,
    KEEP: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write out [rows, D] = x[index]; with KEEP, zeros where ``keep[index]`` is 0, whatever x holds there."""
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row = tl.load(index + tl.minimum(place, rows - 1)).to(tl.int64)
    inside = (place < rows)[:, None]
    if not EVEN_D:
        inside = inside & (d < D)[None, :]
    inside = tl.broadcast_to(inside, (BLOCK_R, BLOCK_D))
    counts = inside
    if KEEP:
        counts = counts & (tl.load(keep + row) != 0)[:, None]
    values = tl.load(x + row[:, None] * stride_row + d[None, :] * stride_d, mask=counts, other=0.0)
    tl.store(out + place.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside)


@triton.jit
def scatter_rows_kernel(
    total, row_order, keep, norm, de, D, stride_total, stride_de, NORM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write de in its dtype, its rows back in their own order; 0 in rows that do not count, whatever their sums are."""
    i = tl.program_id(0)
    row = tl.load(row_order + i).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D) & (tl.load(keep + row) != 0)
    x = tl.load(total + i.to(tl.int64) * stride_total + d, mask=inside, other=0.0)
    if NORM:
        x *= tl.load(norm)
    tl.store(de + row * stride_de + d, x.to(de.dtype.element_ty), mask=d < D)


@triton.jit
def add_rank_one_kernel(dc, u, total, D, stride_dc, BLOCK_D: tl.constexpr):
    """Compute dc_v += u_v total, added in float32 and rounded once."""
    v = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    where = dc + v * stride_dc + d
    x = tl.load(where, mask=d < D, other=0.0).to(tl.float32)
    x += tl.load(u + v) * tl.load(total + d, mask=d < D, other=0.0)
    tl.store(where, x.to(dc.dtype.element_ty), mask=d < D)
