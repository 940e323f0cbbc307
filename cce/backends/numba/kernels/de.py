"""dE += dx c of live tiles (docs/algorithm.md, step 4)."""

import numpy as np

from cce.backends.numba.device import ZERO, copies_commit, floats, function, ints, longs
from cce.backends.numba.kernels.tiles import make_load_panel, make_step
from cce.backends.numba.tile import PANEL, PIECES


def make_de(options):
    """Make the function that adds the sum of dx c over live tiles to a tile of de [N, D], rows in work list order."""
    tile = options.tile
    TILE_D, R, K, DEPTH, STAGES, STAGE = (
        tile.columns, tile.thread_rows, tile.thread_columns, tile.depth, tile.stages, options.stage
    )  # fmt: skip
    BLOCK_N, BLOCK_V, ORDERED = options.block_n, options.block_v, options.ordered
    STEPS, AHEAD, DX_BYTES, HEIGHT = -(-BLOCK_V // DEPTH), tile.ahead, PANEL * tile.rows, PANEL * DEPTH
    PIECES_D, PIECES_V, PANELS = TILE_D * tile.itemsize // 16, BLOCK_V * tile.itemsize // 16, tile.panels(TILE_D)
    PART_ROWS, STRIDE = 16 * tile.parts, tile.threads // 8
    load_dx, dx_copies = make_load_panel(tile.rows, tile.threads)
    load_c, c_copies = make_load_panel(DEPTH, tile.threads)
    arrived, start, multiply, finish = make_step(tile, DX_BYTES, False, True)

    @function
    def load(
        stage, step, steps, dz, c, order, tile_list, at, slot, dx_rows, c_rows, V, c_pitch, d_piece, pieces, thread
    ):
        """Start the copies of dx and the rows of c of a step, if there is one; always form one group of copies.

        Places beyond the vocabulary have a dx as if they were its last entry, so their rows are read as zeros.
        """
        if step < steps:
            t, part = ints(tile_list)[at + step // STEPS], step % STEPS * DEPTH
            for n in range(dx_copies):
                dx_rows[n] = ((slot + step // STEPS) * BLOCK_N + (thread >> 3) + n * STRIDE) * PIECES_V
            for n in range(c_copies):
                column = part + (thread >> 3) + n * STRIDE
                place = t * BLOCK_V + column
                entry = np.int64(min(place, V - 1))
                if ORDERED:
                    entry = longs(order)[entry]
                c_rows[n] = entry * c_pitch if column < BLOCK_V and place < V else -1
            load_dx(stage, dz, dx_rows, step % STEPS * PIECES, PIECES_V, thread)
            for p in range(PANELS):
                load_c(stage + DX_BYTES + p * HEIGHT, c, c_rows, d_piece + p * PIECES, pieces, thread)
        copies_commit()

    @function
    def de(
        z, dx_rows, c_rows, item, shared, dz, c, order, tile_list, block_slot, block_tiles, block_first, total,
        N, V, D, T, blocks, pieces, c_pitch, chunk, thread,
    ):  # fmt: skip
        # Output tile: row block b, longest first: the work list puts the rows with the most hits last; columns from d0.
        tiles_d = (D + TILE_D - 1) // TILE_D
        b, nth_d = blocks - 1 - item // tiles_d, item % tiles_d
        where = np.int64(chunk) * blocks + b
        steps = ints(block_tiles)[where] * STEPS
        if steps > 0:
            slot, at = ints(block_slot)[where], np.int64(b) * T + ints(block_first)[where]
            for step in range(AHEAD):
                load(shared + step * STAGE, step, steps, dz, c, order, tile_list, at, slot, dx_rows, c_rows, V, c_pitch,
                     nth_d * PIECES_D, pieces, thread)  # fmt: skip
            # The sum so far comes first.
            row0 = b * BLOCK_N + PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)
            d0 = nth_d * TILE_D + 2 * (thread & 3)
            for r in range(R):
                row = np.int64(min(row0 + 8 * r, N - 1)) * D + d0
                for k in range(K):
                    z[r, k] = floats(total)[row + 8 * (k >> 1) + (k & 1)] if 8 * (k >> 1) < D - d0 else ZERO
            now, later = 0, AHEAD
            for step in range(steps):
                arrived()
                start(z, shared + now * STAGE, thread)
                load(shared + later * STAGE, step + AHEAD, steps, dz, c, order, tile_list, at, slot, dx_rows, c_rows,
                     V, c_pitch, nth_d * PIECES_D, pieces, thread)  # fmt: skip
                multiply(z, shared + now * STAGE, thread)
                now = now + 1 if now + 1 < STAGES else 0
                later = later + 1 if later + 1 < STAGES else 0
            finish(z)
            for r in range(R):
                if row0 + 8 * r < N:
                    row = np.int64(row0 + 8 * r) * D + d0
                    for k in range(K):
                        if 8 * (k >> 1) < D - d0:  # D is even
                            floats(total)[row + 8 * (k >> 1) + (k & 1)] = z[r, k]

    return de, ((R, K), dx_copies, c_copies)
