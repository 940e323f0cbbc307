"""The targets' logits: one dot product each, by one warp."""

from functools import cache

import numpy as np
from numba import cuda, float32, int32, int64

from cce.backends.numba import device
from cce.backends.numba.device import ZERO, floats, function, halves, lane_xor, longs, pointer
from cce.backends.numba.kernels.formula import make_cap


@cache
def make_element(kind):
    """Make the function that reads an element of a matrix."""
    if kind == "ieee":

        @function
        def element(matrix, place):
            return floats(matrix)[place]

        return element
    widen = device.widen_bf16 if kind == "bf16" else device.widen_fp16

    @function
    def element(matrix, place):
        return widen(halves(matrix)[place])

    return element


def make_target_logits(options):
    """Make the kernel for z[i, targets[i, k]], 0 without a target; e and c have any strides."""
    WARPS, BIAS = options.warps, options.bias
    e_element, c_element = make_element(options.e), make_element(options.c)
    cap = make_cap(options.bias, options.scale, options.softcap)

    def target_logits_kernel(
        e: pointer, c: pointer, bias: pointer, targets: pointer, out: pointer, N: int32, K: int32,
        D: int32, stride_en: int64, stride_ed: int64, stride_cv: int64, stride_cd: int64,
        scale: float32, softcap: float32,
    ):  # fmt: skip
        lane, warp = np.int64(cuda.threadIdx.x & 31), np.int64(cuda.threadIdx.x >> 5)
        for pair in range(cuda.blockIdx.x * WARPS + warp, np.int64(N) * K, np.int64(cuda.gridDim.x) * WARPS):
            target = longs(targets)[pair]
            e_row, c_row = pair // K * stride_en, max(target, 0) * stride_cv
            total = ZERO
            if target >= 0:
                for d in range(lane, D, 32):
                    total += e_element(e, e_row + d * stride_ed) * c_element(c, c_row + d * stride_cd)
            for mask in (16, 8, 4, 2, 1):
                total = total + lane_xor(total, mask)
            b = floats(bias)[max(target, 0)] if BIAS else ZERO
            if lane == 0:
                floats(out)[pair] = cap(total, b, scale, softcap) if target >= 0 else ZERO

    return target_logits_kernel
