"""The product of two panels in shared memory, added to a tile in registers, with the instructions of sm_80.

A factor is stored as the product reads it, ``[rows, depth]``, or *transposed*: each stored row holds ``depth`` numbers
of one step of the sum, in as many panels as the factor's rows take.
"""

import numpy as np
from numba import cuda, float32, uint32

from cce.backends.numba import device
from cce.backends.numba.device import SIMULATED, function, read_float
from cce.backends.numba.tile import PANEL, PIECE


def make_multiply(tile, a_transposed, b_transposed):
    """Make ``multiply(z, a, b, thread)``: z += a b^T for panels at the addresses a and b."""
    if SIMULATED:
        return twin(tile, a_transposed, b_transposed)
    if tile.kind == "ieee":
        return make_scalar(tile, a_transposed, b_transposed)
    if tile.kind == "tf32":
        return make_tf32(tile, a_transposed, b_transposed)
    return make_16(tile, a_transposed, b_transposed)


def make_16(tile, a_transposed, b_transposed):
    """Product of bfloat16 or float16: fragments are loaded as four 8 x 8 matrices, transposed on the way if need be."""
    from cce.backends.numba import matrix

    PARTS, PAIRS, ROWS = tile.parts, tile.columns // 16, 16 * tile.parts
    A_T, B_T, HEIGHT = a_transposed, b_transposed, PANEL * tile.depth
    load_a = matrix.load_matrices_transposed if A_T else matrix.load_matrices
    load_b = matrix.load_matrices_transposed if B_T else matrix.load_matrices
    multiply_pieces = matrix.multiply_pieces[tile.kind]

    @function
    def multiply(z, a_panel, b_panel, thread):
        lane, warp = thread & 31, thread >> 5
        a = cuda.local.array((PARTS, 4), uint32)
        b = cuda.local.array((PAIRS, 4), uint32)
        low, second, fourth = lane & 7, (lane >> 3) & 1, lane >> 4
        for s in range(4):  # 16 steps of the sum at a time, 32 bytes
            for i in range(PARTS):
                if A_T:  # matrices: both halves of the rows, then the next 8 steps
                    row = ROWS * warp + 16 * i + 8 * second
                    at, line, piece = a_panel + (row >> 6) * HEIGHT, 16 * s + 8 * fourth + low, (row & 63) >> 3
                else:
                    at, line, piece = a_panel, ROWS * warp + 16 * i + 8 * second + low, 2 * s + fourth
                load_a(a, i, at + PANEL * line + PIECE * (piece ^ low))
            for j in range(PAIRS):  # 16 columns at a time
                if B_T:  # matrices: both halves of the steps, then the next 8 columns
                    at, line, piece = b_panel + (j >> 2) * HEIGHT, 16 * s + 8 * second + low, 2 * (j & 3) + fourth
                else:
                    at, line, piece = b_panel, 16 * j + 8 * fourth + low, 2 * s + second
                load_b(b, j, at + PANEL * line + PIECE * (piece ^ low))
                for i in range(PARTS):
                    multiply_pieces(z, i, 2 * j, a, b, j, 0)
                    multiply_pieces(z, i, 2 * j + 1, a, b, j, 1)

    return multiply


def make_address(tile, transposed):
    """Make the function for the address of a factor's 4-byte element, from its row and the step of the sum."""
    HEIGHT = PANEL * tile.depth

    @function
    def as_read(panel, row, step):
        return panel + PANEL * row + PIECE * ((step >> 2) ^ (row & 7)) + 4 * (step & 3)

    @function
    def across(panel, row, step):
        return panel + (row >> 5) * HEIGHT + PANEL * step + PIECE * (((row & 31) >> 2) ^ (step & 7)) + 4 * (row & 3)

    return across if transposed else as_read


def make_tf32(tile, a_transposed, b_transposed):
    """Product of float32 factors rounded to tf32, 8 steps of the sum at a time."""
    from cce.backends.numba import matrix

    PARTS, PAIRS, ROWS = tile.parts, tile.columns // 16, 16 * tile.parts
    at_a, at_b = make_address(tile, a_transposed), make_address(tile, b_transposed)
    read_tf32, multiply_pieces = matrix.read_tf32, matrix.multiply_pieces["tf32"]

    @function
    def multiply(z, a_panel, b_panel, thread):
        lane, warp = thread & 31, thread >> 5
        a = cuda.local.array((PARTS, 4), uint32)
        b = cuda.local.array((PAIRS, 4), uint32)
        group, member = lane >> 2, lane & 3
        for s in range(4):
            for i in range(PARTS):
                for q in range(4):
                    row = ROWS * warp + 16 * i + 8 * (q & 1) + group
                    a[i, q] = read_tf32(at_a(a_panel, row, 8 * s + 4 * (q >> 1) + member))
            for j in range(PAIRS):
                for q in range(4):
                    b[j, q] = read_tf32(at_b(b_panel, 16 * j + 8 * (q >> 1) + group, 8 * s + 4 * (q & 1) + member))
                for i in range(PARTS):
                    multiply_pieces(z, i, 2 * j, a, b, j, 0)
                    multiply_pieces(z, i, 2 * j + 1, a, b, j, 1)

    return multiply


def make_scalar(tile, a_transposed, b_transposed):
    """Product of float32 factors without rounding, for which there is no matrix unit."""
    R, K, ROWS, DEPTH = tile.thread_rows, tile.thread_columns, 16 * tile.parts, tile.depth
    at_a, at_b = make_address(tile, a_transposed), make_address(tile, b_transposed)

    @function
    def multiply(z, a_panel, b_panel, thread):
        row, column = ROWS * (thread >> 5) + ((thread & 31) >> 2), 2 * (thread & 3)
        x = cuda.local.array(R, float32)
        end = DEPTH + (thread >> 30)  # a number unknown to the compiler, which would otherwise unroll the loop
        for step in range(end):
            for r in range(R):
                x[r] = read_float(at_a(a_panel, row + 8 * r, step))
            for k in range(K):
                y = read_float(at_b(b_panel, column + 8 * (k >> 1) + (k & 1), step))
                for r in range(R):
                    z[r, k] += x[r] * y

    return multiply


def twin(tile, a_transposed, b_transposed):
    """Product of two panels in plain Python: each thread computes its own elements."""
    R, K, ROWS, COLUMNS = tile.thread_rows, tile.thread_columns, tile.rows, tile.columns
    PARTS, DEPTH = tile.parts, tile.depth

    def factor(panel, rows, transposed):
        """Factor of a panel as [rows, depth] float32."""
        if transposed:
            panels = [device.read_panel(panel + i * PANEL * DEPTH, DEPTH) for i in range(-(-rows // DEPTH))]
            return numbers(np.concatenate(panels, 1), tile.kind).T[:rows]
        return numbers(device.read_panel(panel, rows), tile.kind)

    def multiply(z, a_panel, b_panel, thread):
        row, column = 16 * PARTS * (thread >> 5) + ((thread & 31) >> 2), 2 * (thread & 3)
        a = factor(a_panel, ROWS, a_transposed)[row + 8 * np.arange(R)]
        b = factor(b_panel, COLUMNS, b_transposed)[[column + 8 * (k // 2) + k % 2 for k in range(K)]]
        with np.errstate(all="ignore"):  # a row not in use may hold anything
            z += a @ b.T

    return multiply


def numbers(panel, kind):
    """Interpret bytes as numbers, in float32; tf32 factors keep all their bits here."""
    if kind == "bf16":
        return (panel.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return panel.view(np.float16 if kind == "fp16" else np.float32).astype(np.float32)
