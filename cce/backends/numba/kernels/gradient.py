"""The gradient of the logits, tile by tile, into scratch memory (docs/algorithm.md, step 4).

``make_gradient`` has the kernel for a chunk of the vocabulary and all rows, ``make_live`` that for the live tiles of a
work list. Both recompute a tile as the forward does, and differ in which rows of e and c it is made of.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    LEAST,
    LOG2E,
    NEG_INF,
    ONE,
    TWO,
    ZERO,
    barrier,
    divide,
    exp2,
    flags,
    floats,
    function,
    ints,
    lane_xor,
    longs,
    pointer,
    read_float,
    shared_address,
    write_float,
)
from cce.backends.numba.kernels.epilogue import make_store, repeat
from cce.backends.numba.kernels.tiles import make_logit_tile

FOUR, MOST = np.float32(4), np.float32(1e30)


def make_dx(options, width):
    """The function that turns a row of logits into the gradient of e c^T; its columns come in blocks of ``width``."""
    K, WIDTH, BLOCKS = options.tile.thread_columns, width // 4, options.tile.columns // width
    BIAS, SOFTCAP, SCALE, ENTROPY = options.bias, options.softcap, options.scale, options.entropy
    WEIGHTED, ONE_TARGET = options.weighted and options.softcap, options.one_target
    PART = min(8, WIDTH)  # columns written out as a loop of their own

    @function
    def columns(part, state):
        """dx of some columns of a row."""
        z, r, start, biases, us, gs, row_values, scale, softcap = state
        base, row_a, row_h, centre, row_s, row_g, target, near, counts = row_values
        power_scale = TWO * scale / softcap * LOG2E if SOFTCAP else ZERO
        b = part * PART // WIDTH
        for k in range(part * PART, (part + 1) * PART):
            x, slope = z[r, k], ONE
            if BIAS:
                x = x + biases[k]
            if SOFTCAP:
                # tanh y = 1 - 2 u with u = 1 / (1 + exp 2y); its derivative without the cancellation of 1 - tanh^2.
                power = min(exp2(x * power_scale), MOST)
                u = divide(ONE, ONE + power)
                x = softcap - TWO * softcap * u
                slope = FOUR * u * (power * u)
            elif SCALE:
                x = x * scale
            d = exp2(x * LOG2E - base)
            if ENTROPY:  # p is 0 where z = -inf
                d = d * (row_a + row_h * (centre - max(x, LEAST)))
            else:
                d = d * row_a
            if ONE_TARGET:
                if target == start[b] + 8 * ((k - b * WIDTH) >> 1) + (k & 1):
                    d = d - row_g
            elif near:
                d = d - gs[k]
            if WEIGHTED:
                d = d + row_s * us[k]
            if SOFTCAP:
                d = d * slope
            if (BIAS and x == NEG_INF) or not counts:
                d = ZERO
            z[r, k] = d

    all_columns = repeat(columns, 0, K // PART)

    @function
    def dx(z, r, row, counts, starts, biases, us, gs, given):
        """scale softcap'(z) (p (a + h (lse - H - z)) - sum_k g_k [j = target_k] + s u_j), in place of the product.

        0 where the row does not count. ``starts``: the place of this thread's first column in each block; biases and
        us: of its columns; gs: room for a number of each. ``given``: a, g, h and s have been multiplied by the scale.
        """
        lse, entropy, a, g, h, s, targets, targets_a_row, scale, softcap = given
        row_lse, row_a = floats(lse)[row], floats(a)[row]
        row_h, centre, row_s, row_g, target, near = ZERO, ZERO, ZERO, ZERO, np.int32(-1), False
        if ENTROPY:
            row_h, centre = floats(h)[row], row_lse - floats(entropy)[row]
        if WEIGHTED:
            row_s = floats(s)[row]
        if ONE_TARGET:
            target, row_g = ints(targets)[row], floats(g)[row]
        else:
            near = put_targets(row, starts, gs, g, targets, targets_a_row)
        row_values = (row_lse * LOG2E, row_a, row_h, centre, row_s, row_g, target, near, counts)
        all_columns((z, r, starts, biases, us, gs, row_values, scale, softcap))

    @function
    def put_targets(row, starts, gs, g, targets, targets_a_row):
        """gs: of each of this thread's columns the sum of g_k whose target it is; False where that is 0 for all."""
        near = False
        for q in range(targets_a_row):
            target = ints(targets)[row * targets_a_row + q]
            for b in range(BLOCKS):
                offset = target - starts[b]
                if offset >= 0 and offset < 4 * WIDTH and (offset & 7) < 2:
                    if not near:
                        for k in range(K):
                            gs[k] = ZERO
                    near = True
                    gs[b * WIDTH + 2 * (offset >> 3) + (offset & 1)] += floats(g)[row * targets_a_row + q]
        return near

    return dx


