"""Block-sparse products of the live tiles: dE += dx c, dC = dx^T e and dbias (docs/algorithm.md, step 4).

Sums run in the order of the work list, so the bits are the same every run: one thread block, whichever draws it,
computes a tile of a result. A step of a sum is ``depth`` places or rows, a panel's width; a narrower tile is padded
with zeros.
"""

import numpy as np
from numba import cuda, float32, int32, uint8

from cce.backends.numba.device import (
    ZERO,
    barrier,
    divide,
    draw,
    floats,
    function,
    ints,
    longs,
    pointer,
    read_int,
    shared_address,
    write_int,
)
from cce.backends.numba.kernels.dc import make_dc
from cce.backends.numba.kernels.de import make_de


@function
def unwanted(*arguments):
    """Stand in for the function of a gradient that is not wanted."""
    return


UNWANTED = unwanted, ((1, 1), 1, 1)


def make_products(options):
    """Make the kernel for dE and dC of a chunk: thread blocks draw tiles of either, the long ones of dE first."""
    DE, DC, DRAWN = options.de is not None, options.dc is not None, options.panels
    de, (DE_Z, DE_DX, DE_C) = make_de(options.de) if DE else UNWANTED
    dc, (DC_Z, DC_DX, DC_E) = make_dc(options.dc) if DC else UNWANTED
    DE_COLUMNS, DC_COLUMNS = (x.tile.columns if x is not None else 1 for x in (options.de, options.dc))
    PARTS = options.dc.block_v // options.dc.tile.rows if DC else 0

    def products_kernel(
        drawn: pointer, dz: pointer, e: pointer, c: pointer, order: pointer, row_order: pointer, keep: pointer,
        tile_list: pointer, block_slot: pointer, block_tiles: pointer, block_first: pointer, live_count: pointer,
        block_list: pointer, slot_list: pointer, chunk_start: pointer, mass_e: pointer, norm: pointer,
        total: pointer, out: pointer,
        N: int32, V: int32, D: int32, T: int32, dc_pitch: int32, blocks: int32, pieces: int32, e_pitch: int32,
        c_pitch: int32, chunk: int32,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        shared = shared_address(cuda.shared.array(0, uint8))
        t0, t1 = ints(chunk_start)[chunk], ints(chunk_start)[chunk + 1]
        de_z, dc_z = cuda.local.array(DE_Z, float32), cuda.local.array(DC_Z, float32)
        de_dx, dc_dx = cuda.local.array(DE_DX, int32), cuda.local.array(DC_DX, int32)
        c_rows, e_rows = cuda.local.array(DE_C, int32), cuda.local.array(DC_E, int32)
        item, first, end = np.int32(0), np.int32(0), np.int32(0)
        if t0 < t1:
            if DE:
                first = np.int32(blocks * ((D + DE_COLUMNS - 1) // DE_COLUMNS))
            end = np.int32(first + (t1 - t0) * PARTS * ((dc_pitch + DC_COLUMNS - 1) // DC_COLUMNS))
        while item < end:
            if thread == 0:
                write_int(shared + DRAWN, draw(drawn, np.int64(chunk)))
            barrier()
            item = read_int(shared + DRAWN)
            barrier()  # all have read it, and are done with the previous tile's panels
            if item < first:
                de(de_z, de_dx, c_rows, item, shared, dz, c, order, tile_list, block_slot, block_tiles, block_first,
                   total, N, V, D, T, blocks, pieces, c_pitch, chunk, thread)  # fmt: skip
            elif item < end:
                dc(dc_z, dc_dx, e_rows, item - first, shared, dz, e, order, row_order, keep, live_count, block_list,
                   slot_list, t0, mass_e, norm, out, N, V, D, dc_pitch, blocks, pieces, e_pitch, thread)  # fmt: skip

    return products_kernel


def make_dbias(options):
    """Make the kernel for dbias [V] of a chunk: live tiles' column sums, in the order of row blocks, and dead mass."""
    BLOCK_V, ORDERED, COMPENSATE, NORM = options.block_v, options.ordered, options.compensate, options.norm

    def dbias_kernel(
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

    return dbias_kernel
