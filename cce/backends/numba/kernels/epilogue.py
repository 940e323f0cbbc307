"""What several epilogues have in common: a logit from a product, sums over the lanes that share a row, rounding."""

from functools import cache

from cce.backends.numba import device
from cce.backends.numba.device import (
    LOG2E,
    NEG_INF,
    ONE,
    TWO,
    ZERO,
    divide,
    exp2,
    floats,
    function,
    halves,
    lane_xor,
    words,
)


@function
def finite(m):
    """A maximum to subtract: that of masked entries is -inf, and -inf + inf would be NaN."""
    return ZERO if m == NEG_INF else m


@function
def quad_max(x):
    """The largest x of the four lanes that have elements of the same row."""
    x = max(x, lane_xor(x, 1))
    return max(x, lane_xor(x, 2))


@function
def quad_sum(x):
    """The sum of x over those four lanes; all get the same bits."""
    x = x + lane_xor(x, 1)
    return x + lane_xor(x, 2)


@cache
def make_cap(bias, scale, softcap):
    """The function that makes a logit of a product and a bias; three flags say what it does."""
    BIAS, SCALE, SOFTCAP = bias, scale, softcap

    @function
    def cap(x, bias, scale, softcap):
        """softcap tanh(scale (x + bias) / softcap), or scale (x + bias)."""
        if BIAS:
            x = x + bias
        if SOFTCAP:
            # tanh y = 1 - 2 / (1 + exp 2y): no overflow, an absolute error of a unit in the last place of softcap.
            power = exp2(x * (TWO * scale / softcap * LOG2E))
            x = softcap - divide(TWO * softcap, ONE + power)
        elif SCALE:
            x = x * scale
        return x

    return cap


@cache
def make_store(kind):
    """``store(matrix, place, x)`` and ``store_pair(matrix, place, x, y)`` in the dtype of a kind of arithmetic.

    Places count elements; that of a pair is even, and its two go out as one word.
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