def make_column_sums(tile):
    """The functions that sum dx over the rows of a tile: into shared memory, and joined from there."""
    R, K, COLUMNS, WARPS = tile.thread_rows, tile.thread_columns, tile.columns, tile.warps

    @function
    def put(z, place, thread):
        """Sums over the rows of each warp; all rows are there that do not count, with zeros."""
        lane = thread & 31
        at = place + 4 * (COLUMNS * (thread >> 5) + 2 * (lane & 3))
        for k in range(K):
            total = z[0, k]
            for r in range(1, R):
                total = total + z[r, k]
            for mask in (4, 8, 16):
                total = total + lane_xor(total, mask)
            if lane < 4:
                write_float(at + 4 * (8 * (k >> 1) + (k & 1)), total)
        barrier()

    @function
    def join(place, column):
        """The sum of a column, after ``put``."""
        total = read_float(place + 4 * column)
        for warp in range(1, WARPS):
            total = total + read_float(place + 4 * (COLUMNS * warp + column))
        return total

    return put, join


@function
def chunk_tile(number, blocks, tiles, group):
    """Row block and tile of the chunk: ``group`` row blocks side by side, row block fastest."""
    first = number // (group * tiles) * group
    size = min(blocks - first, group)
    inside = number - first * tiles
    return first + inside % size, inside // size


