"""Compensation for the dead tiles (docs/algorithm.md, step 5): one torch product for dE, and one for dC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu.products import product, wide_product
from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Maps
from cce.backends.triton import plan as plans
from cce.backends.triton.call import Call
from cce.backends.triton.gradients import Formula
from cce.backends.triton.kernels.compensation import dead_mass_kernel, mean_rows_kernel
from cce.backends.triton.sorted_rows import Rows, sorted_rows


@dataclass(frozen=True)
class Dead:
    """Contribution of the dead tiles.

    Attributes:
        de: (N, D) float32, m^T cbar, rows in the work list's order; None where dE is not wanted.
        mass_e: (T, D) float32, m e; mass: (T,) row sums of m.
    """

    de: Tensor | None
    mass_e: Tensor | None
    mass: Tensor | None

    def of_blocks(self, t0: int, t1: int) -> Dead:
        """Contribution of vocabulary blocks t0 to t1."""
        mass_e = None if self.mass_e is None else self.mass_e[t0:t1]
        return Dead(self.de, mass_e, None if self.mass is None else self.mass[t0:t1])


def compensation(call: Call, formula: Formula, live: plans.Live, rows: Rows, maps: Maps[Tensor]) -> Dead:
    """Compute the products with the dead tiles' mass, in pieces of the map that fit into the scratch memory."""
    problem, t = call.problem, call.tiles
    n, d = problem.n, problem.d
    piece = max(1, min(t, call.spec.scratch_bytes // 4 // (n * problem.dtype.itemsize)))
    m = call.empty(piece, n, dtype=problem.dtype)
    means = mean_rows(call) if problem.grad_e else None
    de = None
    mass_e = call.empty(t, d) if problem.grad_c else None
    mass = call.empty(t) if problem.grad_bias else None
    for t0 in range(0, t, piece):
        t1 = min(t, t0 + piece)
        part = _dead_mass(call, formula, live, maps, m, t0, t1)  # (t1 - t0, N)
        if means is not None:
            de = product(part.T, means[t0:t1], torch.float32, de)
        if mass_e is not None:
            _times_e(call, live, rows, part, mass_e[t0:t1])
        if mass is not None:
            torch.sum(part, 1, dtype=torch.float32, out=mass[t0:t1])
    return Dead(de, mass_e, mass)


def mean_rows(call: Call) -> Tensor:
    """Mean row of ``c`` of each vocabulary block, (T, D), in the products' dtype."""
    problem = call.problem
    means = call.empty(call.tiles, problem.d, dtype=problem.dtype)
    mean_rows_kernel[(call.tiles, cdiv(problem.d, 256))](
        call.c, call.order, means, problem.v, problem.d, call.c.stride(0), call.c.stride(1),
        ORDER=call.order is not None, ROWS=call.block_v, STEP=min(32, call.block_v), BLOCK_D=256,
    )  # fmt: skip
    return means


def _dead_mass(
    call: Call, formula: Formula, live: plans.Live, maps: Maps[Tensor], m: Tensor, t0: int, t1: int
) -> Tensor:
    """Sum of dx over the columns of each dead tile, (t1 - t0, N), rows in the work list's order."""
    assert maps.tile_mass is not None
    n, outputs = call.problem.n, formula.outputs
    dead_mass_kernel[(t1 - t0, cdiv(n, 1024))](
        maps.tile_mass, maps.tile_entropy, live.live, live.row_order, live.keep, outputs.lse, outputs.entropy,
        formula.upstream.a, formula.upstream.h, m, n, call.problem.v, live.live.shape[1], maps.tile_mass.stride(0),
        call.softcap, t0, ENTROPY=formula.upstream.h is not None, SOFTCAP=call.problem.softcap is not None,
        BLOCK_N=call.block_n, BLOCK_V=call.block_v, BLOCK=1024,
    )  # fmt: skip
    return m[: t1 - t0]


def _times_e(call: Call, live: plans.Live, rows: Rows, m: Tensor, out: Tensor) -> None:
    """Write out = m e, (tiles, D); without a copy of the sorted rows, in pieces of them."""
    n, d = call.problem.n, call.problem.d
    if rows.copied:
        wide_product(m, rows.e, out)
        return
    step = max(1, call.spec.scratch_bytes // 8 // (d * call.e.element_size()))
    for n0 in range(0, n, step):
        n1 = min(n, n0 + step)
        part = sorted_rows(call, live, n0, n1)
        if n0 == 0:
            wide_product(m[:, :n1], part, out)
        else:
            product(m[:, n0:n1], part, torch.float32, out)
