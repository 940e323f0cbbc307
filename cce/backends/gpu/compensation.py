"""What stands for the dead tiles (docs/algorithm.md, step 5), by the library, in pieces of the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cce.backends.gpu.operands import Call
from cce.backends.gpu.products import product
from cce.compensation import dead_mass
from cce.problem import Maps, Outputs, Upstream
from cce.worklist import WorkList

if TYPE_CHECKING:
    from cce.backends.gpu.filtered import SortedRows

_MASS_BYTES = 32  # what a number of the mass takes while it is made


@dataclass(frozen=True)
class Dead:
    """What the dead tiles add.

    Attributes:
        de: (N, D) float32, m^T cbar, rows in the work list's order; None where dE is not wanted.
        mass_e: (T, D) float32, m e; mass: (T,) row sums of m; None where dC or dbias are not wanted.
    """

    de: Tensor | None
    mass_e: Tensor | None
    mass: Tensor | None


def compensation(
    call: Call,
    c: Tensor,
    rows: SortedRows,
    work: WorkList,
    forward: tuple[Outputs[Tensor], Maps[Tensor], Upstream[Tensor]],
    norm: Tensor | None,
) -> Dead:
    """The products with the dead tiles' mass.

    Args:
        c: (V, D) aligned.
        rows, work: in the work list's order, and that.
        forward: its outputs, its maps, and the outputs' gradients, which are to be divided by ``norm``.
    """
    problem, tiles, width = call.problem, call.tiles, call.e.shape[1]
    piece = max(1, min(tiles, call.spec.scratch_bytes // (2 * _MASS_BYTES * problem.n)))
    de = None
    mass_e = call.empty(tiles, width) if problem.grad_c else None
    mass = call.empty(tiles) if problem.grad_bias else None
    for t0 in range(0, tiles, piece):
        t1 = min(tiles, t0 + piece)
        m = _mass(call, work, forward, norm, t0, t1)  # (t1 - t0, N)
        if problem.grad_e:
            de = product(m.T, mean_rows(call, c, t0, t1), torch.float32, de)
        if mass_e is not None:
            _times_e(rows, m, mass_e[t0:t1])
        if mass is not None:
            mass[t0:t1] = m.sum(1, dtype=torch.float32)
    return Dead(de, mass_e, mass)


def _mass(
    call: Call,
    work: WorkList,
    forward: tuple[Outputs[Tensor], Maps[Tensor], Upstream[Tensor]],
    norm: Tensor | None,
    t0: int,
    t1: int,
) -> Tensor:
    """(t1 - t0, N) in the products' dtype: sums of dx over the columns of dead tiles, rows in the work list's order."""
    m = dead_mass(call.problem, call.spec, *forward, work.row_live, t0, t1)
    if norm is not None:
        m /= norm
    return m.to(call.problem.dtype).index_select(1, work.row_order)


def mean_rows(call: Call, c: Tensor, t0: int, t1: int) -> Tensor:
    """(t1 - t0, D) the mean row of ``c`` of some vocabulary blocks, in its dtype."""
    v0, v1 = t0 * call.block_v, min(call.problem.v, t1 * call.block_v)
    entries = torch.arange(v0, v1, device=c.device) if call.order is None else call.order[v0:v1]
    first = torch.arange(0, v1 - v0, call.block_v, device=c.device)
    # Rows are gathered and added in registers, in float32, and rounded once.
    return torch.nn.functional.embedding_bag(entries, c, first, mode="mean")


def _times_e(rows: SortedRows, m: Tensor, out: Tensor) -> None:
    """out = m e, (tiles, D), some rows at a time."""
    out.zero_()
    for n0 in range(0, m.shape[1], rows.step):
        n1 = min(m.shape[1], n0 + rows.step)
        product(m[:, n0:n1], rows.part(n0, n1), torch.float32, out)
