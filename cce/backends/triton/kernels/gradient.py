"""The gradient of the logits of all rows and a chunk of the vocabulary, into scratch memory (algorithm.md, step 4)."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import INF, LOG2E, cap, logit_tile, wide

#: Bound of a log-probability that is multiplied: its softmax value is 0 long before, and no product must be 0 * inf,
#: that of a masked entry and of an upstream gradient included.
LEAST_LOG = tl.constexpr(-1e4)


@triton.jit
def row_values(rows, lse, lse_low, entropy, a, g, h, targets, ENTROPY: tl.constexpr, ONE_TARGET: tl.constexpr):
    """Load the epilogue's values of each row, before the product, which hides the wait.  # [BLOCK_N] each

    A row whose log-sum-exp is infinite has no softmax: its log-sum-exp becomes NaN.
    """
    row_lse = tl.load(lse + rows)
    row_lse = tl.where(tl.abs(row_lse) < INF, row_lse, float("nan"))
    row_low = tl.load(lse_low + rows)
    row_a = tl.load(a + rows)
    row_h, centre, target, row_g = row_a, row_a, row_a, row_a
    if ENTROPY:
        row_h = tl.load(h + rows)
        centre = row_low - tl.load(entropy + rows)
    if ONE_TARGET:
        target = tl.load(targets + rows)
        row_g = tl.load(g + rows)
    return row_lse, row_low, row_a, row_h, centre, target, row_g


@triton.jit
def gradient(
    z, rows, values, place, V, g, s, weight, entries, targets, K, softcap,
    ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, ONE_TARGET: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Compute dx = scale softcap'(z) (p (a + h ((lse - z) + (lse_low - H))) - sum_k g_k [j = target_k] + s u_j).

    a, g, h and s have been multiplied by the scale. ``place`` [TILE_V] holds the columns' places in the vocabulary;
    with MASK those beyond V get 0.  # [BLOCK_N, TILE_V]
    """
    row_lse, row_low, row_a, row_h, centre, target, row_g = values
    # exp((z - lse) - lse_low): subtract first the numbers that may share a large offset.
    p = tl.exp2((z - row_lse[:, None]) * LOG2E - (row_low * LOG2E)[:, None])
    if ENTROPY:
        below = tl.maximum(z - row_lse[:, None], LEAST_LOG)
        dz = p * (row_a[:, None] + row_h[:, None] * (centre[:, None] - below))
    else:
        dz = p * row_a[:, None]
    if ONE_TARGET:
        dz = tl.where(place[None, :] == target[:, None], dz - row_g[:, None], dz)
    else:
        for k in range(K):
            target_k = tl.load(targets + rows * K + k)[:, None]
            dz -= tl.where(place[None, :] == target_k, tl.load(g + rows * K + k)[:, None], 0.0)
    if SOFTCAP:
        if WEIGHTED:
            dz += tl.load(s + rows)[:, None] * tl.load(weight + entries)[None, :]
        ratio = tl.maximum(z * (1 / softcap), -1.0)  # a masked entry's logit is -inf, and its derivative 0
        dz *= 1 - ratio * ratio
    if MASK:
        dz = tl.where((place < V)[None, :], dz, 0.0)
    return dz


@triton.jit
def chunk_tile(pid, blocks, tiles, GROUP_N: tl.constexpr):
    """Row block and tile of a program in the chunk: GROUP_N row blocks side by side, row block fastest."""
    group = pid // (GROUP_N * tiles)
    first = group * GROUP_N
    size = tl.minimum(blocks - first, GROUP_N)
    inside = pid - group * GROUP_N * tiles
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["first", "columns", "stride_dz"])
def gradient_kernel(
    e, c, bias, weight, dz, dbias,
    lse, lse_low, entropy, a, g, h, s, targets,
    N, D, K, stride_en, stride_ed, stride_cv, stride_cd, stride_dz, scale, softcap, first, columns,
    E_TMA: tl.constexpr, C_TMA: tl.constexpr, DZ_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, ONE_TARGET: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute dx of a window of the vocabulary, all rows: dz [N, columns], and its column sums over each row block.

    c, bias and weight are those of the window, which begins with entry ``first``.
    """
    blocks, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(columns, TILE_V)
    stride_dz = tl.multiple_of(stride_dz, 16)
    for tile in tl.range(tl.program_id(0), blocks * tiles, tl.num_programs(0), flatten=FLATTEN):
        # Tile origin: rows of block i, places of the chunk's tile t.
        i, t = chunk_tile(tile, blocks, tiles, GROUP_N)
        rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
        read = wide(tl.minimum(rows, N - 1), WIDE)
        place = first + t * TILE_V + tl.arange(0, TILE_V)
        entries = wide(tl.minimum(t * TILE_V + tl.arange(0, TILE_V), columns - 1), WIDE)
        values = row_values(read, lse, lse_low, entropy, a, g, h, targets, ENTROPY, ONE_TARGET)
        # Logit tile, as in the forward.
        z = logit_tile(e, c, i * BLOCK_N, read, t * TILE_V, entries, D, stride_en, stride_ed, stride_cv, stride_cd,
                       E_TMA, C_TMA, EVEN_D, DOT, PRECISION, BLOCK_N, TILE_V, BLOCK_D)  # fmt: skip
        z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
        # Epilogue. Columns beyond the chunk are stored nowhere, so they need no mask.
        dx = gradient(z, read, values, place, 0, g, s, weight, entries, targets, K, softcap,
                      ENTROPY, WEIGHTED, SOFTCAP, ONE_TARGET, False)  # fmt: skip
        # Store.
        column = t * TILE_V + tl.arange(0, TILE_V)
        if DBIAS:
            total = tl.sum(tl.where((rows < N)[:, None], dx, 0.0), 0)
            tl.store(dbias + i.to(tl.int64) * columns + column, total, mask=column < columns)
        if DZ_TMA:
            dz.store([i * BLOCK_N, t * TILE_V], dx.to(dz.dtype))
        else:
            where = dz + rows.to(tl.int64)[:, None] * stride_dz + column[None, :]
            tl.store(where, dx.to(dz.dtype.element_ty), mask=(rows < N)[:, None] & (column < columns)[None, :])
