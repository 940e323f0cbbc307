"""Block-sparse products of the live tiles: dE += dx c and dC = dx^T e (docs/algorithm.md, step 4).

Sums run in the order of the work list, so the bits are the same every run: a chunk adds one number to an element of dE,
and chunks follow one another. ``products_kernel`` takes its next output tile from a counter, since the sums of its
tiles differ in length.
"""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import entries_of, wide


@triton.jit
def add_to_de(
    item, dz, c, slot_entries, tile_list, block_slot, block_tiles, block_first, de,
    N, D, T, blocks, stride_cv, stride_cd, chunk,
    DZ_TMA: tl.constexpr, C_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the sum of dx c over the chunk's live tiles to a tile of de [N, D], rows in the work list's order."""
    # Output tile: row block b, longest first, since the work list puts the rows with the most hits last; columns d.
    tiles_d = tl.cdiv(D, BLOCK_D)
    b = blocks - 1 - item // tiles_d
    d0 = (item % tiles_d) * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    count = tl.load(block_tiles + chunk * blocks + b)
    if count > 0:
        base = tl.load(block_slot + chunk * blocks + b)
        first = tl.load(block_first + chunk * blocks + b)
        rows = b * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (d < D)[None, :]
        where = rows.to(tl.int64)[:, None] * D + d[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        STEPS: tl.constexpr = BLOCK_V // BLOCK_K
        for step in tl.range(0, count * STEPS, num_stages=STAGES):
            slot = base + step // STEPS
            k = (step % STEPS) * BLOCK_K
            column = k + tl.arange(0, BLOCK_K)
            if DZ_TMA:
                dx = dz.load([slot * BLOCK_N, k])
            else:
                row = slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
                dx = tl.load(dz + row[:, None] * BLOCK_V + column[None, :])
            if C_TMA:
                t = tl.load(tile_list + b * T + first + step // STEPS)
                c_tile = c.load([t * BLOCK_V + k, d0])
            else:
                entries = wide(tl.load(slot_entries + slot * BLOCK_V + column), WIDE)
                source = c + entries[:, None] * stride_cv + d[None, :] * stride_cd
                if EVEN_D:
                    c_tile = tl.load(source)
                else:
                    c_tile = tl.load(source, mask=(d < D)[None, :], other=0.0)
            total = tl.dot(dx, c_tile.to(DOT), total, input_precision=PRECISION)
        # Add in memory: reading the sum so far would take registers and a wait.
        tl.atomic_add(de + where, total, mask=inside, sem="relaxed")


@triton.jit
def write_dc(
    item, t0, dz, e, order, row_order, keep, live_count, block_list, slot_list, mass_e, norm, dc,
    N, V, D, blocks, stride_en, stride_ed, stride_dc,
    SORTED: tl.constexpr, DZ_TMA: tl.constexpr, E_TMA: tl.constexpr, DC_TMA: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ORDER: tl.constexpr, COMPENSATE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write a tile of dc [V, D]: the sum over live row blocks of dx^T e, and the compensation for the dead ones."""
    # Output tile: entries of vocabulary block t, columns d.
    tiles_d = tl.cdiv(D, BLOCK_D)
    PARTS: tl.constexpr = BLOCK_V // BLOCK_M
    t = t0 + item // (tiles_d * PARTS)
    part = (item // tiles_d) % PARTS * BLOCK_M
    d0 = (item % tiles_d) * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    place = t * BLOCK_V + part + tl.arange(0, BLOCK_M)
    if COMPENSATE:
        columns = tl.minimum(BLOCK_V, V - t * BLOCK_V).to(tl.float32)
        share = tl.load(mass_e + t.to(tl.int64) * D + d, mask=d < D, other=0.0) / columns
        total = tl.broadcast_to(share[None, :], (BLOCK_M, BLOCK_D))
    else:
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    STEPS: tl.constexpr = BLOCK_N // BLOCK_K
    for step in tl.range(0, tl.load(live_count + t) * STEPS, num_stages=STAGES):
        b = tl.load(block_list + t * blocks + step // STEPS)
        slot = tl.load(slot_list + t * blocks + step // STEPS)
        k = (step % STEPS) * BLOCK_K
        row = k + tl.arange(0, BLOCK_K)
        if DZ_TMA:
            dx = dz.load([slot * BLOCK_N + k, part])
        else:
            dx_row = slot.to(tl.int64) * BLOCK_N + row
            dx = tl.load(dz + dx_row[:, None] * BLOCK_V + (part + tl.arange(0, BLOCK_M))[None, :])
        if E_TMA:
            e_tile = e.load([b * BLOCK_N + k, d0])
        else:
            sorted_row = b * BLOCK_N + row
            counts = sorted_row < N
            if SORTED:
                e_row = tl.minimum(sorted_row, N - 1).to(tl.int64)
            else:
                e_row = tl.load(row_order + tl.minimum(sorted_row, N - 1)).to(tl.int64)
                counts = counts & (tl.load(keep + e_row) != 0)
            inside = counts[:, None] & (d < D)[None, :]
            e_tile = tl.load(e + e_row[:, None] * stride_en + d[None, :] * stride_ed, mask=inside, other=0.0)
        total = tl.dot(dx.T, e_tile.to(DOT), total, input_precision=PRECISION)
    # Store: written once, in its final dtype.
    if NORM:
        total *= tl.load(norm)
    if DC_TMA:
        dc.store([t * BLOCK_V + part, d0], total.to(dc.dtype))
    else:
        entries = entries_of(place, order, V, ORDER, WIDE)
        where = dc + entries[:, None] * stride_dc + d[None, :]
        tl.store(where, total.to(dc.dtype.element_ty), mask=(place < V)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["chunk"])
def products_kernel(
    e_dz, c_dz, e, c, slot_entries, tile_list, block_slot, block_tiles, block_first, de,
    order, row_order, keep, live_count, block_list, slot_list, chunk_start, counters, mass_e, norm, dc,
    N, V, D, T, blocks, stride_en, stride_ed, stride_cv, stride_cd, stride_dc, chunk,
    DE: tl.constexpr, DC: tl.constexpr,
    SORTED: tl.constexpr, DZ_TMA: tl.constexpr, C_TMA: tl.constexpr, E_TMA: tl.constexpr,
    DC_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ORDER: tl.constexpr,
    COMPENSATE: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    E_BLOCK_D: tl.constexpr, E_BLOCK_K: tl.constexpr, E_STAGES: tl.constexpr,
    C_BLOCK_M: tl.constexpr, C_BLOCK_D: tl.constexpr, C_BLOCK_K: tl.constexpr, C_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute both products of a chunk: tiles of dE, then of dC, which keep programs busy once no tile of dE is left.

    ``e_dz`` and ``c_dz`` are dx in boxes for either product.
    counters [chunks, 2]: the next tile of each.
    """
    t0 = tl.load(chunk_start + chunk)
    tiles = tl.load(chunk_start + chunk + 1) - t0
    if DE:
        tiles_e = tl.where(tiles > 0, blocks * tl.cdiv(D, E_BLOCK_D), 0)
        item = tl.atomic_add(counters + 2 * chunk, 1)
        while item < tiles_e:
            mine = item
            item = tl.atomic_add(counters + 2 * chunk, 1)  # the next one, requested early so that nothing waits for it
            add_to_de(mine, e_dz, c, slot_entries, tile_list, block_slot, block_tiles, block_first, de, N, D, T,
                      blocks, stride_cv, stride_cd, chunk, DZ_TMA, C_TMA, EVEN_D, DOT, PRECISION, WIDE,
                      BLOCK_N, BLOCK_V, E_BLOCK_D, E_BLOCK_K, E_STAGES)  # fmt: skip
    if DC:
        tiles_c = tiles * tl.cdiv(D, C_BLOCK_D) * (BLOCK_V // C_BLOCK_M)
        item = tl.atomic_add(counters + 2 * chunk + 1, 1)
        while item < tiles_c:
            mine = item
            item = tl.atomic_add(counters + 2 * chunk + 1, 1)
            write_dc(mine, t0, c_dz, e, order, row_order, keep, live_count, block_list, slot_list, mass_e, norm, dc,
                     N, V, D, blocks, stride_en, stride_ed, stride_dc, SORTED, DZ_TMA, E_TMA, DC_TMA, DOT, PRECISION,
                     ORDER, COMPENSATE, NORM, BLOCK_N, BLOCK_V, C_BLOCK_M, C_BLOCK_D, C_BLOCK_K, C_STAGES,
                     WIDE)  # fmt: skip


@triton.jit(do_not_specialize=["chunk"])
def dbias_kernel(
    dbias_slots, order, live_count, block_list, slot_list, chunk_start, mass, norm, dbias,
    V, blocks, chunk,
    ORDER: tl.constexpr, COMPENSATE: tl.constexpr, NORM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dbias [V] of the chunk's entries: live tiles' column sums, in row-block order, and dead rows' mass."""
    t0, t1 = tl.load(chunk_start + chunk), tl.load(chunk_start + chunk + 1)
    for t in range(t0 + tl.program_id(0), t1, tl.num_programs(0)):
        column = tl.arange(0, BLOCK_V)
        place = t * BLOCK_V + column
        total = tl.zeros((BLOCK_V,), tl.float32)
        for nth in range(tl.load(live_count + t)):
            slot = tl.load(slot_list + t * blocks + nth)
            total += tl.load(dbias_slots + slot * BLOCK_V + column)
        if COMPENSATE:
            total += tl.load(mass + t) / tl.minimum(BLOCK_V, V - t * BLOCK_V).to(tl.float32)
        if NORM:
            total *= tl.load(norm)
        entries = tl.minimum(place, V - 1).to(tl.int64)
        if ORDER:
            entries = tl.load(order + entries).to(tl.int64)
        tl.store(dbias + entries, total, mask=place < V)
