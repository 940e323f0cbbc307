"""The work list of a filtered backward as its kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.backends.shared.worklist import live_blocks
from cce.spec import Spec


@dataclass(frozen=True)
class Work:
    """Rows of a filtered backward, and their live tiles.

    Attributes:
        row_order: (N,) int64; block b holds rows ``row_order[b BLOCK_N : (b + 1) BLOCK_N]``.
        keep: (N,) bool, in the rows' own order: whether the row needs a gradient.
        live: (T, B) bool, contiguous.
        row_of: (N,) int32, ``row_order``, or -1 where the row needs no gradient; or None.
    """

    row_order: Tensor
    keep: Tensor
    live: Tensor
    row_of: Tensor | None = None

    @classmethod
    def of(
        cls, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor], upstream: Upstream[Tensor]
    ) -> Work:
        """Make the work list by operations of torch."""
        row_order, live = live_blocks(inputs, problem, spec, maps, upstream, used_rows(inputs))
        keep = (upstream.a != 0) | (upstream.g != 0).any(1)
        if upstream.h is not None:
            keep |= upstream.h != 0
        return cls(row_order, keep, live.contiguous())


def gather_rows(e: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.gather_rows` with torch."""
    torch.index_select(e, 0, row_order, out=out)
    if keep is not None:
        out.masked_fill_(~keep.index_select(0, row_order)[:, None], 0)


def scatter_rows(total: Tensor, norm: Tensor | None, row_order: Tensor, step: int, out: Tensor) -> None:
    """Write out[row_order_i] = total_i norm, rounded, with torch, ``step`` rows at a time."""
    if norm is not None:
        total.mul_(norm)
    for rows, index in zip(total.split(step), row_order.split(step), strict=True):
        out.index_copy_(0, index, rows.to(out.dtype))
