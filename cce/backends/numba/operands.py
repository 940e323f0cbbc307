"""Kernel arguments for an aligned matrix, in pieces of 16 bytes, and for a row's softmax."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cce.backends.gpu.arrays import Rows


def pieces_of(x: Tensor) -> int:
    """Number of 16-byte pieces in a row."""
    return x.shape[1] * x.element_size() // 16


def pitch_of(x: Tensor) -> int:
    """Pitch from row to row, in 16-byte pieces."""
    return x.stride(0) * x.element_size() // 16 if len(x) > 1 else pieces_of(x)


def with_rest(rows: Rows) -> Rows:
    """Rows with lse_low absorbed, so that ``lse`` alone gives the same dx: a and h times exp(-lse_low), H less lse_low.

    This saves a register, and an addition per element. The rounding error of M + log s is no larger than log s, which
    is at most log V, so the factor is in range; it is NaN in a row without a softmax, as lse_low is.
    """
    factor = rows.lse_low.neg().exp_()
    return replace(
        rows,
        a=rows.a * factor,
        h=None if rows.h is None else rows.h * factor,
        entropy=None if rows.entropy is None else rows.entropy - rows.lse_low,
    )
