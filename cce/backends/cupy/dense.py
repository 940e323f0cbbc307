"""Arguments of a launch that computes dx of a window: those shared by all windows, and those of one."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from cce.backends.cupy.launch import address
from cce.backends.gpu.arrays import Dense


def tensors_of(dense: Dense) -> tuple[Tensor | None, ...]:
    """Tensors whose addresses the arguments hold for as long as the launch is repeated."""
    return dense.e, dense.formula.bias, dense.weight, *vars(dense.rows).values()


def set_window(arguments: Any, dense: Dense, c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
    """Set the fields that both kinds of kernels have."""
    arguments.V, arguments.first = c.shape[0], first
    arguments.dz, arguments.column_sums = dz.data_ptr(), address(column_sums)
    arguments.bias, arguments.weight = _from(dense.formula.bias, first), _from(dense.weight, first)


def _from(x: Tensor | None, first: int) -> int | None:
    """Address of element ``first`` of a contiguous float32 vector."""
    start = address(x)
    return None if start is None else start + first * ctypes.sizeof(ctypes.c_float)
