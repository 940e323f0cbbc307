"""The gradient of the logits of a work list's live tiles, into scratch memory (docs/algorithm.md, step 4).

A tile is recomputed as in the forward; its columns may belong to several vocabulary blocks.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    ZERO,
    barrier,
    flags,
    floats,
    function,
    ints,
    longs,
    pointer,
    repeat,
    shared_address,
    write_float,
)
from cce.backends.numba.kernels.dx import make_add_biases, make_column_sums, make_dx
from cce.backends.numba.kernels.formula import make_store
from cce.backends.numba.kernels.tiles import make_logit_tile


def make_live(options):
    """Make the kernel for dx of live tiles: TILE_V / BLOCK_V of a row block at a time, in [BLOCK_N, BLOCK_V] slots."""
    tile = options.tile
    TILE_V, R, K, THREADS = tile.columns, tile.thread_rows, tile.thread_columns, tile.threads
    BLOCK_N, BLOCK_V, BLOCKS = options.block_n, options.block_v, tile.columns // options.block_v
    BIAS, SUMS, ORDERED, SORTED = options.bias, options.sums, options.ordered, options.sorted
    PART_ROWS, STEP, PANELS = 16 * tile.parts, tile.threads // 8, tile.stages * tile.stage_bytes
    WHOLE = options.block_v % STEP == 0
    BIASES, GS, WIDTH = options.biases, 1 if options.one_target else K, options.block_v // 4
    dx, add_biases = make_dx(options, options.block_v), make_add_biases(tile)
    put, join = make_column_sums(tile)
    _, store_pair = make_store(tile.kind)
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def entry_of(place, order, V):
        """Vocabulary entry at a place; a place beyond the last is read as the last, and its dx is never read."""
        place = np.int32(min(place, V - 1))
        return np.int32(longs(order)[place]) if ORDERED else place

    @function
    def rows_of_item(
        item, e_rows, c_rows, blocks_at, item_block, item_first, item_tiles, tile_list, row_order, order,
        N, V, T, e_pitch, c_pitch, thread,
    ):  # fmt: skip
        """Starts of the rows of e and c that an item reads, and the vocabulary blocks at its columns."""
        b, at, last = ints(item_block)[item], ints(item_first)[item], ints(item_tiles)[item] - 1
        for n in range(BLOCKS):
            blocks_at[n] = ints(tile_list)[np.int64(b) * T + at + min(n, last)]
        for n in range(e_copies):
            row = min(b * BLOCK_N + (thread >> 3) + n * STEP, N - 1)
            e_rows[n] = (row if SORTED else longs(row_order)[row]) * e_pitch
        for n in range(c_copies):
            if WHOLE:  # one block for all threads
                place = blocks_at[n * STEP // BLOCK_V] * BLOCK_V + n * STEP % BLOCK_V + (thread >> 3)
            else:
                column = (thread >> 3) + n * STEP
                t = ints(tile_list)[np.int64(b) * T + at + min(column // BLOCK_V, last)]
                place = t * BLOCK_V + column % BLOCK_V
            c_rows[n] = entry_of(place, order, V) * c_pitch

    @function
    def finish_row(r, state):
        """Replace a row's products by dx, or by 0 where the row needs no gradient."""
        z, row0, N, starts, gs, given, row_order, keep = state
        row = longs(row_order)[min(row0 + 8 * r, N - 1)]
        counts = row0 + 8 * r < N and flags(keep)[row] != 0
        dx(z, r, row, counts, starts, 0, gs, given)

    all_rows = repeat(finish_row, R)

    def live_kernel(
        e: pointer, c: pointer, bias: pointer, order: pointer, row_order: pointer, keep: pointer,
        dz: pointer, column_sums: pointer, tile_list: pointer, item_block: pointer, item_first: pointer,
        item_slot: pointer, item_tiles: pointer, items: pointer,
        lse: pointer, entropy: pointer, a: pointer, g: pointer, h: pointer, targets: pointer,
        N: int32, V: int32, T: int32, targets_a_row: int32, pieces: int32, e_pitch: int32,
        c_pitch: int32, max_items: int32, scale: float32, softcap: float32, chunk: int32,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        row_of_mine = PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)
        column0 = 2 * (thread & 3)
        z = cuda.local.array((R, K), float32)
        starts = cuda.local.array(BLOCKS, int32)
        blocks_at = cuda.local.array(BLOCKS, int32)
        gs = cuda.local.array(GS, float32)
        e_rows = cuda.local.array(e_copies, int32)
        c_rows = cuda.local.array(c_copies, int32)

        item, step = np.int64(chunk) * max_items + cuda.blockIdx.x, cuda.gridDim.x
        end = np.int64(chunk) * max_items + ints(items)[chunk]
        if item < end:
            rows_of_item(item, e_rows, c_rows, blocks_at, item_block, item_first, item_tiles, tile_list, row_order,
                         order, N, V, T, e_pitch, c_pitch, thread)  # fmt: skip
            begin(shared, e, c, e_rows, c_rows, pieces, thread)
        while item < end:
            # Tile origin: rows of block b in the work list's order; for each BLOCK_V columns one of its live tiles.
            row0 = ints(item_block)[item] * BLOCK_N + row_of_mine
            slot, count = ints(item_slot)[item], ints(item_tiles)[item]
            for n in range(BLOCKS):
                starts[n] = blocks_at[n] * BLOCK_V + column0
            item += step
            # Logit tile, as in the forward.
            for r in range(R):
                for k in range(K):
                    z[r, k] = ZERO
            product(z, shared, e, c, e_rows, c_rows, pieces, thread)
            if item < end:
                rows_of_item(item, e_rows, c_rows, blocks_at, item_block, item_first, item_tiles, tile_list,
                             row_order, order, N, V, T, e_pitch, c_pitch, thread)  # fmt: skip
                begin(shared, e, c, e_rows, c_rows, pieces, thread)
            # Epilogue.
            if BIAS:
                for b in range(BLOCKS):
                    for column in range(thread, BLOCK_V, THREADS):
                        entry = entry_of(starts[b] - column0 + column, order, V)
                        write_float(shared + BIASES + 4 * (b * BLOCK_V + column), floats(bias)[entry])
                barrier()
                add_biases(z, shared + BIASES + 4 * column0)
            given = (lse, entropy, a, g, h, a, targets, targets_a_row, scale, softcap)
            all_rows((z, row0, N, starts, gs, given, row_order, keep))
            # Store.
            for r in range(R):
                for b in range(BLOCKS):
                    if b < count:
                        line = (np.int64(slot + b) * BLOCK_N + row_of_mine + 8 * r) * BLOCK_V + column0
                        for j in range(WIDTH // 2):
                            k = b * WIDTH + 2 * j
                            store_pair(dz, line + 8 * j, z[r, k], z[r, k + 1])
            if SUMS:
                put(z, shared + PANELS, thread)
                for column in range(thread, TILE_V, THREADS):
                    if column // BLOCK_V < count:
                        floats(column_sums)[np.int64(slot) * BLOCK_V + column] = join(shared + PANELS, column)

    return live_kernel
