"""The backward: recompute the live pieces of the logits, multiply their gradient by ``c`` and by ``e``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.compensation import columns_of_tiles, dead_mass
from cce.backends.shared.rows import rows_of
from cce.backends.shared.scaling import norm_of, scaled
from cce.backends.shared.weighted_logit import weighted_rows
from cce.backends.shared.worklist import WorkList, work_list
from cce.backends.torch.arithmetic import Arithmetic, Rows, gathered
from cce.backends.torch.forward import weights_along
from cce.backends.torch.logits import add_at_, logits_, softcap_derivative, softmax_gradient_
from cce.backends.torch.plan import Plan
from cce.backends.torch.segments import Segment, Targets, segments
from cce.spec import Spec

# Largest upstream gradient in float16: well below 65504 so that sums do not overflow, yet large, so that values much
# smaller than it seldom underflow. dC is summed in float32 here.
_LARGEST = 2.0**8


@dataclass
class Skipped:
    """Compensation for the tiles the filter skips, for one group of tiles at a time.

    Attributes:
        step: number of tiles in a group.
        t0, t1: first tile of the group, and the first after it.
        mass: (t1 - t0, N) mass of its skipped tiles, rows in the work list's order.
        means: (t1 - t0, D) mean rows of ``c``, filled as the walk meets the tiles; None without dE.
        dc: (t1 - t0, D) addition to every row of a tile's dC, besides its live part; None without dC.
        dbias: (t1 - t0,) likewise for the bias.
    """

    step: int
    t0: int = 0
    t1: int = 0
    mass: Tensor | None = None
    means: Tensor | None = None
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
    """Compute the gradients: dE accumulates over the vocabulary, each row of dC is complete after one visit."""
    work = None if spec.filter == "none" else work_list(inputs, problem, spec, maps, upstream)
    run = Run(inputs, problem, spec, outputs, maps, upstream, work)
    if upstream.s is not None and problem.softcap is None:
        run.add_rank_one()
    found = segments(problem, spec, run.plan.columns, None if work is None else work.live)
    targets = Targets(run.inputs, run.upstream, found)
    for index, segment in enumerate(s.located(problem, spec, inputs.e.device) for s in found):
        run.segment(segment, targets.of(index, segment))
    return run.finish()


class Run:
    """The sums of one backward, and the buffers of the current piece.

    Under a filter, rows are in the work list's order, those of dE too until the end; the values that give the dead
    tiles' mass stay in the given order.
    """

    def __init__(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        outputs: Outputs[Tensor],
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
        work: WorkList | None,
    ) -> None:
        self.problem, self.spec, self.work = problem, spec, work
        self.given = (outputs, maps, upstream)
        self.arithmetic = Arithmetic.choose(problem, spec)
        self.plan = Plan.choose(problem, spec, gathered(inputs))
        if work is not None:
            order = work.row_order
            rows = order if inputs.rows is None else inputs.rows.index_select(0, order)
            inputs = replace(inputs, rows=rows, targets=inputs.targets.index_select(0, order))
            outputs, upstream = rows_of(outputs, order), rows_of(upstream, order)
        self.inputs, self.outputs = inputs, outputs
        self.rows = Rows(inputs, self.arithmetic, keep=self.plan.keep_rows)
        self.norm = norm_of(upstream, self.arithmetic.operand, problem.logit_scale, _LARGEST)
        self.upstream = scaled(upstream, problem.logit_scale, self.norm)
        wide = inputs.e.new_empty(0, dtype=self.arithmetic.result)
        self.z = wide.new_empty(self.plan.rows * self.plan.columns)
        self.de = wide.new_zeros(problem.n, problem.d) if problem.grad_e else None
        self.dbias = wide.new_zeros(problem.v) if problem.grad_bias else None
        self.dc = inputs.c.new_empty(problem.v, problem.d) if problem.grad_c else None
        self.skipped = Skipped(self.plan.tiles) if work is not None and spec.compensate else None
        self.rank_one: Tensor | None = None  # (D,): dC_v += u_v rank_one

    def _compensate_from(self, t: int) -> None:
        """End the current group of tiles and begin the next with ``t``, if ``t`` is not in the current one."""
        skipped = self.skipped
        if skipped is None or self.work is None or t < skipped.t1:
            return
        self._end_group()
        problem, spec = self.problem, self.spec
        t1 = min(spec.tiles(problem.v), t + skipped.step)
        outputs, maps, upstream = self.given
        mass = dead_mass(problem, spec, outputs, maps, upstream, self.work.row_live, t, t1)
        mass = mass.index_select(1, self.work.row_order)  # (t, N)
        if self.norm is not None:
            mass /= self.norm
        columns = columns_of_tiles(problem, spec, t, t1, mass)
        skipped.t0, skipped.t1, skipped.mass = t, t1, mass
        skipped.means = None if self.de is None else mass.new_zeros(t1 - t, problem.d)
        skipped.dbias = mass.sum(1) / columns
        skipped.dc = self._times_e(mass) / columns[:, None] if self.dc is not None else None

    def _end_group(self) -> None:
        """Compute dE += m cbar."""
        skipped = self.skipped
        if skipped is not None and self.de is not None and skipped.mass is not None and skipped.means is not None:
            self.de.addmm_(skipped.mass.T, skipped.means)
            skipped.mass = skipped.means = None

    def add_rank_one(self) -> None:
        """Add the gradient of sum_v u_v z_v without a softcap: dE_i += s_i sum_v u_v c_v, dC_v += u_v sum_i s_i e_i."""
        s = self.upstream.s
        assert s is not None
        if self.de is not None:
            self.de.addr_(s, weighted_rows(self.inputs, self.problem, self.arithmetic.result, self.plan.columns))
        if self.dc is not None:
            self.rank_one = self._times_e(s[None])[0]
        if self.dbias is not None:
            self.dbias += s.sum() * weights_along(self.inputs, self.problem, 0, self.problem.v, s)

    def segment(self, segment: Segment, targets: tuple[Tensor, Tensor, Tensor]) -> None:
        """Process one run of tiles: its live rows block by block, then its rows of dC."""
        skipped = self.skipped if segment.blocks is not None else None
        if skipped is not None:
            self._compensate_from(segment.t0)
        means = None if skipped is None else skipped.means
        slab, total = self._slab(segment), len(segment)
        if total or means is not None:
            c = self.arithmetic.columns(self.inputs, segment.v0, segment.v1)
            if skipped is not None and means is not None:
                torch.mean(c, 0, dtype=means.dtype, out=means[segment.t0 - skipped.t0])
            for n0, n1 in self.plan.row_blocks(total):
                self._rows(segment, c, slab, n0, n1, _within(targets, n0, n1, total))
        self._write(segment, slab, empty=total == 0)

    def _rows(
        self,
        segment: Segment,
        c: Tensor,
        slab: Tensor | None,
        n0: int,
        n1: int,
        targets: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Process rows n0 to n1 of a segment: compute their dz, and add its products to the sums."""
        rows = segment.part(n0, n1)
        e = self.rows.block(rows.start, rows.stop) if isinstance(rows, slice) else self.rows.gather(rows)
        dz = self._dz(segment, e, c, rows, targets)
        if self.dbias is not None:
            self.dbias[segment.v0 : segment.v1] += dz.sum(0)
        dz = dz.to(self.arithmetic.operand)
        if self.de is not None:
            self._add_de(self.de, dz, c, rows)
        if slab is not None and n0 == 0:
            self.arithmetic.product(dz.T, e, slab)
        elif slab is not None:
            self.arithmetic.add_product(dz.T, e, slab)

    def finish(self) -> Gradients[Tensor]:
        self._end_group()
        self.skipped = None
        self.z = self.z.new_empty(0)  # dE in its rows' own order takes as much memory as a piece
        if self.norm is not None:
            for total in (self.de, self.dbias):
                if total is not None:
                    total *= self.norm
        dbias = self.dbias
        if dbias is not None and self.inputs.vocab_order is not None:
            dbias = torch.empty_like(dbias).index_copy_(0, self.inputs.vocab_order, dbias)
        return Gradients(self._de_as_given(), self.dc, dbias)

    def _de_as_given(self) -> Tensor | None:
        """dE with its rows in their own order; in its final dtype if the rows had to be moved."""
        if self.de is None or self.work is None:
            return self.de
        out = self.de.new_empty(self.de.shape, dtype=self.problem.de_dtype)
        for n0, n1 in self.plan.row_blocks(self.problem.n):
            out.index_copy_(0, self.work.row_order[n0:n1], self.de[n0:n1].to(out.dtype))
        return out

    def _dz(
        self, segment: Segment, e: Tensor, c: Tensor, rows: slice | Tensor, targets: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Gradient of logit_scale (e c^T + bias), (rows, columns), in the accumulation dtype."""
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

    def _add_de(self, de: Tensor, dz: Tensor, c: Tensor, rows: slice | Tensor) -> None:
        if isinstance(rows, slice):
            self.arithmetic.add_product(dz, c, de[rows])
        else:
            # Gather, add, scatter: rows are distinct, so this needs no atomics.
            de.index_copy_(0, rows, self.arithmetic.add_product(dz, c, de.index_select(0, rows)))

    def _slab(self, segment: Segment) -> Tensor | None:
        """Memory (columns, D) for the sum of the segment's dC: dC itself if it has the right dtype and order."""
        if self.dc is None:
            return None
        if self.dc.dtype == self.arithmetic.result and self.inputs.vocab_order is None:
            return self.dc[segment.v0 : segment.v1]
        return self.dc.new_empty(segment.v1 - segment.v0, self.problem.d, dtype=self.arithmetic.result)

    def _write(self, segment: Segment, slab: Tensor | None, empty: bool) -> None:
        """Add the terms common to a tile's rows, undo the scaling, and store dC in its dtype."""
        skipped = self.skipped if segment.blocks is not None else None
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

    def _times_e(self, weights: Tensor) -> Tensor:
        """Multiply weights (t, N) by the rows of ``e``, a block of rows at a time: (t, D)."""
        total = weights.new_zeros(len(weights), self.problem.d)
        for n0, n1 in self.plan.row_blocks(self.problem.n):
            total.addmm_(weights[:, n0:n1], self.rows.block(n0, n1).to(weights.dtype))
        return total


def _within(targets: tuple[Tensor, Tensor, Tensor], n0: int, n1: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target entries of rows n0 to n1, with rows counted from n0."""
    if n0 == 0 and n1 == total:
        return targets
    row, column, value = targets
    inside = (row >= n0) & (row < n1)
    return row[inside] - n0, column[inside], value[inside]
