"""The gradient of the logits of a chunk of the vocabulary, all rows, into scratch memory (docs/algorithm.md, step 4).

A tile is recomputed as in the forward.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    ZERO,
    barrier,
    floats,
    function,
    pointer,
    repeat,
    shared_address,
    write_float,
)
from cce.backends.numba.kernels.dx import make_add_biases, make_column_sums, make_dx
from cce.backends.numba.kernels.formula import make_store
from cce.backends.numba.kernels.tiles import make_logit_tile


@function
def chunk_tile(number, blocks, tiles, group):
    """Row block and tile of a thread block in the chunk: ``group`` row blocks side by side, row block fastest."""
    first = number // (group * tiles) * group
    size = min(blocks - first, group)
    inside = number - first * tiles
    return first + inside % size, inside // size


def make_gradient(options):
    """Make the kernel for dx of all rows and a window of the vocabulary."""
    tile = options.tile
    ROWS, TILE_V, R, K, THREADS = tile.rows, tile.columns, tile.thread_rows, tile.thread_columns, tile.threads
    BIAS, WEIGHTED, SUMS, GROUP = options.bias, options.weighted and options.softcap, options.sums, options.group
    PART_ROWS, STEP, PANELS = 16 * tile.parts, tile.threads // 8, tile.stages * tile.stage_bytes
    BIASES, WEIGHTS, GS = options.biases, options.weights, 1 if options.one_target else K
    dx, add_biases = make_dx(options, tile.columns), make_add_biases(tile)
    put, join = make_column_sums(tile)
    store, store_pair = make_store(tile.kind)
    begin, product, e_copies, c_copies = make_logit_tile(tile)

    @function
    def finish_row(r, state):
        """Replace a row's products by dx; 0 for a row beyond the last."""
        z, row0, N, starts, weight_at, gs, given = state
        counts = not SUMS or row0 + 8 * r < N
        dx(z, r, min(row0 + 8 * r, N - 1), counts, starts, weight_at, gs, given)

    all_rows = repeat(finish_row, R)

    def gradient_kernel(
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
        gs = cuda.local.array(GS, float32)
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
            if BIAS or WEIGHTED:
                for column in range(thread, TILE_V, THREADS):
                    place = min(tile0 + column, V - 1)
                    if BIAS:
                        write_float(shared + BIASES + 4 * column, floats(bias)[place])
                    if WEIGHTED:
                        write_float(shared + WEIGHTS + 4 * column, floats(weight)[place])
                barrier()
            if BIAS:
                add_biases(z, shared + BIASES + 4 * column0)
            given = (lse, entropy, a, g, h, s, targets, targets_a_row, scale, softcap)
            all_rows((z, row0, N, starts, shared + WEIGHTS + 4 * column0, gs, given))
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

    return gradient_kernel
