"""Compensation for the dead tiles: the mean rows of ``c``, and their mass (docs/algorithm.md, step 5)."""

import numpy as np
from numba import cuda, float32, int32, int64

from cce.backends.numba import device
from cce.backends.numba.device import (
    LEAST_LOG,
    LN2,
    ONE,
    ZERO,
    divide,
    flags,
    floats,
    halves,
    log2,
    longs,
    pointer,
    words,
)
from cce.backends.numba.kernels.formula import make_store

AT_ONCE = 8  # rows whose loads a thread has in flight


def make_mean_rows(options):
    """Make the kernel for the mean of the rows of ``c`` of each vocabulary block, into [T, D]."""
    BLOCK_V, ORDERED, KIND = options.block_v, options.ordered, options.kind
    WIDE = KIND in ("tf32", "ieee")  # a word is one number, not two
    widen = device.widen_bf16 if KIND == "bf16" else device.widen_fp16
    store, store_pair = make_store(KIND)

    def mean_rows_kernel(
        c: pointer, order: pointer, out: pointer, V: int32, words_a_row: int32, c_pitch: int32,
    ):  # fmt: skip
        # A thread owns a word of the mean row of block t; c_pitch and words_a_row count words.
        parts = (words_a_row + cuda.blockDim.x - 1) // cuda.blockDim.x
        t = np.int64(cuda.blockIdx.x // parts)
        word = np.int64(cuda.blockIdx.x % parts * cuda.blockDim.x + cuda.threadIdx.x)
        first, rows = t * BLOCK_V, min(BLOCK_V, V - t * BLOCK_V)
        if word < words_a_row:
            low, high = ZERO, ZERO
            for n in range(0, rows, AT_ONCE):
                for i in range(AT_ONCE):
                    entry = first + min(n + i, rows - 1)
                    if ORDERED:
                        entry = longs(order)[entry]
                    counts = n + i < rows
                    if WIDE:
                        low += floats(c)[entry * c_pitch + word] if counts else ZERO
                    else:
                        pair = words(c)[entry * c_pitch + word]
                        low += widen(np.uint16(pair & 0xFFFF)) if counts else ZERO
                        high += widen(np.uint16(pair >> 16)) if counts else ZERO
            place = t * words_a_row + word
            if WIDE:
                store(out, place, divide(low, float32(rows)))
            else:
                store_pair(out, 2 * place, divide(low, float32(rows)), divide(high, float32(rows)))

    return mean_rows_kernel


def make_dead_mass(options):
    """Make the kernel for the sums of dx over the columns of dead tiles, [blocks, N], rows in the work list's order."""
    BLOCK_N, BLOCK_V, HALF = options.block_n, options.block_v, options.half
    ENTROPY, SOFTCAP = options.entropy, options.softcap
    store, _ = make_store(options.out)

    @device.function
    def number(x, place):
        """Read an element of a map."""
        if HALF:
            return device.widen_fp16(halves(x)[place])
        return floats(x)[place]

    def dead_mass_kernel(
        tile_mass: pointer, tile_entropy: pointer, row_order: pointer, live: pointer, lse: pointer, entropy: pointer,
        a: pointer, h: pointer, out: pointer, N: int32, V: int32, blocks: int32, first: int32, count: int32,
        mass_pitch: int64, entropy_pitch: int64, softcap: float32,
    ):  # fmt: skip
        # A thread owns a row, and every ``step``-th vocabulary block.
        parts = (N + cuda.blockDim.x - 1) // cuda.blockDim.x
        place = np.int64(cuda.blockIdx.x % parts * cuda.blockDim.x + cuda.threadIdx.x)
        step = cuda.gridDim.x // parts
        if place < N:
            row = longs(row_order)[place]
            row_a, row_h, centre, row_lse = floats(a)[row], ZERO, ZERO, ZERO
            if ENTROPY:
                row_h, centre = floats(h)[row], floats(entropy)[row]
            if SOFTCAP:
                row_lse = floats(lse)[row]
            for nth in range(cuda.blockIdx.x // parts, count, step):
                t = np.int64(first) + nth
                p = max(number(tile_mass, t * mass_pitch + row), ZERO)  # negative for tiles hit
                weight = row_a
                if ENTROPY or SOFTCAP:
                    log_p = max(log2(p) * LN2, LEAST_LOG)
                    if ENTROPY:
                        weight = weight + row_h * (number(tile_entropy, t * entropy_pitch + row) - log_p - centre)
                    if SOFTCAP:  # zbar, the log of the tile's mean exp(z), stands for its logits
                        width = float32(min(BLOCK_V, V - t * BLOCK_V))
                        part = divide(log_p + row_lse - log2(width) * LN2, softcap)
                        part = max(min(part, ONE), -ONE)
                        weight = weight * (ONE - part * part)
                dead = flags(live)[t * blocks + place // BLOCK_N] == 0
                store(out, np.int64(nth) * N + place, p * weight if dead else ZERO)

    return dead_mass_kernel
