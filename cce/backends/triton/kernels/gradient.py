"""The gradient of the logits, tile by tile, into scratch memory (docs/algorithm.md, step 4).

``dense_kernel`` writes a chunk of the vocabulary for all rows, ``sparse_kernel`` the live tiles of a work list.
"""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import INF, LOG2E, cap, entries_of, load_rows, logit_tile, wide

#: Stand-in for a logit of -inf where a number times its softmax value must be 0: a log-sum-exp minus it is finite.
LOWEST = tl.constexpr(-1e38)


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
        # p is 0 where z = -inf
        gap = row_lse[:, None] - tl.maximum(z, LOWEST)
        dz = p * (row_a[:, None] + row_h[:, None] * (gap + centre[:, None]))
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
def dense_kernel(
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


@triton.jit
def two_tiles(
    e, c, row0, rows, t0, t1, D, stride_en, stride_ed,
    E_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Multiply one row block by two vocabulary blocks, e c^T, reading e once.  # [BLOCK_N, BLOCK_V] each"""
    z0 = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z1 = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        e_tile = load_rows(e, row0, rows, k, D, stride_en, stride_ed, E_TMA, EVEN_D, BLOCK_D).to(DOT)
        z0 = tl.dot(e_tile, c.load([t0 * BLOCK_V, k]).T, z0, input_precision=PRECISION)
        z1 = tl.dot(e_tile, c.load([t1 * BLOCK_V, k]).T, z1, input_precision=PRECISION)
    return z0, z1


@triton.jit
def store_slots(
    dx, counts, slot, count, spare, entries, dz, dbias, slot_entries,
    DZ_TMA: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store dx of WIDTH / BLOCK_V tiles, ``count`` of them real, in their slots, and the entries of their columns.

    dx is 0 in rows that do not count, whatever their logits are.
    DZ_TMA: store one tile; a tile that is not real goes to the slot after the last, ``spare``, which is never read.
    """
    SLOT: tl.constexpr = BLOCK_N * BLOCK_V
    column = tl.arange(0, WIDTH)
    dx = tl.where(counts[:, None], dx, 0.0)
    inside = column // BLOCK_V < count
    tl.store(slot_entries + slot * BLOCK_V + column, entries.to(tl.int32), mask=inside)
    if DBIAS:
        tl.store(dbias + slot * BLOCK_V + column, tl.sum(dx, 0), mask=inside)
    if DZ_TMA:
        dz.store([tl.where(count > 0, slot, spare) * BLOCK_N, 0], dx.to(dz.dtype))
    else:
        start = (slot + column // BLOCK_V).to(tl.int64) * SLOT + column % BLOCK_V
        where = dz + start[None, :] + (tl.arange(0, BLOCK_N) * BLOCK_V)[:, None]
        tl.store(where, dx.to(dz.dtype.element_ty), mask=tl.broadcast_to(inside[None, :], (BLOCK_N, WIDTH)))


@triton.jit
def item_at(where, item_block, item_slot, item_tiles, item_first):
    """Row block, first slot, number of tiles, and first place in the row block's tile list."""
    return (
        tl.load(item_block + where),
        tl.load(item_slot + where),
        tl.load(item_tiles + where),
        tl.load(item_first + where),
    )


@triton.jit(do_not_specialize=["chunk"])
def sparse_kernel(
    e, c, bias, order, dz, dbias, slot_entries,
    row_order, keep, tile_list, item_block, item_first, item_slot, item_tiles, items,
    lse, lse_low, entropy, a, g, h, targets,
    N, V, D, K, T, stride_en, stride_ed, stride_cv, stride_cd, scale, softcap, chunk, max_items,
    SORTED: tl.constexpr, E_TMA: tl.constexpr, C_TMA: tl.constexpr, DZ_TMA: tl.constexpr, EVEN_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ONE_TARGET: tl.constexpr,
    DBIAS: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx of a chunk's live tiles, TILE_V / BLOCK_V of a row block at a time, in slots of [BLOCK_N, BLOCK_V].

    SORTED: ``e`` holds the rows in the order of the work list, with zeros for those that need no gradient; else in
    their own order. ``keep`` marks the rows that need one: in the others e may be NaN, and a logit far above the value
    given as log-sum-exp.
    C_TMA: one or two tiles, read as boxes of c; else any number, their rows of c gathered in the vocabulary's order.
    """
    total = tl.load(items + chunk)
    base = chunk * max_items
    step = tl.num_programs(0)
    b, slot, count, first = item_at(base + tl.minimum(tl.program_id(0), max_items - 1), item_block, item_slot,
                                    item_tiles, item_first)  # fmt: skip
    for item in range(tl.program_id(0), total, step):
        # Tile origin: rows of block b in the work list's order; for each BLOCK_V columns one of its live tiles.
        sorted_rows = b * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.load(row_order + tl.minimum(sorted_rows, N - 1))
        if SORTED:
            read = wide(tl.minimum(sorted_rows, N - 1), WIDE)
        else:
            read = wide(rows, WIDE)
        counts = (sorted_rows < N) & (tl.load(keep + rows) != 0)
        t0 = tl.load(tile_list + b * T + first)
        values = row_values(rows, lse, lse_low, entropy, a, g, h, targets, ENTROPY, ONE_TARGET)
        # Read the values with which the next round begins now, so that it need not wait.
        next_b, next_slot, next_count, next_first = item_at(
            base + tl.minimum(item + step, total - 1), item_block, item_slot, item_tiles, item_first)  # fmt: skip
        if C_TMA and TILE_V != BLOCK_V:
            t1 = tl.load(tile_list + b * T + first + tl.minimum(1, count - 1))
            z0, z1 = two_tiles(e, c, b * BLOCK_N, read, t0, t1, D, stride_en, stride_ed, E_TMA, EVEN_D, DOT,
                               PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
            for nth in tl.static_range(2):
                if nth == 0:
                    place = t0 * BLOCK_V + tl.arange(0, BLOCK_V)
                    z = z0
                else:
                    place = t1 * BLOCK_V + tl.arange(0, BLOCK_V)
                    z = z1
                entries = tl.minimum(place, V - 1)
                z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
                dx = gradient(z, rows, values, place, V, g, a, a, entries, targets, K, softcap,
                              ENTROPY, False, SOFTCAP, ONE_TARGET, MASK)  # fmt: skip
                store_slots(dx, counts, slot + nth, count - nth, max_items, entries, dz, dbias, slot_entries,
                            DZ_TMA, DBIAS, BLOCK_N, BLOCK_V, BLOCK_V)  # fmt: skip
        else:
            # Use scalars, not a loaded vector, of which a thread would keep a number for each of its columns.
            column = tl.arange(0, TILE_V)
            place = t0 * BLOCK_V + column % BLOCK_V
            for nth in tl.static_range(1, TILE_V // BLOCK_V):
                t = tl.load(tile_list + b * T + first + tl.minimum(nth, count - 1))
                place = tl.where(column // BLOCK_V == nth, t * BLOCK_V + column % BLOCK_V, place)
            entries = entries_of(place, order, V, ORDER, WIDE)
            # Logit tile, as in the forward.
            z = logit_tile(e, c, b * BLOCK_N, read, t0 * BLOCK_V, entries, D, stride_en, stride_ed, stride_cv,
                           stride_cd, E_TMA, C_TMA, EVEN_D, DOT, PRECISION, BLOCK_N, TILE_V, BLOCK_D)  # fmt: skip
            z = cap(z, entries, bias, scale, softcap, BIAS, SCALE, SOFTCAP)
            # Epilogue, and store.
            dx = gradient(z, rows, values, place, V, g, a, a, entries, targets, K, softcap,
                          ENTROPY, False, SOFTCAP, ONE_TARGET, MASK)  # fmt: skip
            store_slots(dx, counts, slot, count, max_items, entries, dz, dbias, slot_entries,
                        DZ_TMA and TILE_V == BLOCK_V, DBIAS, BLOCK_N, TILE_V, BLOCK_V)  # fmt: skip
        b, slot, count, first = next_b, next_slot, next_count, next_first
