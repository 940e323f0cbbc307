"""Shared parts of the epilogues: a logit from a product, sums over the lanes that share a row, rounding."""

from functools import cache

import numpy as np

from cce.backends.numba import device
from cce.backends.numba.device import (
    LOG2E,
    NEG_INF,
    ONE,
    TWO,
    ZERO,
    exp2,
    floats,
    function,
    halves,
    lane_xor,
    maximum,
    reciprocal,
    words,
)

FOUR = np.float32(4)
#: tanh y = y (1 + y^2 (T0 + y^2 (T1 + y^2 (T2 + y^2 T3)))), where y^2 < SMALL, to a unit in the last place.
T0, T1, T2, T3 = np.float32(-0.33332947), np.float32(0.13320725), np.float32(-0.05267181), np.float32(0.01643758)
SMALL = np.float32(0.55**2)


@function
def finite(m):
    """Replace -inf, the maximum of masked entries, so that it can be subtracted: -inf + inf would be NaN."""
    return ZERO if m == NEG_INF else m


@function
def quad_max(x):
    """The largest x of the four lanes that have elements of the same row; NaN if one is NaN."""
    x = maximum(x, lane_xor(x, 1))
    return maximum(x, lane_xor(x, 2))


@function
def quad_sum(x):
    """Sum of x over the four lanes that have elements of the same row; all get the same bits."""
    x = x + lane_xor(x, 1)
    return x + lane_xor(x, 2)


@function
def tanh(y):
    """tanh y and its derivative, each to a few units in the last place, so that a small logit loses no accuracy."""
    power = exp2(abs(y) * (-TWO * LOG2E))
    u = reciprocal(ONE + power)
    far = (ONE - power) * u  # tanh |y|
    square = y * y
    near = y + y * (square * (T0 + square * (T1 + square * (T2 + square * T3))))
    if square < SMALL:
        far = near
    elif y < ZERO:
        far = -far
    return far, FOUR * power * (u * u)  # without the cancellation of 1 - tanh^2


@cache
def make_cap(bias, scale, softcap):
    """Make the function that turns a product and a bias into a logit; three flags select its steps."""
    BIAS, SCALE, SOFTCAP = bias, scale, softcap

    @function
    def cap(x, bias, scale, softcap):
        """Return softcap tanh(scale (x + bias) / softcap), or scale (x + bias); -inf where the bias is."""
        if BIAS:
            x = x + bias
        if SOFTCAP:
            x = softcap * tanh(x * (scale / softcap))[0]
            if BIAS and bias == NEG_INF:
                x = NEG_INF
        elif SCALE:
            x = x * scale
        return x

    return cap


@cache
def make_store(kind):
    """Make ``store(matrix, place, x)`` and ``store_pair(matrix, place, x, y)`` for the dtype of a kind of arithmetic.

    Places count elements; a pair has an even place, and is stored as one word.
    """
    if kind in ("tf32", "ieee"):

        @function
        def store(matrix, place, x):
            floats(matrix)[place] = x

        @function
        def store_pair(matrix, place, x, y):
            floats(matrix)[place] = x
            floats(matrix)[place + 1] = y

        return store, store_pair
    pack = device.pack_bf16 if kind == "bf16" else device.pack_fp16

    @function
    def store(matrix, place, x):
        halves(matrix)[place] = pack(x, ZERO) & 0xFFFF

    @function
    def store_pair(matrix, place, x, y):
        words(matrix)[place >> 1] = pack(x, y)

    return store, store_pair
