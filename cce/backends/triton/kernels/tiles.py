"""The logit tile, as every kernel computes it: operands from memory, their product, bias, scale and softcap.

Conventions of all kernels (the algorithm is in docs/algorithm.md, and as plain code in ``cce/reference/tiled.py``):

- sizes ``N V D T``, blocks ``BLOCK_N BLOCK_V BLOCK_D``; one product covers ``TILE_V`` places, a multiple of BLOCK_V.
- exponentials are powers of two of a difference: ``exp(z - m) = exp2(LOG2E (z - m))``. One multiply-add, ``LOG2E z -
  LOG2E m``, would round one of the products first: where logits share a large offset, little would be left of their
  difference.
- a logit is rounded to float32 before anything is subtracted from it (:func:`rounded_product`), so that it is the same
  number for its row's maximum, for its exponential, and in the kernel of the targets.
- a row or an entry beyond the last is read as the last, so that no load needs a mask; its results are not stored.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(
    x, row0, rows, k, D, stride_row, stride_d, TMA: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load columns k to k + BLOCK_D of a matrix: a TMA box from row0, or the given rows.  # [ROWS, BLOCK_D]"""
    if TMA:
        tile = x.load([row0, k])
    else:
        d = (k + tl.arange(0, BLOCK_D)).to(rows.dtype)  # as wide as rows: columns may be far apart, too
        where = x + rows[:, None] * stride_row + d[None, :] * stride_d
        if EVEN_D:
            tile = tl.load(where)
        else:
            tile = tl.load(where, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def logit_tile(
    e, c, row0, rows, v0, entries, D,
    stride_en, stride_ed, stride_cv, stride_cd,
    E_TMA: tl.constexpr, C_TMA: tl.constexpr, EVEN_D: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute e c^T of one tile, accumulated in float32.  # [BLOCK_N, TILE_V]"""
    z = tl.zeros((BLOCK_N, TILE_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        e_tile = load_rows(e, row0, rows, k, D, stride_en, stride_ed, E_TMA, EVEN_D, BLOCK_D).to(DOT)
        c_tile = load_rows(c, v0, entries, k, D, stride_cv, stride_cd, C_TMA, EVEN_D, BLOCK_D).to(DOT)
        z = tl.dot(e_tile, c_tile.T, z, input_precision=PRECISION)
    return z


@triton.jit
def finite(x):
    """Replace an infinite maximum by 0, to be subtracted instead, since inf - inf would be NaN.

    So exp(z - m) is 0 or infinite where m is infinite, and NaN only where z is NaN.
    """
    return tl.where(tl.abs(x) == INF, 0.0, x)


@triton.jit
def rounded_product(x, y):
    """Return x y, in a form that the compiler may not fuse into a multiply-add."""
    return tl.fma(x, y, 0.0)


@triton.jit
def tanh(y):
    """Hyperbolic tangent with a relative error of a few units in the last place, also for a small y.

    Below 0.55 it is an odd polynomial (the minimax polynomial of CUDA's tanhf); above, 1 - 2 / (1 + exp 2y), which has
    the absolute error of a number near 1 and never overflows.
    """
    size = tl.abs(y)
    square = y * y
    small = tl.fma(square, tl.fma(square, 1.57394409e-2, -5.23025394e-2), 1.33152470e-1)
    small = tl.fma(square, small, -3.33327681e-1) * square
    large = 1 - 2 / (1 + tl.exp2(size * (2 * LOG2E)))
    return tl.where(size < 0.55, tl.fma(small, y, y), tl.where(y < 0, -large, large))


@triton.jit
def cap(z, entries, bias, scale, softcap, BIAS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Turn z = e c^T into softcap tanh(scale (z + bias) / softcap), -inf where the bias is.  # [BLOCK_N, TILE_V]"""
    if BIAS:
        shift = tl.load(bias + entries).to(tl.float32)[None, :]
        z += shift
    if SOFTCAP:
        z = rounded_product(tanh(z * (scale / softcap)), softcap)
        if BIAS:
            z = tl.where(shift == NEG_INF, NEG_INF, z)
    elif SCALE:
        z = rounded_product(z, scale)
    return z


@triton.jit
def wide(index, WIDE: tl.constexpr):
    """Index to multiply by a stride: 64 bits where an offset needs them, else 32, which take fewer registers."""
    if WIDE:
        index = index.to(tl.int64)
    else:
        index = index.to(tl.int32)
    return index


@triton.jit
def entries_of(place, order, V, ORDER: tl.constexpr, WIDE: tl.constexpr):
    """Vocabulary entries at some places of the vocabulary order."""
    entries = tl.minimum(place, V - 1)
    if ORDER:
        entries = tl.load(order + entries)
    return wide(entries, WIDE)


#: The interpreter has no PTX.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def store_as_held(where, values, mask):
    """Store float32 or int32 values from the threads that hold them, even if several hold the same value.

    tl.store would first redistribute the numbers over the threads, through shared memory and with barriers: per tile of
    the product, that costs more than the few bytes are worth; and it writes all copies of a number to one shared
    location, which a race detector reports.
    """
    if INTERPRETED:
        tl.store(where, values, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [where.to(tl.int64), values.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
