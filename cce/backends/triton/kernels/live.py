"""The gradient of the logits of live tiles, into slots of the scratch memory (docs/algorithm.md, step 4)."""

import triton
import triton.language as tl

from cce.backends.triton.kernels.gradient import gradient, row_values
from cce.backends.triton.kernels.tiles import cap, entries_of, load_rows, logit_tile, wide


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
def live_kernel(
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
