"""Loss and gradients in one pass (docs/decisions/0003): logits kept as q = exp(z - m), scaled to the gradient in place.

m is the largest logit of the row in the tile. q lies in [0, 1], where float16 is finer than bfloat16: of 16-bit factors
it is float16 whatever their dtype.
"""

import numpy as np
from numba import cuda, float32, int32, int64, uint8

from cce.backends.numba import device
from cce.backends.numba.device import (
    LN2,
    LOG2E,
    NEG_INF,
    ONE,
    ZERO,
    barrier,
    divide,
    exp2,
    floats,
    function,
    halves,
    ints,
    log2,
    longs,
    pointer,
    read_float,
    shared_address,
    write_float,
)
from cce.backends.numba.kernels.epilogue import finite, make_cap, make_store, quad_max, quad_sum, repeat
from cce.backends.numba.kernels.gradient import chunk_tile
from cce.backends.numba.kernels.tiles import make_logit_tile


def make_store_tiles(options):
    """The kernel that stores q, and m and the sum of q of each row and tile."""
    tile = options.tile
    ROWS, TILE_V, R, K = tile.rows, tile.columns, tile.thread_rows, tile.thread_columns
    BIAS, CAPPED, GROUP = options.bias, options.bias or options.scale, options.group
    PART_ROWS, STEP = 16 * tile.parts, tile.threads // 8
    PART = min(8, K)
    cap = make_cap(options.bias, options.scale, False)
    store, store_pair = make_store("fp16" if tile.itemsize == 2 else "ieee")
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def finish_columns(part, state):
        """Logits of some columns from their products."""
        z, bias, tile0, column0, V, scale = state
        for k in range(part * PART, (part + 1) * PART):
            place = tile0 + column0 + 8 * (k >> 1) + (k & 1)
            b = ZERO
            if BIAS:
                b = floats(bias)[min(place, V - 1)]
            for r in range(R):
                if CAPPED:
                    z[r, k] = cap(z[r, k], b, scale, ONE)
                if place >= V:
                    z[r, k] = NEG_INF

    @function
    def keep_columns(part, state):
        """q in place of the logits of some columns of a row; the sum."""
        z, r, base, s = state
        for k in range(part * PART, (part + 1) * PART):
            p = exp2(z[r, k] * LOG2E - base)
            z[r, k] = p
            s[r] += p

    all_columns, keep_all = repeat(finish_columns, 0, K // PART), repeat(keep_columns, 0, K // PART)

    @function
    def keep_row(r, state):
        """m of a row, q in place of its logits, and the sum of q; all stored but q."""
        z, s, tile_max, tile_sum, where, row0, column0, N = state
        m = NEG_INF
        for k in range(K):
            m = max(m, z[r, k])
        m = quad_max(m)
        keep_all((z, r, finite(m) * LOG2E, s))
        total = quad_sum(s[r])
        if column0 == 0 and row0 + 8 * r < N:
            floats(tile_max)[where + 8 * r] = m
            floats(tile_sum)[where + 8 * r] = total

    all_rows = repeat(keep_row, 0, R)

    def store_tiles(
        e: pointer, c: pointer, bias: pointer, q: pointer, tile_max: pointer, tile_sum: pointer,  # the last [T, N]
        N: int32, V: int32, pieces: int32, e_pitch: int32, c_pitch: int32, q_pitch: int64, scale: float32,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        blocks, tiles = (N + ROWS - 1) // ROWS, (V + TILE_V - 1) // TILE_V
        row_of_mine = PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)
        column0 = 2 * (thread & 3)
        z = cuda.local.array((R, K), float32)
        s = cuda.local.array(R, float32)
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
            # Tile origin: rows of block i, entries of tile t.
            row0, tile0 = i * ROWS + row_of_mine, t * TILE_V
            now_t, number = t, number + step
            # Logit tile, as in the forward.
            for r in range(R):
                s[r] = ZERO
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
            # Epilogue: statistics of the tile; z becomes q.
            if CAPPED or tile0 + TILE_V > V:
                all_columns((z, bias, tile0, column0, V, scale))
            where = np.int64(now_t) * N + row0
            all_rows((z, s, tile_max, tile_sum, where, row0, column0, N))
            # Store.
            for r in range(R):
                if row0 + 8 * r < N:
                    line = (row0 + 8 * r) * q_pitch + tile0 + column0
                    if tile0 + TILE_V <= V:
                        for j in range(K // 2):
                            store_pair(q, line + 8 * j, z[r, 2 * j], z[r, 2 * j + 1])
                    else:
                        for k in range(K):
                            offset = 8 * (k >> 1) + (k & 1)
                            if tile0 + column0 + offset < V:
                                store(q, line + offset, z[r, k])

    return store_tiles


def make_join(options):
    """The kernel for lse of WIDTH rows a block, from their tiles: a row has PARTS threads, joined in their order."""
    WIDTH, PARTS = options.width, options.parts

    def join(
        tile_max: pointer, tile_sum: pointer, target_logits: pointer, targets: pointer, lse: pointer, N: int64,
        K: int64, T: int64,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        part = thread // WIDTH
        row = np.int64(cuda.blockIdx.x) * WIDTH + thread % WIDTH
        read = min(row, N - 1)
        m, s = NEG_INF, ZERO
        for t in range(part, T, PARTS):
            tile_m = floats(tile_max)[t * N + read]
            new_m = max(m, tile_m)
            base = finite(new_m)
            s = s * exp2((m - base) * LOG2E) + floats(tile_sum)[t * N + read] * exp2((tile_m - base) * LOG2E)
            m = new_m
        write_float(shared + 8 * thread, m)
        write_float(shared + 8 * thread + 4, s)
        barrier()
        if part == 0 and row < N:
            for p in range(1, PARTS):
                m = max(m, read_float(shared + 8 * (p * WIDTH + thread)))
            base = finite(m)
            s = ZERO
            for p in range(PARTS):
                place = shared + 8 * (p * WIDTH + thread)
                s = s + read_float(place + 4) * exp2((read_float(place) - base) * LOG2E)
            found, used = base + log2(s) * LN2, False
            for k in range(row * K, (row + 1) * K):
                if longs(targets)[k] >= 0:
                    used = True
                    # Made by another kernel: no loss is negative.
                    found = floats(target_logits)[k] if floats(target_logits)[k] > found else found
            floats(lse)[row] = found if used else ZERO

    return join


def make_scale(options):
    """The kernel that makes dz of q, in place; a thread has two columns of ROWS rows."""
    ROWS, THREADS, WIDE = options.rows, options.threads, options.kind in ("tf32", "ieee")
    store, store_pair = make_store(options.kind)
    widen_fp16 = device.widen_fp16

    @function
    def at_target(x, column, row, row_lse, row_a, target_logits, targets, g, K):
        """One element of a row that counts: a p, or at a target p from its own logit, less the g of all targets."""
        for k in range(row * K, (row + 1) * K):
            if longs(targets)[k] == column:
                x = exp2((floats(target_logits)[k] - row_lse) * LOG2E) * row_a
        for k in range(row * K, (row + 1) * K):
            if longs(targets)[k] == column and floats(target_logits)[k] != NEG_INF:
                x = x - floats(g)[k]
        return x

    def scale(
        q: pointer, tile_max: pointer, lse: pointer, target_logits: pointer, targets: pointer, a: pointer, g: pointer,
        N: int64, V: int64, K: int64, q_pitch: int64, tile: int64, a_stride: int64, groups: int64,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        group = np.int64(cuda.blockIdx.x) % groups
        column = (np.int64(cuda.blockIdx.x) // groups * THREADS + thread) * 2
        if column < V:
            two = column + 1 < V
            maxima = column // tile * N
            for row in range(group * ROWS, min(N, (group + 1) * ROWS)):
                line = row * q_pitch + column
                if WIDE:
                    x, y = floats(q)[line], ZERO
                    if two:
                        y = floats(q)[line + 1]
                else:
                    x, y = widen_fp16(halves(q)[line]), ZERO
                    if two:
                        y = widen_fp16(halves(q)[line + 1])
                row_lse, row_a = floats(lse)[row], floats(a)[row * a_stride]
                used, near = False, False
                for k in range(row * K, (row + 1) * K):
                    target = longs(targets)[k]
                    used = used or target >= 0
                    near = near or (target >= column and target < column + 2)
                factor = exp2((finite(floats(tile_max)[maxima + row]) - row_lse) * LOG2E) * row_a
                x, y = x * factor, y * factor
                if near:
                    x = at_target(x, column, row, row_lse, row_a, target_logits, targets, g, K)
                    y = at_target(y, column + 1, row, row_lse, row_a, target_logits, targets, g, K)
                if not used or row_a == ZERO:  # such a row may hold NaN
                    x, y = ZERO, ZERO
                if two:
                    store_pair(q, line, x, y)
                else:
                    store(q, line, x)

    return scale


def make_block_sum(threads):
    """The function that sums a number of every thread of a block, in their order."""

    @function
    def block_sum(shared, thread, x):
        write_float(shared + 4 * thread, x)
        barrier()
        total = ZERO
        for n in range(threads):
            total = total + read_float(shared + 4 * n)
        barrier()
        return total

    return block_sum


def make_value(options):
    """The kernel for sum_ik weights_ik (lse_i - target_logits_ik); one block."""
    THREADS = options.threads
    block_sum = make_block_sum(options.threads)

    def value(weights: pointer, lse: pointer, target_logits: pointer, out: pointer, count: int64, K: int64):
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        total = ZERO
        for i in range(thread, count, THREADS):
            total = total + floats(weights)[i] * (floats(lse)[i // K] - floats(target_logits)[i])
        total = block_sum(shared, thread, total)
        if thread == 0:
            floats(out)[0] = total

    return value


def make_prepare(options):
    """The kernel for targets as backends take them, and their weights in a mean; one block.

    ``good``, an int32, becomes 0 where a target is neither in [0, v) nor ``ignore_index``.
    """
    THREADS, MEAN = options.threads, options.mean
    block_sum = make_block_sum(options.threads)

    def prepare(
        targets: pointer, out: pointer, weights: pointer, good: pointer, count: int64, v: int64, ignore_index: int64
    ):
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        mine, bad = ZERO, ZERO
        for i in range(thread, count, THREADS):
            target = longs(targets)[i]
            inside, ignored = target >= 0 and target < v, target == ignore_index
            if not inside and not ignored:
                bad = ONE
            counts = inside and not ignored
            longs(out)[i] = target if counts else -1
            mine = mine + (ONE if counts else ZERO)
        bad = block_sum(shared, thread, bad)
        if thread == 0:
            ints(good)[0] = 1 if bad == ZERO else 0
        if MEAN:
            total = block_sum(shared, thread, mine)
            for i in range(thread, count, THREADS):
                floats(weights)[i] = divide(ONE if longs(out)[i] >= 0 else ZERO, total)

    return prepare


def make_multiply(options):
    """The kernel that multiplies numbers in place by a factor; nothing is done where that is 1."""
    THREADS, WIDE = options.threads, options.kind == "ieee"
    store, _ = make_store(options.kind)
    widen = device.widen_bf16 if options.kind == "bf16" else device.widen_fp16

    def multiply(x: pointer, factor: pointer, count: int64):
        by = floats(factor)[0]
        if by != ONE:
            first = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
            for i in range(first, count, np.int64(cuda.gridDim.x) * THREADS):
                store(x, i, (floats(x)[i] if WIDE else widen(halves(x)[i])) * by)

    return multiply
