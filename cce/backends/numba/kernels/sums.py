"""Block-sparse products of the live tiles: dE += dx c, dC = dx^T e and dbias (docs/algorithm.md, step 4).

No atomics: the order in which a sum runs is that of the work list, so the bits are the same every run. A step of a sum
is ``depth`` places or rows, a panel's width; of a narrower tile the rest is zeros.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    ZERO,
    barrier,
    copies_commit,
    divide,
    flags,
    floats,
    function,
    ints,
    longs,
    pointer,
    shared_address,
)
from cce.backends.numba.kernels.epilogue import make_store
from cce.backends.numba.kernels.tiles import make_load_panel, make_step
from cce.backends.numba.tile import PANEL, PIECES


def make_de(options):
    """The kernel for tiles of de [N, D], rows in the work list's order: += sum over the chunk's live tiles of dx c."""
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
        """dx and the rows of c of a step, if there is one; one group of copies in any case.

        Places beyond the vocabulary have a dx, as if they were its last entry: their rows are zeros.
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

    def de(
        dz: pointer, c: pointer, order: pointer, tile_list: pointer, block_slot: pointer,
        block_tiles: pointer, block_first: pointer, de: pointer,
        N: int32, V: int32, D: int32, T: int32, blocks: int32, pieces: int32, c_pitch: int32,
        chunk: int32,
    ):  # fmt: skip
        # Output tile: row block b, longest first: the work list puts the rows with most hits last; columns from d0.
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        tiles_d = (D + TILE_D - 1) // TILE_D
        b = blocks - 1 - np.int32(cuda.blockIdx.x) // tiles_d
        nth_d = np.int32(cuda.blockIdx.x) % tiles_d
        where = np.int64(chunk) * blocks + b
        steps = ints(block_tiles)[where] * STEPS
        if steps > 0:
            slot, at = ints(block_slot)[where], np.int64(b) * T + ints(block_first)[where]
            dx_rows = cuda.local.array(dx_copies, int32)
            c_rows = cuda.local.array(c_copies, int32)
            for step in range(AHEAD):
                load(shared + step * STAGE, step, steps, dz, c, order, tile_list, at, slot, dx_rows, c_rows, V, c_pitch,
                     nth_d * PIECES_D, pieces, thread)  # fmt: skip
            # The sum so far comes first.
            z = cuda.local.array((R, K), float32)
            row0 = b * BLOCK_N + PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)
            d0 = nth_d * TILE_D + 2 * (thread & 3)
            for r in range(R):
                row = np.int64(min(row0 + 8 * r, N - 1)) * D + d0
                for k in range(K):
                    z[r, k] = floats(de)[row + 8 * (k >> 1) + (k & 1)] if 8 * (k >> 1) < D - d0 else ZERO
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
                            floats(de)[row + 8 * (k >> 1) + (k & 1)] = z[r, k]

    return de


def make_dc(options):
    """The kernel for tiles of dc [V, D]: the sum over live row blocks of dx^T e, and what stands for the dead ones."""
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
        """dx and the rows of e of a step, if there is one; one group of copies in any case."""
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

    def dc(
        dz: pointer, e: pointer, order: pointer, row_order: pointer, keep: pointer, live_count: pointer,
        block_list: pointer, slot_list: pointer, chunk_start: pointer, mass_e: pointer, norm: pointer,
        dc: pointer,
        N: int32, V: int32, D: int32, dc_pitch: int32, blocks: int32, pieces: int32, e_pitch: int32,
        chunk: int32,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        z = cuda.local.array((R, K), float32)
        dx_rows = cuda.local.array(copies, int32)
        e_rows = cuda.local.array(copies, int32)
        t0, t1 = ints(chunk_start)[chunk], ints(chunk_start)[chunk + 1]
        tiles_d = (dc_pitch + TILE_D - 1) // TILE_D
        for item in range(np.int32(cuda.blockIdx.x), (t1 - t0) * PARTS * tiles_d, np.int32(cuda.gridDim.x)):
            # Output tile: entries of vocabulary block t, ROWS of them, columns from d0.
            t, part, nth_d = t0 + item // (tiles_d * PARTS), item // tiles_d % PARTS, item % tiles_d
            at, steps = np.int64(t) * blocks, ints(live_count)[t] * STEPS
            for step in range(AHEAD):
                load(shared + step * STAGE, step, steps, dz, e, row_order, keep, block_list, slot_list, at, dx_rows,
                     e_rows, N, e_pitch, part * PIECES_M, nth_d * PIECES_D, pieces, thread)  # fmt: skip
            d0 = nth_d * TILE_D + 2 * (thread & 3)
            for k in range(K):
                share = ZERO
                if COMPENSATE:
                    d = min(d0 + 8 * (k >> 1) + (k & 1), D - 1)
                    share = divide(floats(mass_e)[np.int64(t) * D + d], float32(min(BLOCK_V, V - t * BLOCK_V)))
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
            barrier()  # all are done with the panels: those of the next tile may come
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
                                store_pair(dc, line + d, x, y)
                        else:
                            if d < dc_pitch:
                                store(dc, line + d, x)
                            if d + 1 < dc_pitch:
                                store(dc, line + d + 1, y)

    return dc


def make_dbias(options):
    """The kernel for dbias [V] of a chunk: column sums of live tiles, in the order of row blocks, and dead mass."""
    BLOCK_V, ORDERED, COMPENSATE, NORM = options.block_v, options.ordered, options.compensate, options.norm

    def dbias(
        column_sums: pointer, order: pointer, live_count: pointer, slot_list: pointer, chunk_start: pointer,
        mass: pointer, norm: pointer, dbias: pointer, V: int32, blocks: int32, chunk: int32,
    ):  # fmt: skip
        t0, t1 = ints(chunk_start)[chunk], ints(chunk_start)[chunk + 1]
        for t in range(t0 + np.int32(cuda.blockIdx.x), t1, np.int32(cuda.gridDim.x)):
            for column in range(np.int32(cuda.threadIdx.x), BLOCK_V, np.int32(cuda.blockDim.x)):
                place = np.int64(t) * BLOCK_V + column
                if place < V:
                    total = ZERO
                    for nth in range(ints(live_count)[t]):
                        slot = ints(slot_list)[np.int64(t) * blocks + nth]
                        total = total + floats(column_sums)[np.int64(slot) * BLOCK_V + column]
                    if COMPENSATE:
                        total = total + divide(floats(mass)[t], float32(min(BLOCK_V, V - t * BLOCK_V)))
                    if NORM:
                        total = total * floats(norm)[0]
                    floats(dbias)[longs(order)[place] if ORDERED else place] = total

    return dbias
