"""Kernel operands: torch tensors as tensor-map descriptors where the hardware takes them, else as pointers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce.backends.gpu.arrays import Formula, Rows
from cce.backends.gpu.sizes import power_of_two
from cce.backends.triton.launch import Launch, Tile

_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def tma_ready(x: Tensor) -> bool:
    """Whether rows are contiguous, begin at multiples of 16 bytes, and share no memory.

    Rows of an expanded matrix or of overlapping windows share memory: no tensor map has a stride shorter than a row.
    """
    if x.ndim != 2 or x.numel() == 0:
        return False
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and aligned


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tensor map of ``x`` with boxes of rows x columns; elements outside read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def matrix(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Kernel argument for ``x``: a tensor map if ``tma``, else the tensor."""
    return descriptor(x, rows, columns) if tma else x


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton dtype of the products' factors."""
    return _DOT[dtype]


def needs_wide(x: Tensor) -> bool:
    """Whether an element of ``x`` may lie 2**31 elements or more from its first."""
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31


def flags_of(formula: Formula) -> dict[str, Any]:
    """Kernel flags of the formula that turns a product into a logit."""
    return {"BIAS": formula.bias is not None, "SCALE": formula.scale != 1.0, "SOFTCAP": formula.softcap is not None}


@dataclass(frozen=True)
class Operands:
    """The factors of a tile of logits.

    Attributes:
        e: (rows, D) in the products' dtype; c: (columns, D); any strides.
        c_rows: rows of a box of ``c``.
        e_tma, c_tma: whether their tiles are read as boxes of a tensor map.
    """

    e: Tensor
    c: Tensor
    tile: Tile
    c_rows: int
    e_tma: bool
    c_tma: bool

    @classmethod
    def of(cls, launch: Launch, tile: Tile, e: Tensor, c: Tensor, c_rows: int | None = None) -> Operands:
        """Factors read as boxes wherever the hardware can."""
        c_tma = launch.tma and c.dtype == e.dtype and tma_ready(c)
        return cls(e, c, tile, c_rows or tile.columns, launch.tma and tma_ready(e), c_tma)

    @property
    def matrices(self) -> dict[str, Any]:
        """Kernel arguments for ``e`` and ``c``."""
        return {"e": matrix(self.e, self.tile.rows, self.tile.depth, self.e_tma), "c": self.c_matrix(self.c)}

    def c_matrix(self, c: Tensor) -> Any:
        """Kernel argument for other rows of ``c``, with the same strides."""
        return matrix(c, self.c_rows, self.tile.depth, self.c_tma)

    def arguments(self, formula: Formula, wide: bool | None = None) -> dict[str, Any]:
        """Every other kernel argument and flag of the tile; ``wide``: whether offsets need 64 bits, if it is known."""
        e, c, d = self.e, self.c, self.e.shape[1]
        return {
            "D": d, "stride_en": e.stride(0), "stride_ed": e.stride(1), "stride_cv": c.stride(0),
            "stride_cd": c.stride(1), "scale": formula.scale, "softcap": formula.softcap or 1.0,
            "E_TMA": self.e_tma, "C_TMA": self.c_tma, "EVEN_D": d % self.tile.depth == 0, "DOT": dot_dtype(e.dtype),
            "PRECISION": precision_of(formula),
            "WIDE": needs_wide(c) or needs_wide(e) if wide is None else wide, **flags_of(formula),
        }  # fmt: skip


def targets_arguments(e: Tensor, c: Tensor, k: int, formula: Formula, copies: bool) -> dict[str, Any]:
    """Arguments and flags of ``target_logits_kernel`` for K targets a row, but for its tensors."""
    d = e.shape[1]
    return {
        "D": d, "K": k, "stride_en": e.stride(0), "stride_ed": e.stride(1), "stride_cv": c.stride(0),
        "stride_cd": c.stride(1), "scale": formula.scale, "softcap": formula.softcap or 1.0, **flags_of(formula),
        "COPY": copies, "BLOCK_D": min(1024, power_of_two(d)),
    }  # fmt: skip


def values_of(rows: Rows) -> dict[str, Any]:
    """Arguments and flags for a row's values, of every kernel that computes dx."""
    k = rows.targets.shape[1]
    return {
        "lse": rows.lse, "lse_low": rows.lse_low, "entropy": rows.entropy, "a": rows.a, "g": rows.g, "h": rows.h,
        "targets": rows.targets, "K": k, "ENTROPY": rows.h is not None, "ONE_TARGET": k == 1,
    }  # fmt: skip


def precision_of(formula: Formula) -> str:
    """Precision of float32 products, as a kernel's flag."""
    return "ieee" if formula.ieee else "tf32"
