"""Operands as the kernels take them: aligned and in the products' dtype; others are copied."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula, Sizes
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.library import Ahead
from cce.backends.gpu.sizes import ALIGNMENT, Blocks, padded
from cce.backends.problem import Inputs, Problem
from cce.spec import Spec


def is_aligned(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix is in the products' dtype, and its address, row size and pitch are multiples of 16 bytes."""
    rows = x.shape[1] <= x.stride(0) and x.stride(1) == 1  # not one expanded row
    sizes = (x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1] * x.element_size())
    return x.dtype == dtype and rows and not any(size % ALIGNMENT for size in sizes)


def aligned(x: Tensor, dtype: torch.dtype, index: Tensor | None = None, buffer: Tensor | None = None) -> Tensor:
    """Return ``x``, or its rows ``index``, as it is if aligned, else a copy, in the first rows of ``buffer``."""
    if index is None and is_aligned(x, dtype):
        return x
    rows, d = len(x) if index is None else len(index), x.shape[1]
    out = x.new_empty(rows, padded(d, dtype), dtype=dtype) if buffer is None else buffer[:rows]
    if index is None:
        out[:, :d].copy_(x)
    elif x.dtype == dtype and out.shape[1] == d:
        torch.index_select(x, 0, index, out=out)
    else:
        out[:, :d].copy_(x.index_select(0, index))
    out[:, d:].zero_()
    return out


def taken(any_layout: bool, x: Tensor, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """Return ``x``, or its rows ``index``, in the products' dtype and a layout the kernels take."""
    if not any_layout:
        return aligned(x, dtype, index)
    return (x if index is None else x.index_select(0, index)).to(dtype)


def formula_of(bias: Tensor | None, problem: Problem) -> Formula:
    """Formula of the logits of the whole vocabulary; ``bias`` of any dtype, contiguous."""
    bias = None if bias is None else bias.to(torch.float32)
    ieee = torch.get_float32_matmul_precision() == "highest"
    return Formula(bias, c_float(problem.logit_scale).value, softcap_of(problem), ieee)


def softcap_of(problem: Problem) -> float | None:
    """The softcap clamped to 1e-30 ... 1e30 for float32: beyond, it changes no logit any further."""
    return None if problem.softcap is None else min(max(problem.softcap, 1e-30), 1e30)


@dataclass(frozen=True)
class Call(Blocks):
    """A problem and the kernels that run it.

    Attributes:
        e: (N, D) as the kernels take it, rows in use only. c: (V, D) as given.
        formula: formula of the logits of the whole vocabulary.
        order: (V,) vocabulary order or None.
    """

    kernels: Kernels
    sizes: Sizes
    e: Tensor
    c: Tensor
    formula: Formula
    order: Tensor | None

    @classmethod
    def of(cls, kernels: Kernels, inputs: Inputs[Tensor], problem: Problem, spec: Spec) -> Call:
        e = taken(kernels.any_layout, inputs.e, problem.dtype, inputs.rows)
        formula, sizes = formula_of(inputs.bias, problem), kernels.sizes(problem, spec)
        return cls(problem, spec, kernels, sizes, e, inputs.c, formula, inputs.vocab_order)

    @property
    def own_e(self) -> Tensor:
        """The rows of ``e``, (N, D), without padding."""
        return self.e[:, : self.problem.d]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.e.new_empty(shape, dtype=dtype)

    def weights(self, logit_weight: Tensor | None) -> Tensor:
        """Weights u of the entries, (V,) float32; 1 / V each if none are given."""
        if logit_weight is None:
            return torch.full((self.problem.v,), 1 / self.problem.v, dtype=torch.float32, device=self.e.device)
        return logit_weight.to(torch.float32)


class Windows:
    """Rows of ``c`` at consecutive places; copied, window by window, where the kernels cannot take ``c`` as it is.

    Args:
        call: call whose ``c`` and vocabulary order are used.
        ordered: whether places are positions in the vocabulary order, rather than entries.
        multiplied: whether torch multiplies the rows, too, which must have the products' dtype then.
    """

    def __init__(self, call: Call, ordered: bool, multiplied: bool = False) -> None:
        self._call, self._order = call, call.order if ordered else None
        self._formula, dtype = call.formula, call.problem.dtype
        is_ready = call.c.dtype == dtype or not multiplied if call.kernels.any_layout else is_aligned(call.c, dtype)
        self.copied = self._order is not None or not is_ready
        self.gathered = self._order is not None and is_ready
        self._buffers: list[Tensor] = []  # the current window's first
        self._is_ahead = False  # whether the other buffer holds the next window

    @property
    def row_bytes(self) -> int:
        """Bytes of the scratch memory that a place takes."""
        width, dtype = self._row
        return width * dtype.itemsize if self.copied else 0

    @property
    def _row(self) -> tuple[int, torch.dtype]:
        """Width and dtype of a copied row: as it is, where gathered for kernels that take any layout."""
        problem = self._call.problem
        if self.gathered and self._call.kernels.any_layout:
            return problem.d, self._call.c.dtype
        return padded(problem.d, problem.dtype), problem.dtype

    def at(self, v0: int, v1: int) -> tuple[Tensor, Formula]:
        """Rows v0 to v1, valid until the next call, and their formula."""
        return self.rows(v0, v1), replace(self._formula, bias=self.of(self._formula.bias, v0, v1))

    def rows(self, v0: int, v1: int) -> Tensor:
        """Rows v0 to v1, valid until the next call. The first window must be the largest."""
        call = self._call
        if not self.copied:
            return call.c[v0:v1]
        if not self._buffers:
            self._buffers.append(self._new(v1 - v0))
        elif self._is_ahead:
            self._buffers.reverse()
        out, index = self._buffers[0][: v1 - v0], None if self._order is None else self._order[v0:v1]
        if index is None:
            aligned(call.c[v0:v1], call.problem.dtype, None, out)
        elif not self.gathered:
            aligned(call.c, call.problem.dtype, index, out)
        elif not self._is_ahead:
            call.kernels.gather_rows(call.c, index, None, out)
        self._is_ahead = False
        return out

    def ahead(self, v0: int, v1: int) -> Ahead:
        """Gather of the rows of the next window, v0 to v1, during work on the current one; needs ``gathered``."""
        assert self._order is not None
        if len(self._buffers) < 2:
            self._buffers.append(self._new(len(self._buffers[0])))
        self._is_ahead = True
        return Ahead(self._call.c, self._order[v0:v1], self._buffers[1][: v1 - v0])

    def _new(self, rows: int) -> Tensor:
        width, dtype = self._row
        return self._call.empty(rows, width, dtype=dtype)

    def of(self, x: Tensor | None, v0: int, v1: int) -> Tensor | None:
        """Elements of a vector over the entries that belong to these places."""
        if x is None:
            return None
        return x[v0:v1] if self._order is None else x.index_select(0, self._order[v0:v1])
