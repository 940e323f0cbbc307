"""The rows of ``e`` in the work list's order."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cce.backends.gpu.operands import Call
from cce.backends.gpu.sizes import rows_are_copied


@dataclass(frozen=True)
class SortedRows:
    """The rows of ``e`` in the work list's order, zeros where no gradient is wanted; copied as a whole or in pieces.

    Attributes:
        row_order: (N,). keep: (N,) bool, in the rows' own order: whether the row needs a gradient.
        e: (N, D) aligned copy of all, or None.
    """

    call: Call
    row_order: Tensor
    keep: Tensor
    e: Tensor | None

    @classmethod
    def of(cls, call: Call, row_order: Tensor, keep: Tensor) -> SortedRows:
        """Copy all rows, if there is room for it."""
        rows = cls(call, row_order, keep, None)
        return replace(rows, e=rows.part(0, len(keep))) if rows_are_copied(call.problem, call.spec) else rows

    def part(self, n0: int, n1: int) -> Tensor:
        """Rows n0 to n1 of the order, (n1 - n0, D), aligned."""
        if self.e is not None:
            return self.e[n0:n1]
        index = self.row_order[n0:n1]
        out = self.call.empty(len(index), self.call.e.shape[1], dtype=self.call.e.dtype)
        self.call.kernels.gather_rows(self.call.e, index, self.keep, out)
        return out

    @property
    def step(self) -> int:
        """Number of rows of a piece that is small compared with the scratch memory."""
        n, one = self.call.problem.n, self.call.e.shape[1] * self.call.e.element_size()
        return n if self.e is not None else max(1, self.call.spec.scratch_bytes // 8 // one)
