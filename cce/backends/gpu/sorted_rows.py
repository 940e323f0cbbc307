"""The rows of ``e`` in the work list's order."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cce.backends.gpu.lent import bytes_of, shaped
from cce.backends.gpu.operands import Call
from cce.backends.gpu.sizes import place_of_copy


@dataclass(frozen=True)
class SortedRows:
    """The rows of ``e`` in the work list's order, zeros where no gradient is wanted; copied as a whole or in pieces.

    Attributes:
        row_order: (N,). keep: (N,) bool, in the rows' own order: whether the row needs a gradient.
        e: (N, D) copy of all, in the layout of ``call.e``, or None.
        scratch: bytes of the scratch memory that the copy takes.
        de: (N, D) memory of dE, if the copy lies in it: to be written only after the copy was read for the last time.
    """

    call: Call
    row_order: Tensor
    keep: Tensor
    e: Tensor | None = None
    scratch: int = 0
    de: Tensor | None = None

    @classmethod
    def of(cls, call: Call, row_order: Tensor, keep: Tensor) -> SortedRows:
        """Copy all rows, if there is room for it."""
        rows, problem = cls(call, row_order, keep), call.problem
        place = place_of_copy(problem, call.spec, call.kernels.rows_in_scratch)
        if place == "nowhere":
            return rows
        if place != "de":
            e = rows.part(0, len(keep))
            return replace(rows, e=e, scratch=e.nbytes if place == "scratch" else 0)
        de = call.empty(problem.n, problem.d, dtype=problem.de_dtype)
        copy = shaped(bytes_of(de), (problem.n, call.e.shape[1]), call.e.dtype)
        return replace(rows, e=rows._gathered(row_order, copy), de=de)

    def part(self, n0: int, n1: int) -> Tensor:
        """Rows n0 to n1 of the order, (n1 - n0, D)."""
        if self.e is not None:
            return self.e[n0:n1]
        index = self.row_order[n0:n1]
        return self._gathered(index, self.call.empty(len(index), self.call.e.shape[1], dtype=self.call.e.dtype))

    def _gathered(self, index: Tensor, out: Tensor) -> Tensor:
        self.call.kernels.gather_rows(self.call.e, index, self.keep, out)
        return out

    @property
    def step(self) -> int:
        """Number of rows of a piece that is small compared with the scratch memory."""
        n, one = self.call.problem.n, self.call.e.shape[1] * self.call.e.element_size()
        return n if self.e is not None else max(1, self.call.spec.scratch_bytes // 8 // one)
