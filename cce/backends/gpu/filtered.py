"""The filtered backward: live tiles by the kernels, compensation for the dead ones by torch.

A ``c`` the kernels cannot take (another dtype or layout, or a row size that is no multiple of 16 bytes) is copied as a
whole, in addition to the scratch memory: live tiles may lie anywhere in it.

Where the vocabulary has no order of its own, rows of dC are written in ascending order, and those of a later stretch
are lent to an earlier one for its dx. Each stretch has its own plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula, Live
from cce.backends.gpu.compensation import Dead, compensation
from cce.backends.gpu.gradients import Scaled, add_mean_logit_to_de, add_mean_logit_to_entries
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.lent import Stretch, shaped, stretches
from cce.backends.gpu.operands import Call, aligned
from cce.backends.gpu.sizes import cdiv, row_blocks, slot_bytes
from cce.backends.gpu.sorted_rows import SortedRows
from cce.backends.gpu.used_rows import in_rows
from cce.backends.gpu.work import Work
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.spec import Spec

#: Share of the remaining entries that the next stretch takes, and the most stretches that are lent rows: each has a
#: plan of about ten small kernels.
_SHARE, _MOST_STRETCHES = 2 / 3, 2


def filtered(
    kernels: Kernels,
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """Run one pass over the chunks of the plan; every launch finds its work in memory, and the host never waits."""
    call, used = Call.of(kernels, inputs, problem, spec), used_rows(inputs)
    inputs = replace(inputs, in_use=used)  # asked once
    upstream = in_rows(upstream, used)
    found = Scaled.of(call, inputs, outputs, upstream)
    work = kernels.work_list(inputs, problem, spec, found.rows, maps, upstream)
    rows = SortedRows.of(call, work.row_order, work.keep)
    c = inputs.c if kernels.any_layout else aligned(inputs.c, problem.dtype)
    dead = Dead(None, None, None)
    if spec.compensate:
        dead = compensation(call, c, rows, work.live, found, outputs, maps)
    total = dead.de
    if problem.grad_e:
        if total is None:
            total = torch.zeros(problem.n, call.e.shape[1], dtype=torch.float32, device=call.e.device)
        if found.s is not None:
            add_mean_logit_to_de(call, inputs, found.s.index_select(0, work.row_order), total)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    _all_stretches(_Part(call, rows, work, found, c, call.formula, dead, Gradients(total, dc, dbias)))
    de, row_order = rows.de, work.row_order
    del rows, dead, work, c
    if total is not None:
        de = call.empty(problem.n, problem.d, dtype=problem.de_dtype) if de is None else de
        # The products add 0 times an entry, which may be NaN: rows that do not count are left out again.
        kernels.scatter_rows(spec, total[:, : problem.d], found.norm, row_order, used, de)
    if found.s is not None:
        add_mean_logit_to_entries(call, inputs.logit_weight, found.s, found.norm, dc, dbias)
    return Gradients(de, dc, dbias)


@dataclass(frozen=True)
class _Part:
    """A run of the vocabulary, with the rows and the work list of the problem.

    Attributes:
        c, formula: rows of the run, and their bias.
        dead: contribution of its dead tiles.
        sums: dE, to which the run adds, and its rows of dC and dbias.
    """

    call: Call
    rows: SortedRows
    work: Work
    found: Scaled
    c: Tensor
    formula: Formula
    dead: Dead
    sums: Gradients[Tensor]

    def of(self, stretch: Stretch) -> _Part:
        """Part that covers a stretch of this one, which is the whole vocabulary, without an order."""
        v0, v1 = stretch.v0, stretch.v1
        if v1 - v0 == len(self.c):
            return self
        t0, t1 = v0 // self.call.block_v, cdiv(v1, self.call.block_v)
        targets = self.found.rows.targets
        places = torch.where((targets >= v0) & (targets < v1), targets - v0, -1)
        return replace(
            self,
            work=replace(self.work, live=self.work.live[t0:t1]),
            found=replace(self.found, rows=replace(self.found.rows, targets=places)),
            c=self.c[v0:v1],
            formula=replace(self.formula, bias=_part(self.formula.bias, v0, v1)),
            dead=Dead(self.dead.de, _part(self.dead.mass_e, t0, t1), _part(self.dead.mass, t0, t1)),
            sums=replace(self.sums, dc=_part(self.sums.dc, v0, v1), dbias=_part(self.sums.dbias, v0, v1)),
        )

    def slots(self, lent: Tensor | None) -> int:
        """Number of tiles for which the memory of dx has room: lent memory, or what the rows left of the scratch."""
        problem, spec = self.call.problem, self.call.spec
        size = slot_bytes(problem, spec)
        if lent is None:
            return max((spec.scratch_bytes - self.rows.scratch) // size, 2 * row_blocks(problem, spec))
        dx = self.call.block_n * self.call.block_v * problem.dtype.itemsize
        return min(lent.numel() // dx - 1, spec.scratch_bytes // (size - dx))  # a slot's rest is scratch memory


def _part(x: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if x is None else x[start:end]


def _all_stretches(whole: _Part) -> None:
    call, lending = whole.call, whole.sums.dc if whole.call.order is None else None
    for stretch in stretches(call.problem.v, lending, call.block_v, _SHARE, call.spec.scratch_bytes, _MOST_STRETCHES):
        _live_tiles(whole.of(stretch), stretch.lent)


def _live_tiles(part: _Part, lent: Tensor | None) -> None:
    """Add to dE, and write dC and dbias: for every chunk there may be, most of which find nothing to do."""
    call, sums, rows = part.call, part.sums, part.rows
    plan = call.kernels.plan(part.work.live, part.slots(lent), call.sizes.pack)
    slots, dtype = plan.max_items, call.problem.dtype
    shape = slots + 1, call.block_n, call.block_v  # one to spare
    arguments = Live(
        plan=plan,
        e=call.e if rows.e is None else rows.e,
        sorted_rows=rows.e is not None,
        c=part.c,
        order=call.order,
        formula=part.formula,
        rows=part.found.rows,
        row_order=rows.row_order,
        keep=rows.keep,
        dz=call.empty(*shape, dtype=dtype) if lent is None else shaped(lent, shape, dtype),
        column_sums=None if sums.dbias is None else call.empty(slots, call.block_v),
        de=sums.de,
        dc=sums.dc,
        dbias=sums.dbias,
        mass_e=part.dead.mass_e,
        mass=part.dead.mass,
        norm=part.found.norm,
        row_of=part.work.row_of,
    )
    chunk = call.kernels.live(call.problem, call.spec, arguments)
    for k in range(plan.chunks):
        chunk(k)
