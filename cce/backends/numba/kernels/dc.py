"""dC = dx^T e of live tiles, and the compensation for the dead ones (docs/algorithm.md, steps 4 and 5)."""

import numpy as np
from numba import float32

from cce.backends.numba.device import ZERO, copies_commit, divide, flags, floats, function, ints, longs
from cce.backends.numba.kernels.formula import make_store
from cce.backends.numba.kernels.tiles import make_load_panel, make_step
from cce.backends.numba.tile import PANEL, PIECES


def make_dc(options):
    """Make the function for a tile of dc [V, D]: sum of dx^T e over live row blocks, and compensation for dead ones."""
    tile = options.tile
    ROWS, TILE_D, R, K, DEPTH, STAGES, STAGE = (
        tile.rows, tile.columns, tile.thread_rows, tile.thread_columns, tile.depth, tile.stages,
        options.stage_transposed,
    )  # fmt: skip
    BLOCK_N, BLOCK_V, ORDERED, SORTED = options.block_n, options.block_v, options.ordered, options.sorted
    COMPENSATE, NORM = options.compensate, options.norm
    STEPS, AHEAD, HEIGHT = -(-BLOCK_N // DEPTH), tile.ahead, PANEL * DEPTH
    PIECES_D, PIECES_M, PIECES_V = (x * tile.itemsize // 16 for x in (TILE_D, ROWS, BLOCK_V))
    PANELS_V, PANELS_D, PARTS = tile.panels(ROWS), tile.panels(TILE_D), BLOCK_V // ROWS
    PART_ROWS, STRIDE = 16 * tile.parts, tile.threads // 8
    load_panel, copies = make_load_panel(DEPTH, tile.threads)
    arrived, start, multiply, finish = make_step(tile, PANELS_V * HEIGHT, True, True)
    store, store_pair = make_store(options.out)

    @function
    def load(
        stage, step, steps, dz, e, row_order, keep, block_list, slot_list, at, dx_rows, e_rows, N, e_pitch, v_piece,
        d_piece, pieces, thread,
    ):  # fmt: skip
        """Start the copies of dx and the rows of e of a step, if there is one; always form one group of copies."""
        if step < steps:
            b, slot = ints(block_list)[at + step // STEPS], ints(slot_list)[at + step // STEPS]
            for n in range(copies):
                nth = step % STEPS * DEPTH + (thread >> 3) + n * STRIDE
                row = np.int64(b * BLOCK_N + nth)
                counts = nth < BLOCK_N and row < N
                row = min(row, N - 1)
                if not SORTED:
                    row = longs(row_order)[row]
                    counts = counts and flags(keep)[row] != 0
                dx_rows[n] = (slot * BLOCK_N + nth) * PIECES_V if nth < BLOCK_N else -1
                e_rows[n] = row * e_pitch if counts else -1
            for p in range(PANELS_V):
                load_panel(stage + p * HEIGHT, dz, dx_rows, v_piece + p * PIECES, PIECES_V, thread)
            for p in range(PANELS_D):
                load_panel(stage + (PANELS_V + p) * HEIGHT, e, e_rows, d_piece + p * PIECES, pieces, thread)
        copies_commit()

    @function
    def dc(
        z, dx_rows, e_rows, item, shared, dz, e, order, row_order, keep, live_count, block_list, slot_list, t0, mass_e,
        norm, out, N, V, D, dc_pitch, blocks, pieces, e_pitch, thread,
    ):  # fmt: skip
        tiles_d = (dc_pitch + TILE_D - 1) // TILE_D
        # Output tile: entries of vocabulary block t, ROWS of them, columns from d0.
        t, part, nth_d = t0 + item // (tiles_d * PARTS), item // tiles_d % PARTS, item % tiles_d
        at, steps = np.int64(t) * blocks, ints(live_count)[t] * STEPS
        for step in range(AHEAD):
            load(shared + step * STAGE, step, steps, dz, e, row_order, keep, block_list, slot_list, at, dx_rows,
                 e_rows, N, e_pitch, part * PIECES_M, nth_d * PIECES_D, pieces, thread)  # fmt: skip
        d0 = nth_d * TILE_D + 2 * (thread & 3)
        mass, entries = np.int64(t) * D + d0, float32(min(BLOCK_V, V - t * BLOCK_V))
        for k in range(K):
            share = ZERO
            if COMPENSATE and 8 * (k >> 1) < D - d0:  # D is even
                share = divide(floats(mass_e)[mass + 8 * (k >> 1) + (k & 1)], entries)
            for r in range(R):
                z[r, k] = share
        now, later = 0, AHEAD
        for step in range(steps):
            arrived()
            start(z, shared + now * STAGE, thread)
            load(shared + later * STAGE, step + AHEAD, steps, dz, e, row_order, keep, block_list, slot_list, at,
                 dx_rows, e_rows, N, e_pitch, part * PIECES_M, nth_d * PIECES_D, pieces, thread)  # fmt: skip
            multiply(z, shared + now * STAGE, thread)
            now = now + 1 if now + 1 < STAGES else 0
            later = later + 1 if later + 1 < STAGES else 0
        finish(z)
        # Store: written once, in its final dtype.
        for r in range(R):
            place = t * BLOCK_V + part * ROWS + PART_ROWS * (thread >> 5) + ((thread & 31) >> 2) + 8 * r
            if place < V:
                line = (longs(order)[place] if ORDERED else np.int64(place)) * dc_pitch
                factor = floats(norm)[0] if NORM else float32(1)
                for j in range(K // 2):
                    d = d0 + 8 * j
                    x, y = z[r, 2 * j] * factor, z[r, 2 * j + 1] * factor
                    if (dc_pitch & 1) == 0:
                        if d < dc_pitch:
                            store_pair(out, line + d, x, y)
                    else:
                        if d < dc_pitch:
                            store(out, line + d, x)
                        if d + 1 < dc_pitch:
                            store(out, line + d + 1, y)

    return dc, ((R, K), copies, copies)
