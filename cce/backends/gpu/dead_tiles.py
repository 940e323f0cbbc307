"""The dead tiles' mass and the mean rows of ``c`` by the library, for backends without kernels for them."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.compensation import dead_mass
from cce.problem import Maps, Outputs, Problem, Upstream
from cce.spec import Spec
from cce.worklist import WorkList

#: What a number of the mass takes while it is made.
MASS_BYTES = 32


def dead_mass_of(
    problem: Problem,
    spec: Spec,
    work: WorkList,
    forward: tuple[Outputs[Tensor], Maps[Tensor], Upstream[Tensor]],
    norm: Tensor | None,
    t0: int,
    t1: int,
) -> Tensor:
    """(t1 - t0, N) in the products' dtype: sums of dx over the columns of dead tiles, rows in the work list's order."""
    m = dead_mass(problem, spec, *forward, work.row_live, t0, t1)
    if norm is not None:
        m /= norm
    return m.to(problem.dtype).index_select(1, work.row_order)


def mean_rows_of(c: Tensor, order: Tensor | None, block_v: int, t0: int, t1: int) -> Tensor:
    """(t1 - t0, D) the mean row of ``c`` of some vocabulary blocks, in its dtype."""
    v0, v1 = t0 * block_v, min(len(c), t1 * block_v)
    entries = torch.arange(v0, v1, device=c.device) if order is None else order[v0:v1]
    first = torch.arange(0, v1 - v0, block_v, device=c.device)
    # Rows are gathered and added in registers, in float32, and rounded once.
    return torch.nn.functional.embedding_bag(entries, c, first, mode="mean")
