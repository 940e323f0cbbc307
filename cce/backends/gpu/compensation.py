"""Compensation for the dead tiles (docs/algorithm.md, step 5), by operations of torch, in pieces of the map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cce.backends.gpu.arrays import DeadMass
from cce.backends.gpu.gradients import Scaled
from cce.backends.gpu.operands import Call
from cce.backends.gpu.products import product, wide_product
from cce.backends.gpu.sorted_rows import SortedRows
from cce.backends.problem import Maps, Outputs, Upstream
from cce.backends.shared.compensation import dead_weight
from cce.backends.shared.rows import rows_of


@dataclass(frozen=True)
class Dead:
    """Contribution of the dead tiles.

    Attributes:
        de: (N, D) float32, m^T cbar, rows in the work list's order; None where dE is not wanted.
        mass_e: (T, D) float32, m e; mass: (T,) row sums of m; None where dC or dbias are not wanted.
    """

    de: Tensor | None
    mass_e: Tensor | None
    mass: Tensor | None


def compensation(
    call: Call, c: Tensor, rows: SortedRows, live: Tensor, found: Scaled, outputs: Outputs[Tensor], maps: Maps[Tensor]
) -> Dead:
    """Compute the products with the dead tiles' mass.

    Args:
        c: (V, D) aligned.
        rows: in the work list's order; live: (T, B) bool.
        found: gradients of the forward's ``outputs``; ``maps`` belong to the same forward.
    """
    problem, tiles, width = call.problem, call.tiles, call.e.shape[1]
    mass = Mass(call, rows.row_order, live, found, outputs, maps)
    piece = max(1, min(tiles, call.spec.scratch_bytes // (4 * problem.n * problem.dtype.itemsize)))
    m = call.empty(piece, problem.n, dtype=problem.dtype)
    de, means = None, None
    if problem.grad_e:
        means = call.empty(tiles, width, dtype=problem.dtype)
        call.kernels.mean_rows(problem, call.spec, c, call.order, means)
    mass_e = call.empty(tiles, width) if problem.grad_c else None
    total = call.empty(tiles) if problem.grad_bias else None
    for t0 in range(0, tiles, piece):
        t1 = min(tiles, t0 + piece)
        part = mass.of(t0, t1, m[: t1 - t0])
        if means is not None:
            de = product(part.T, means[t0:t1], torch.float32, de)
        if mass_e is not None:
            _times_e(rows, part, mass_e[t0:t1])
        if total is not None:
            torch.sum(part, 1, dtype=torch.float32, out=total[t0:t1])
    return Dead(de, mass_e, total)


class Mass:
    """The sum of dx over the columns of each dead tile, rows in the work list's order; 0 where a tile is live."""

    def __init__(
        self,
        call: Call,
        row_order: Tensor,
        live: Tensor,
        found: Scaled,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
    ) -> None:
        self._call, self._row_order, self._live, self._maps = call, row_order, live.contiguous(), maps
        self._rows, self._given = found.rows, outputs
        varies = found.rows.h is not None or call.problem.softcap is not None
        # An element of the mass takes 4 bytes while computed, or several float32 where its weight depends on the tile.
        self._dtype, taken = (torch.float32, 32) if varies else (call.problem.map_dtype(call.spec), 4)
        self._step = max(1, call.spec.scratch_bytes // (4 * taken * call.problem.n))

    def of(self, t0: int, t1: int, out: Tensor) -> Tensor:
        """Fill ``out`` (t1 - t0, N)."""
        call = self._call
        mass = DeadMass(self._rows, self._maps, self._row_order, self._live, t0, out)
        if call.kernels.dead_mass(call.problem, call.spec, mass):
            return out
        for start in range(t0, t1, self._step):
            end = min(t1, start + self._step)
            self._fill(start, end, out[start - t0 : end - t0])
        return out

    @cached_property
    def _upstream(self) -> Upstream[Tensor]:
        """Upstream gradients, multiplied by the scale and within the range of float16."""
        return rows_of(Upstream(self._rows.a, self._rows.g, self._rows.h), self._row_order)

    @cached_property
    def _outputs(self) -> Outputs[Tensor]:
        given, rows = self._given, self._rows
        return rows_of(Outputs(given.lse, given.nll, rows.lse_low, rows.entropy), self._row_order)

    def _fill(self, t0: int, t1: int, out: Tensor) -> None:
        call, maps = self._call, self._maps
        assert maps.tile_mass is not None
        p = self._sorted(maps.tile_mass[t0:t1]).clamp_(min=0)  # negative for tiles hit
        entropy = None if self._upstream.h is None or maps.tile_entropy is None else maps.tile_entropy[t0:t1]
        entropy = None if entropy is None else self._sorted(entropy)
        weight = dead_weight(call.problem, call.spec, self._outputs, p, entropy, self._upstream, t0, t1)
        torch.mul(p, weight, out=out)
        n = call.problem.n
        of_rows = self._live[t0:t1, :, None].expand(-1, -1, min(n, call.block_n)).reshape(t1 - t0, -1)
        out.masked_fill_(of_rows[:, :n], 0)

    def _sorted(self, x: Tensor) -> Tensor:
        return x.index_select(1, self._row_order).to(self._dtype)


def _times_e(rows: SortedRows, m: Tensor, out: Tensor) -> None:
    """Write out = m e, (tiles, D), some rows at a time."""
    for n0 in range(0, m.shape[1], rows.step):
        n1 = min(m.shape[1], n0 + rows.step)
        if n0 == 0:
            wide_product(m[:, :n1], rows.part(0, n1), out)
        else:
            product(m[:, n0:n1], rows.part(n0, n1), torch.float32, out)
