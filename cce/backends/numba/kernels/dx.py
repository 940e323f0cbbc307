"""The gradient of a row's logits, which replaces their products, and its sums over rows (docs/algorithm.md, step 4)."""

import numpy as np

from cce.backends.numba.device import (
    LEAST_LOG,
    LOG2E,
    NEG_INF,
    ZERO,
    barrier,
    exp2,
    floats,
    function,
    ints,
    lane_xor,
    read_float,
    repeat,
    write_float,
)
from cce.backends.numba.kernels.formula import tanh


def make_dx(options, width):
    """Make the function that turns a row of logits into the gradient of e c^T; its columns form blocks of ``width``."""
    K, WIDTH, BLOCKS = options.tile.thread_columns, width // 4, options.tile.columns // width
    BIAS, SOFTCAP, SCALE, ENTROPY = options.bias, options.softcap, options.scale, options.entropy
    WEIGHTED, ONE_TARGET = options.weighted and options.softcap, options.one_target
    PART = min(8, WIDTH)  # columns unrolled in a loop of their own

    @function
    def columns(part, state):
        """Compute dx of some columns of a row."""
        z, r, start, weight_at, gs, row_values, scale, softcap = state
        row_lse, row_a, row_h, centre, row_s, row_g, target, near, counts = row_values
        b = part * PART // WIDTH
        for k in range(part * PART, (part + 1) * PART):
            x, slope = z[r, k], ZERO
            if SOFTCAP:
                share, slope = tanh(x * (scale / softcap))  # a slope of 0 where x = -inf
                x = NEG_INF if BIAS and x == NEG_INF else softcap * share
            elif SCALE:
                x = x * scale
            x = x - row_lse  # subtracted first: both may be large
            d = exp2(x * LOG2E)
            if ENTROPY:
                d = d * (row_a + row_h * (centre - max(x, LEAST_LOG)))
            else:
                d = d * row_a
            if ONE_TARGET:
                if target == start[b] + 8 * ((k - b * WIDTH) >> 1) + (k & 1):
                    d = d - row_g
            elif near:
                d = d - gs[k]
            if WEIGHTED:
                d = d + row_s * read_float(weight_at + 4 * (8 * (k >> 1) + (k & 1)))
            if SOFTCAP:
                d = d * slope
            if not counts:
                d = ZERO
            z[r, k] = d

    all_columns = repeat(columns, K // PART)

    @function
    def dx(z, r, row, counts, starts, weight_at, gs, given):
        """Replace e c^T + bias by scale softcap'(z) (p (a + h (lse - z - H)) - sum_k g_k [j = target_k] + s u_j).

        Here p = exp(z - lse), and lse_low is contained in a, h and H (``operands.with_rest``): NaN in a row without a
        softmax. dx is 0 where the row does not count. ``starts``: place of this thread's first column in each block;
        ``weight_at``: address in shared memory of the
            weight of its first column; gs: array with a number for each of its columns. ``given``: a, g, h and s have
            been multiplied by the scale.
        """
        lse, entropy, a, g, h, s, targets, targets_a_row, scale, softcap = given
        row_lse, row_a = floats(lse)[row], floats(a)[row]
        row_h, centre, row_s, row_g, target, near = ZERO, ZERO, ZERO, ZERO, np.int32(-1), False
        if ENTROPY:
            row_h, centre = floats(h)[row], -floats(entropy)[row]
        if WEIGHTED:
            row_s = floats(s)[row]
        if ONE_TARGET:
            target, row_g = ints(targets)[row], floats(g)[row]
        else:
            near = put_targets(row, starts, gs, g, targets, targets_a_row)
        row_values = (row_lse, row_a, row_h, centre, row_s, row_g, target, near, counts)
        all_columns((z, r, starts, weight_at, gs, row_values, scale, softcap))

    @function
    def put_targets(row, starts, gs, g, targets, targets_a_row):
        """Sum, for each of this thread's columns, the g_k with this target into gs; return False if all are 0."""
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


def make_add_biases(tile):
    """Make the function that adds the biases of a tile's columns, which lie in shared memory, to the products."""
    R, K = tile.thread_rows, tile.thread_columns

    @function
    def add_biases(z, bias_at):
        for k in range(K):
            bias = read_float(bias_at + 4 * (8 * (k >> 1) + (k & 1)))
            for r in range(R):
                z[r, k] = z[r, k] + bias

    return add_biases


def make_column_sums(tile):
    """Make the functions that sum dx over the rows of a tile: into shared memory, and joined from there."""
    R, K, COLUMNS, WARPS = tile.thread_rows, tile.thread_columns, tile.columns, tile.warps

    @function
    def put(z, place, thread):
        """Store the sums over the rows of each warp; rows that do not count are included as zeros."""
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
        """Return the sum of a column, after ``put``."""
        total = read_float(place + 4 * column)
        for warp in range(1, WARPS):
            total = total + read_float(place + 4 * (COLUMNS * warp + column))
        return total

    return put, join
