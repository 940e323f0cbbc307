"""How kernels are told of an aligned matrix: in pieces of 16 bytes."""

from __future__ import annotations

from torch import Tensor


def pieces_of(x: Tensor) -> int:
    """Of a row."""
    return x.shape[1] * x.element_size() // 16


def pitch_of(x: Tensor) -> int:
    """From row to row."""
    return x.stride(0) * x.element_size() // 16 if len(x) > 1 else pieces_of(x)
