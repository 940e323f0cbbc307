"""The rows of ``e`` as the filtered backward's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cce.backends.gpu.lent import bytes_of, shaped
from cce.backends.triton import plan as plans
from cce.backends.triton.call import Call
from cce.backends.triton.operands import gather


@dataclass(frozen=True)
class Rows:
    """The rows of ``e``, for the products.

    Attributes:
        e: a copy in the work list's order, with zeros for rows that need no gradient; or ``e`` as it is.
        copied: whether ``e`` is such a copy.
        scratch: bytes of the scratch memory that the copy takes.
        de: (N, D) dE's memory, if the copy lies in it; written only once the copy is no longer read.
    """

    e: Tensor
    copied: bool
    scratch: int = 0
    de: Tensor | None = None

    @classmethod
    def of(cls, call: Call, live: plans.Live) -> Rows:
        """Copy the rows if this takes no more than a third of the scratch memory, or fits into dE's memory."""
        problem = call.problem
        n, d = problem.n, problem.d
        size = n * d * call.e.element_size()
        if 3 * size <= call.spec.scratch_bytes:
            return cls(sorted_rows(call, live, 0, n), True, size)
        if problem.grad_e and problem.de_dtype.itemsize >= call.e.element_size():
            de = call.empty(n, d, dtype=problem.de_dtype)
            return cls(sorted_rows(call, live, 0, n, shaped(bytes_of(de), (n, d), call.e.dtype)), True, de=de)
        return cls(call.e, False)


def sorted_rows(call: Call, live: plans.Live, n0: int, n1: int, out: Tensor | None = None) -> Tensor:
    """Rows n0 to n1 of the work list's order, (n1 - n0, D), with zeros for rows that need no gradient."""
    if out is None:
        out = call.empty(n1 - n0, call.problem.d, dtype=call.e.dtype)
    return gather(call.e, live.row_order[n0:n1], out, live.keep)
