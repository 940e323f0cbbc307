"""Backward: recompute the live pieces of the logits, multiply their gradient by ``c`` and by ``e``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.scaling import norm_of, scaled
from cce.backends.torch.arithmetic import Arithmetic, Rows, along_vocabulary, gathered
from cce.backends.torch.forward import weighted_rows, weights_along
from cce.backends.torch.logits import add_at_, logits_, softcap_derivative, softmax_gradient_
from cce.backends.torch.plan import Plan
from cce.backends.torch.segments import Segment, Targets, segments
from cce.compensation import columns_of_tiles, dead_mass
from cce.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.rows import rows_of
from cce.spec import Spec
from cce.worklist import work_list


@dataclass
class Skipped:
    """What compensates the tiles the filter skips.

    Attributes:
        maps, upstream, row_live: what their mass is made from.
        step: tiles of a group.
        t0, t1: the group of tiles that ``dc`` and ``dbias`` are for.
        dc: (t1 - t0, D), what every row of a tile's dC gets besides its live part.
        dbias: (t1 - t0,), the same of the bias.
    """

    maps: Maps[Tensor]
    upstream: Upstream[Tensor]
    row_live: Tensor
    step: int
    t0: int = 0
    t1: int = 0
    dc: Tensor | None = None
    dbias: Tensor | None = None


def backward(
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """dE accumulates over the vocabulary; every row of dC is complete in one visit and written once."""
    row_live = None
    if spec.filter != "none":
        row_live = work_list(inputs, problem, spec, maps, upstream).row_live
    run = Run(inputs, problem, spec, outputs, upstream)
    if row_live is not None and spec.compensate:
        run.compensate(maps, upstream, row_live)
    if upstream.s is not None and problem.softcap is None:
        run.add_rank_one(upstream.s)
    found = segments(problem, spec, run.plan.columns, row_live)
    targets = Targets(inputs, run.upstream, found)
    for index, segment in enumerate(s.located() for s in found):
        run.segment(segment, targets.of(index, segment))
    return run.finish()


class Run:
    """The sums of one backward, and the buffers of the piece being worked on."""

    def __init__(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        upstream: Upstream[Tensor],
    ) -> None:
        self.inputs, self.problem, self.spec = inputs, problem, spec
        self.arithmetic = Arithmetic.choose(problem, spec)
        self.plan = Plan.choose(problem, spec, gathered(inputs))
        self.rows = Rows(inputs, self.arithmetic, keep=self.plan.keep_rows)
        self.outputs, self.norm = outputs, norm_of(upstream, self.arithmetic.operand)
        self.upstream = scaled(upstream, problem.logit_scale, self.norm)
        wide = inputs.e.new_empty(0, dtype=self.arithmetic.result)
        self.z = wide.new_empty(self.plan.rows * self.plan.columns)
        self.de = wide.new_zeros(problem.n, problem.d) if problem.grad_e else None
        self.dbias = wide.new_zeros(problem.v) if problem.grad_bias else None
        self.dc = inputs.c.new_empty(problem.v, problem.d) if problem.grad_c else None
        self.skipped: Skipped | None = None
        self.rank_one: Tensor | None = None  # (D,): dC_v += u_v rank_one

    def compensate(self, maps: Maps[Tensor], upstream: Upstream[Tensor], row_live: Tensor) -> None:
        """Has the skipped tiles compensated, a group at a time, as the walk along the vocabulary reaches them."""
        self.skipped = Skipped(maps, upstream, row_live, self.plan.tiles)

    def _compensate_up_to(self, t: int) -> None:
        """The group of tile ``t``: dE += m cbar; the rows (m^T e)_t / BLOCK_V are kept until its dC is written."""
        skipped = self.skipped
        if skipped is None or t < skipped.t1:
            return
        problem, spec = self.problem, self.spec
        t1 = min(spec.tiles(problem.v), t + skipped.step)
        mass = dead_mass(problem, spec, self.outputs, skipped.maps, skipped.upstream, skipped.row_live, t, t1)  # (t, N)
        if self.norm is not None:
            mass /= self.norm
        columns = columns_of_tiles(problem, spec, t, t1, mass)
        if self.de is not None:
            self.de.addmm_(mass.T, self._mean_rows(t, t1))
        skipped.t0, skipped.t1 = t, t1
        skipped.dbias = mass.sum(1) / columns
        skipped.dc = self._times_e(mass) / columns[:, None] if self.dc is not None else None

    def add_rank_one(self, s: Tensor) -> None:
        """The gradient of sum_v u_v z_v without a softcap: dE_i += s_i sum_v u_v c_v, dC_v += u_v sum_i s_i e_i."""
        s = s * self.problem.logit_scale if self.norm is None else s * self.problem.logit_scale / self.norm
        if self.de is not None:
            self.de.addr_(s, weighted_rows(self.inputs, self.problem, self.arithmetic, step=self.plan.columns))
        if self.dc is not None:
            self.rank_one = self._times_e(s[None])[0]
        if self.dbias is not None:
            self.dbias += s.sum() * weights_along(self.inputs, self.problem, 0, self.problem.v, s)

    def segment(self, segment: Segment, targets: tuple[Tensor, Tensor, Tensor]) -> None:
        """One run of tiles: its live rows block by block, then its rows of dC."""
        if segment.rows is not None:
            self._compensate_up_to(segment.t0)
        slab = self._slab(segment)
        total = self.problem.n if segment.rows is None else len(segment.rows)
        c = self.arithmetic.columns(self.inputs, segment.v0, segment.v1) if total else None
        for n0, n1 in self.plan.row_blocks(total):
            index = None if segment.rows is None else segment.rows[n0:n1]
            e = self.rows.block(n0, n1) if index is None else self.rows.gather(index)
            assert c is not None
            dz = self._dz(segment, e, c, slice(n0, n1) if index is None else index, _within(targets, n0, n1, total))
            if self.dbias is not None:
                self._add_along(self.dbias, segment, dz.sum(0))
            dz = dz.to(self.arithmetic.operand)
            if self.de is not None:
                self._add_de(dz, c, n0, n1, index)
            if slab is not None and n0 == 0:
                self.arithmetic.product(dz.T, e, slab)
            elif slab is not None:
                self.arithmetic.add_product(dz.T, e, slab)
        self._write(segment, slab, empty=total == 0)

    def finish(self) -> Gradients[Tensor]:
        if self.norm is not None:
            for total in (self.de, self.dbias):
                if total is not None:
                    total *= self.norm
        dbias = self.dbias
        if dbias is not None and self.inputs.vocab_order is not None:
            dbias = torch.empty_like(dbias).index_copy_(0, self.inputs.vocab_order, dbias)
        return Gradients(self.de, self.dc, dbias)

    def _dz(
        self, segment: Segment, e: Tensor, c: Tensor, rows: slice | Tensor, targets: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """(rows, columns) gradient of logit_scale (e c^T + bias), in the accumulation dtype."""
        shape = (len(e), segment.v1 - segment.v0)
        out = self.z[: shape[0] * shape[1]].view(shape)
        bias = self.arithmetic.bias(self.inputs, segment.v0, segment.v1)
        z = logits_(self.problem, self.arithmetic, e, c, bias, out)
        derivative = softcap_derivative(self.problem, z)
        u = weights_along(self.inputs, self.problem, segment.v0, segment.v1, z) if self.upstream.s is not None else 0.0
        dz = softmax_gradient_(self.problem, z, rows_of(self.outputs, rows), rows_of(self.upstream, rows), u)
        row, column, value = targets
        add_at_(dz.view(-1), row * shape[1] + column, value)
        return dz if derivative is None else dz.mul_(derivative)

    def _add_de(self, dz: Tensor, c: Tensor, n0: int, n1: int, index: Tensor | None) -> None:
        assert self.de is not None
        if index is None:
            self.arithmetic.add_product(dz, c, self.de[n0:n1])
        else:
            # Gather, add, scatter: rows are distinct, so this needs no atomics.
            total = self.de.index_select(0, index)
            self.de.index_copy_(0, index, self.arithmetic.add_product(dz, c, total))

    def _slab(self, segment: Segment) -> Tensor | None:
        """(columns, D) where the segment's dC is summed: in dC itself if it has the right dtype and order."""
        if self.dc is None:
            return None
        if self.dc.dtype == self.arithmetic.result and self.inputs.vocab_order is None:
            return self.dc[segment.v0 : segment.v1]
        return self.dc.new_empty(segment.v1 - segment.v0, self.problem.d, dtype=self.arithmetic.result)

    def _write(self, segment: Segment, slab: Tensor | None, empty: bool) -> None:
        """Adds what is the same for a tile's rows, undoes the scaling, and stores dC in its dtype."""
        skipped = self.skipped if segment.rows is not None else None
        if skipped is not None and skipped.dbias is not None and self.dbias is not None:
            self.dbias[segment.v0 : segment.v1] += skipped.dbias[segment.t0 - skipped.t0]
        if slab is None or self.dc is None:
            return
        if empty:
            slab.zero_()
        if skipped is not None and skipped.dc is not None:
            slab += skipped.dc[segment.t0 - skipped.t0]
        if self.rank_one is not None:
            slab.addr_(weights_along(self.inputs, self.problem, segment.v0, segment.v1, slab), self.rank_one)
        if self.norm is not None:
            slab *= self.norm
        if self.inputs.vocab_order is not None:
            self.dc.index_copy_(0, self.inputs.vocab_order[segment.v0 : segment.v1], slab.to(self.dc.dtype))
        elif slab.data_ptr() != self.dc[segment.v0 : segment.v1].data_ptr():
            self.dc[segment.v0 : segment.v1] = slab

    def _add_along(self, x: Tensor, segment: Segment, values: Tensor) -> None:
        x[segment.v0 : segment.v1] += values

    def _mean_rows(self, t0: int, t1: int) -> Tensor:
        """(t1 - t0, D) mean row of ``c`` of each tile."""
        block_v, wide = self.spec.block_v or 1, self.arithmetic.result
        means = []
        for t in range(t0, t1):
            piece = along_vocabulary(self.inputs, self.inputs.c, t * block_v, min(self.problem.v, (t + 1) * block_v))
            means.append(piece.mean(0, dtype=wide))
        return torch.stack(means)

    def _times_e(self, weights: Tensor) -> Tensor:
        """weights (t, N) times the rows of ``e``: (t, D), a block of rows at a time."""
        total = weights.new_zeros(len(weights), self.problem.d)
        for n0, n1 in self.plan.row_blocks(self.problem.n):
            total.addmm_(weights[:, n0:n1], self.rows.block(n0, n1).to(weights.dtype))
        return total


def _within(targets: tuple[Tensor, Tensor, Tensor], n0: int, n1: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """The target entries of rows n0 to n1, counted from n0."""
    if n0 == 0 and n1 == total:
        return targets
    row, column, value = targets
    inside = (row >= n0) & (row < n1)
    return row[inside] - n0, column[inside], value[inside]
