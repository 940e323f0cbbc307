"""The forward: statistics of every row over a stretch of the vocabulary; the logits stay in registers.

Steps 1 and 2 of docs/algorithm.md. A thread block owns ROWS rows and one of SPLITS stretches of the vocabulary, and
walks along it. Each thread keeps a maximum and sums of its own columns; those of a row are joined only at the end,
always in the same order. With MAPS the statistics of every BLOCK_V entries are stored too, for the filter.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    LN2,
    LOG2E,
    NEG_INF,
    ZERO,
    divide,
    exp2,
    floats,
    function,
    ints,
    lane_xor,
    lane_xor_int,
    log2,
    maximum,
    pointer,
    repeat,
    shared_address,
)
from cce.backends.numba.kernels.formula import finite, make_cap, quad_max, quad_sum
from cce.backends.numba.kernels.tiles import make_logit_tile


@function
def unit_of(pid, blocks, splits, group):
    """Row block and split of a thread block: ``group`` row blocks run side by side, and share reads."""
    first = pid // (group * splits) * group
    size = min(blocks - first, group)
    inside = pid - first * splits
    return first + inside % size, inside // size


@function
def add_block(z, r, k0, width, shift, entropy):
    """Sums of exp(z - shift) and of exp(z - shift) (shift - z) over some columns of a row."""
    s, gap = ZERO, ZERO
    for k in range(k0, k0 + width):
        p = exp2((z[r, k] - shift) * LOG2E)  # subtract first: both may be large
        s += p
        if entropy and p > ZERO:
            gap += p * (shift - z[r, k])
    return s, gap


def make_statistics(options):
    """Make the kernel for these options."""
    tile = options.tile
    ROWS, TILE_V, R, K = tile.rows, tile.columns, tile.thread_rows, tile.thread_columns
    BIAS, ONLINE, ENTROPY, WEIGHTED = options.bias, options.online, options.entropy, options.weighted
    PREDICTION, MAPS, TILE_ENTROPY = options.prediction, options.maps, options.tile_entropy
    CAPPED, GROUP = options.bias or options.scale or options.softcap, options.group
    BLOCK_V = options.block_v if options.maps else tile.columns
    BLOCKS, WIDTH = tile.columns // BLOCK_V, BLOCK_V // 4  # vocabulary blocks of a tile; a thread's columns of one
    GAPS = options.entropy or options.tile_entropy
    PART_ROWS, STEP = 16 * tile.parts, tile.threads // 8
    cap = make_cap(options.bias, options.scale, options.softcap)
    PART = min(4, K)  # columns unrolled in a loop of their own
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def cap_columns(part, state):
        """Replace the products of some columns by their logits."""
        z, bias, place, V, scale, softcap = state
        for k in range(part * PART, (part + 1) * PART):
            b = ZERO
            if BIAS:
                b = floats(bias)[min(place + 8 * (k >> 1) + (k & 1), V - 1)]
            for r in range(R):
                z[r, k] = cap(z[r, k], b, scale, softcap)

    cap_all = repeat(cap_columns, K // PART)

    def statistics_kernel(
        e: pointer, c: pointer, bias: pointer, weight: pointer,
        split_max: pointer, split_sum: pointer, split_gap: pointer, split_weighted: pointer,
        split_best: pointer,  # [SPLITS, N] each
        tile_max: pointer, tile_log_sum: pointer, tile_entropy: pointer,  # [T, N] each
        N: int32, V: int32, pieces: int32, e_pitch: int32, c_pitch: int32, splits: int32,
        first_tile: int32, scale: float32, softcap: float32,
    ):  # fmt: skip
        # Tile origin: rows of block i, and for each t of the split TILE_V places of the window from t TILE_V.
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        i, split = unit_of(np.int32(cuda.blockIdx.x), (N + ROWS - 1) // ROWS, splits, GROUP)
        tiles = (V + TILE_V - 1) // TILE_V
        first, last = split * tiles // splits, (split + 1) * tiles // splits
        row0 = i * ROWS + PART_ROWS * (thread >> 5) + ((thread & 31) >> 2)  # this thread's first row
        column0 = 2 * (thread & 3)  # and its first column of every tile

        z = cuda.local.array((R, K), float32)
        m = cuda.local.array(R, float32)
        s = cuda.local.array(R, float32)
        gap = cuda.local.array(R, float32)
        weighted = cuda.local.array(R, float32)
        top = cuda.local.array(R, float32)  # the logit at place ``best``; with MAPS, m is that of all four lanes
        best = cuda.local.array(R, int32)
        for r in range(R):
            m[r], s[r], gap[r], weighted[r], top[r], best[r] = NEG_INF, ZERO, ZERO, ZERO, NEG_INF, 0
            row = row0 + 8 * r
            kept = np.int64(split) * N + row
            if first_tile > 0 and row < N:  # continue from the split's contents: its sums, in one of the four lanes
                m[r] = floats(split_max)[kept]
                if column0 == 0:
                    s[r] = floats(split_sum)[kept]
                    if ENTROPY:
                        gap[r] = floats(split_gap)[kept]
                    if WEIGHTED:
                        weighted[r] = floats(split_weighted)[kept]
                    if PREDICTION:
                        top[r], best[r] = m[r], ints(split_best)[kept]

        # Starts of the rows of which this thread copies pieces; a row beyond the last is read as the last.
        e_rows = cuda.local.array(e_copies, int32)
        c_rows = cuda.local.array(c_copies, int32)
        for n in range(e_copies):
            e_rows[n] = min(i * ROWS + (thread >> 3) + n * STEP, N - 1) * e_pitch
        for n in range(c_copies):
            c_rows[n] = min(first * TILE_V + (thread >> 3) + n * STEP, V - 1) * c_pitch
        if first < last:
            begin(shared, e, c, e_rows, c_rows, pieces, thread)

        for t in range(first, last):
            # Logit tile: z = softcap tanh(scale (e c^T + bias) / softcap).
            for r in range(R):
                for k in range(K):
                    z[r, k] = ZERO
            product(z, shared, e, c, e_rows, c_rows, pieces, thread)
            if t + 1 < last:  # the first panels of the next tile arrive during this one's epilogue
                for n in range(c_copies):
                    c_rows[n] = min((t + 1) * TILE_V + (thread >> 3) + n * STEP, V - 1) * c_pitch
                begin(shared, e, c, e_rows, c_rows, pieces, thread)
            if CAPPED:
                cap_all((z, bias, t * TILE_V + column0, V, scale, softcap))
            if (t + 1) * TILE_V > V:
                # The ragged last tile: its columns beyond V are masked after the softcap, which would undo it.
                for k in range(K):
                    if t * TILE_V + column0 + 8 * (k >> 1) + (k & 1) >= V:
                        for r in range(R):
                            z[r, k] = NEG_INF

            # Epilogue: the statistics of each block of BLOCK_V entries, added to the row's.
            for r in range(R):
                row = row0 + 8 * r
                for b in range(BLOCKS):
                    k0 = b * WIDTH
                    block_m, nth = NEG_INF, 0
                    for k in range(k0, k0 + WIDTH):
                        if PREDICTION and z[r, k] > block_m:
                            nth = 8 * (k >> 1) + (k & 1)
                        block_m = maximum(block_m, z[r, k])
                    if PREDICTION and block_m > top[r]:
                        top[r], best[r] = block_m, (first_tile + t) * TILE_V + column0 + nth
                    if MAPS:
                        block_m = quad_max(block_m)
                    new_m = maximum(m[r], block_m)
                    # For a masked block use the row's own maximum: exp(0 - m) may be inf, and times the sum, 0, would
                    # be NaN.
                    shift = finite(new_m) if ONLINE or block_m == NEG_INF else block_m
                    block_s, block_gap = add_block(z, r, k0, WIDTH, shift, GAPS)
                    if MAPS:
                        where = (np.int64(first_tile + t) * BLOCKS + b) * N + row
                        mine = column0 == 0 and row < N
                        total = quad_sum(block_s)
                        if mine:
                            log_sum = log2(total) * LN2 + (shift - block_m)
                            floats(tile_max)[where] = block_m
                            floats(tile_log_sum)[where] = ZERO if block_m == NEG_INF else log_sum
                        if TILE_ENTROPY:
                            total_gap = quad_sum(block_gap)
                            if mine:
                                h = log2(total) * LN2 + divide(total_gap, total) if total > ZERO else ZERO
                                floats(tile_entropy)[where] = h

                    safe = finite(new_m)
                    old = exp2((m[r] - safe) * LOG2E)  # 0 for the first tile, where m = -inf
                    new = exp2((shift - safe) * LOG2E)
                    if ENTROPY:
                        moved = (gap[r] + s[r] * (safe - m[r])) * old if s[r] > ZERO else ZERO
                        gap[r] = moved + (block_gap + block_s * (safe - shift)) * new
                    s[r] = s[r] * old + block_s * new
                    m[r] = new_m
            if WEIGHTED:
                for k in range(K):
                    place = t * TILE_V + column0 + 8 * (k >> 1) + (k & 1)
                    u = floats(weight)[min(place, V - 1)]
                    if place < V:  # 0 times a masked entry is NaN, as in PyTorch
                        for r in range(R):
                            weighted[r] += z[r, k] * u

        # Store: one number per row and split, joined over the four lanes that have columns of the row.
        for r in range(R):
            row = row0 + 8 * r
            kept = np.int64(split) * N + row
            mine = column0 == 0 and row < N
            row_m = quad_max(m[r])
            safe = finite(row_m)
            old = exp2((m[r] - safe) * LOG2E)
            if ENTROPY:
                moved = quad_sum((gap[r] + s[r] * (safe - m[r])) * old if s[r] > ZERO else ZERO)
                if mine:
                    floats(split_gap)[kept] = moved
            row_s = quad_sum(s[r] * old)
            if WEIGHTED:
                total = quad_sum(weighted[r])
                if mine:
                    floats(split_weighted)[kept] = total
            if PREDICTION:
                place, largest = best[r], top[r]
                for mask in (1, 2):
                    other, theirs = lane_xor_int(place, mask), lane_xor(largest, mask)
                    if theirs > largest or (theirs == largest and other < place):
                        place, largest = other, theirs
                if mine:
                    ints(split_best)[kept] = place
            if mine:
                floats(split_max)[kept], floats(split_sum)[kept] = row_m, row_s

    return statistics_kernel