def make_gradient(options):
    """The kernel for dx of all rows and a window of the vocabulary."""
    tile = options.tile
    ROWS, TILE_V, R, K, THREADS = tile.rows, tile.columns, tile.thread_rows, tile.thread_columns, tile.threads
    BIAS, WEIGHTED, SUMS, GROUP = options.bias, options.weighted and options.softcap, options.sums, options.group
    PART_ROWS, STEP, PANELS = 16 * tile.parts, tile.threads // 8, tile.stages * tile.stage_bytes
    BIASES, US, GS = K if BIAS else 1, K if WEIGHTED else 1, 1 if options.one_target else K
    dx = make_dx(options, tile.columns)
    put, join = make_column_sums(tile)
    store, store_pair = make_store(tile.kind)
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def finish_row(r, state):
        """dx of a row in place of its products; 0 of one that is not there."""
        z, row0, N, starts, biases, us, gs, given = state
        counts = not SUMS or row0 + 8 * r < N
        dx(z, r, min(row0 + 8 * r, N - 1), counts, starts, biases, us, gs, given)

    all_rows = repeat(finish_row, 0, R)

    def gradient(
        e: pointer, c: pointer, bias: pointer, weight: pointer, dz: pointer, column_sums: pointer,
        lse: pointer, entropy: pointer, a: pointer, g: pointer, h: pointer, s: pointer, targets: pointer,
        N: int32, V: int32, targets_a_row: int32, pieces: int32, e_pitch: int32, c_pitch: int32,
        dz_pitch: int32, first: int32, scale: float32, softcap: float32,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        blocks, tiles = (N + ROWS - 1) // ROWS, (V + TILE_V - 1) // TILE_V
        row_of_mine = PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)
        column0 = 2 * (thread & 3)
        z = cuda.local.array((R, K), float32)
        starts = cuda.local.array(1, int32)
        biases = cuda.local.array(BIASES, float32)
        gs = cuda.local.array(GS, float32)
        us = cuda.local.array(US, float32)
        e_rows = cuda.local.array(e_copies, int32)
        c_rows = cuda.local.array(c_copies, int32)

        number, step, total = cuda.blockIdx.x, cuda.gridDim.x, blocks * tiles
        i, t = chunk_tile(min(number, total - 1), blocks, tiles, GROUP)
        for n in range(e_copies):
            e_rows[n] = min(i * ROWS + (thread >> 3) + n * STEP, N - 1) * e_pitch
        for n in range(c_copies):
            c_rows[n] = min(t * TILE_V + (thread >> 3) + n * STEP, V - 1) * c_pitch
        if number < total:
            begin(shared, e, c, e_rows, c_rows, pieces, thread)
        while number < total:
            # Tile origin: rows of block i, places of the chunk's tile t.
            row0, tile0 = i * ROWS + row_of_mine, t * TILE_V
            now_i, number = i, number + step
            # Logit tile, as in the forward.
            for r in range(R):
                for k in range(K):
                    z[r, k] = ZERO
            product(z, shared, e, c, e_rows, c_rows, pieces, thread)
            if number < total:
                i, t = chunk_tile(number, blocks, tiles, GROUP)
                for n in range(e_copies):
                    e_rows[n] = min(i * ROWS + (thread >> 3) + n * STEP, N - 1) * e_pitch
                for n in range(c_copies):
                    c_rows[n] = min(t * TILE_V + (thread >> 3) + n * STEP, V - 1) * c_pitch
                begin(shared, e, c, e_rows, c_rows, pieces, thread)
            # Epilogue. Columns beyond the chunk are stored nowhere, so they need no mask.
            starts[0] = first + tile0 + column0
            for k in range(K):
                column = min(tile0 + column0 + 8 * (k >> 1) + (k & 1), V - 1)
                if BIAS:
                    biases[k] = floats(bias)[column]
                if WEIGHTED:
                    us[k] = floats(weight)[column]
            given = (lse, entropy, a, g, h, s, targets, targets_a_row, scale, softcap)
            all_rows((z, row0, N, starts, biases, us, gs, given))
            # Store.
            for r in range(R):
                if row0 + 8 * r < N:
                    line = np.int64(row0 + 8 * r) * dz_pitch + tile0 + column0
                    if tile0 + TILE_V <= V:
                        for j in range(K // 2):
                            store_pair(dz, line + 8 * j, z[r, 2 * j], z[r, 2 * j + 1])
                    else:
                        for k in range(K):
                            offset = 8 * (k >> 1) + (k & 1)
                            if tile0 + column0 + offset < V:
                                store(dz, line + offset, z[r, k])
            if SUMS:
                put(z, shared + PANELS, thread)
                for column in range(thread, TILE_V, THREADS):
                    if tile0 + column < V:
                        floats(column_sums)[np.int64(now_i) * V + tile0 + column] = join(shared + PANELS, column)

    return gradient


def make_live(options):
    """The kernel for dx of live tiles: TILE_V / BLOCK_V of a row block at a time, into [BLOCK_N, BLOCK_V] slots."""
    tile = options.tile
    TILE_V, R, K, THREADS = tile.columns, tile.thread_rows, tile.thread_columns, tile.threads
    BLOCK_N, BLOCK_V, BLOCKS = options.block_n, options.block_v, tile.columns // options.block_v
    BIAS, SUMS, ORDERED, SORTED = options.bias, options.sums, options.ordered, options.sorted
    PART_ROWS, STEP, PANELS = 16 * tile.parts, tile.threads // 8, tile.stages * tile.stage_bytes
    WHOLE = options.block_v % STEP == 0
    BIASES, GS, WIDTH = K if BIAS else 1, 1 if options.one_target else K, options.block_v // 4
    dx = make_dx(options, options.block_v)
    put, join = make_column_sums(tile)
    _, store_pair = make_store(tile.kind)
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def entry_of(place, order, V):
        """The vocabulary entry at a place; one beyond the last is read as the last."""
        place = np.int32(min(place, V - 1))
        return np.int32(longs(order)[place]) if ORDERED else place

    @function
    def rows_of_item(
        item, e_rows, c_rows, blocks_at, item_block, item_first, item_tiles, tile_list, row_order, order,
        N, V, T, e_pitch, c_pitch, thread,
    ):  # fmt: skip
        """Where the rows of e and of c begin that an item reads, and the vocabulary blocks at its columns."""
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
        """dx of a row in place of its products, 0 where nothing is wanted."""
        z, row0, column0, N, V, starts, biases, gs, given, row_order, keep = state
        row = longs(row_order)[min(row0 + 8 * r, N - 1)]
        counts = row0 + 8 * r < N and flags(keep)[row] != 0
        dx(z, r, row, counts, starts, biases, biases, gs, given)
        for b in range(BLOCKS):
            if starts[b] - column0 + BLOCK_V > V:
                for k in range(b * WIDTH, (b + 1) * WIDTH):
                    if starts[b] + 8 * ((k - b * WIDTH) >> 1) + (k & 1) >= V:
                        z[r, k] = ZERO

    all_rows = repeat(finish_row, 0, R)

    def live(
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
        biases = cuda.local.array(BIASES, float32)
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
                    for k in range(b * WIDTH, (b + 1) * WIDTH):
                        place = starts[b] + 8 * ((k - b * WIDTH) >> 1) + (k & 1)
                        biases[k] = floats(bias)[entry_of(place, order, V)]
            given = (lse, entropy, a, g, h, a, targets, targets_a_row, scale, softcap)
            all_rows((z, row0, column0, N, V, starts, biases, gs, given, row_order, keep))
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

    return live
