"""How kernels are told of an aligned matrix, in pieces of 16 bytes, and of a row's softmax."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cce.backends.gpu.arrays import Rows


def pieces_of(x: Tensor) -> int:
    """Of a row."""
    return x.shape[1] * x.element_size() // 16


def pitch_of(x: Tensor) -> int:
    """From row to row."""
    return x.stride(0) * x.element_size() // 16 if len(x) > 1 else pieces_of(x)


def with_rest(rows: Rows) -> Rows:
    """What kernels that know ``lse`` alone make the same dx from: a and h times exp(-lse_low), H less lse_low.

    A register and a sum an element are saved. The rest of a rounded M + log s is no larger than log s, which is at most
    log V: the factor is in range; NaN in a row without a softmax, as lse_low is.
    """
    factor = rows.lse_low.neg().exp_()
    return replace(
        rows,
        a=rows.a * factor,
        h=None if rows.h is None else rows.h * factor,
        entropy=None if rows.entropy is None else rows.entropy - rows.lse_low,
    )
