"""The filtered backward: live tiles by the kernels, and what stands for the dead ones by the library.

A ``c`` that is not as the kernels take it (another dtype or layout, or rows of no multiple of 16 bytes) is copied as a
whole, beside the scratch memory: live tiles are anywhere in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu import plan as plans
from cce.backends.gpu.compensation import Dead, compensation
from cce.backends.gpu.gradients import Scaled, add_mean_logit_to_de, add_mean_logit_to_entries, rounded_de
from cce.backends.gpu.kernels import Kernels, Live
from cce.backends.gpu.operands import Call, aligned
from cce.backends.gpu.sizes import row_blocks, slot_bytes
from cce.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.rows import used_rows
from cce.spec import Spec
from cce.worklist import WorkList, work_list


@dataclass(frozen=True)
class SortedRows:
    """The rows of ``e`` in the work list's order, zeros where no gradient is wanted; copied as a whole or in pieces.

    Attributes:
        row_order: (N,). keep: (N,) bool, the row wants a gradient, in its own place.
        e: (N, D) aligned copy of all, or None.
    """

    call: Call
    row_order: Tensor
    keep: Tensor
    e: Tensor | None

    @classmethod
    def of(cls, call: Call, row_order: Tensor, keep: Tensor) -> SortedRows:
        """A copy of all if it takes no more than a third of the scratch memory."""
        rows = cls(call, row_order, keep, None)
        return (
            rows if 3 * call.e.nbytes > call.spec.scratch_bytes else cls(call, row_order, keep, rows.part(0, len(keep)))
        )

    def part(self, n0: int, n1: int) -> Tensor:
        """(n1 - n0, D) aligned: rows n0 to n1 of the order."""
        if self.e is not None:
            return self.e[n0:n1]
        index = self.row_order[n0:n1]
        return self.call.e.index_select(0, index).masked_fill_(~self.keep.index_select(0, index)[:, None], 0)

    @property
    def step(self) -> int:
        """Rows of a piece that is small beside the scratch memory."""
        n, one = self.call.problem.n, self.call.e.shape[1] * self.call.e.element_size()
        return n if self.e is not None else max(1, self.call.spec.scratch_bytes // 8 // one)


def filtered(
    kernels: Kernels,
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """One pass over the chunks of the plan; every launch finds its work in memory, and the host waits for nothing."""
    call = Call.of(kernels, inputs, problem, spec)
    found = Scaled.of(call, inputs, outputs, upstream)
    work = work_list(inputs, problem, spec, maps, upstream, used_rows(inputs))
    rows = SortedRows.of(call, work.row_order, _wanted(upstream))
    c = aligned(inputs.c, problem.dtype)
    dead = Dead(None, None, None)
    if spec.compensate:
        dead = compensation(call, c, rows, work, (outputs, maps, upstream), found.norm)
    total = dead.de
    if problem.grad_e:
        if total is None:
            total = torch.zeros(problem.n, call.e.shape[1], device=call.e.device)
        if found.s is not None:
            add_mean_logit_to_de(call, inputs.logit_weight, found.s.index_select(0, work.row_order), total)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    row_order = work.row_order
    _live_tiles(call, c, found, rows, work, dead, Gradients(total, dc, dbias))
    del rows, dead, work, c
    de = rounded_de(call, total, found.norm, row_order) if total is not None else None
    if found.s is not None:
        add_mean_logit_to_entries(call, inputs.logit_weight, found.s, found.norm, dc, dbias)
    return Gradients(de, dc, dbias)


def _wanted(upstream: Upstream[Tensor]) -> Tensor:
    """(N,) bool: the row wants a gradient."""
    keep = (upstream.a != 0) | (upstream.g != 0).any(1)
    return keep if upstream.h is None else keep | (upstream.h != 0)


def _live_tiles(
    call: Call, c: Tensor, found: Scaled, rows: SortedRows, work: WorkList, dead: Dead, sums: Gradients[Tensor]
) -> None:
    """Adds to dE, and writes dC and dbias: every chunk there may be, of which most find nothing to do."""
    problem, spec = call.problem, call.spec
    left = spec.scratch_bytes - (0 if rows.e is None else rows.e.nbytes)
    slots = max(left // slot_bytes(problem, spec), 2 * row_blocks(problem, spec))
    plan = plans.make(work.live.T, slots, call.sizes.pack)
    slots = plan.max_items
    live = Live(
        plan=plan,
        e=call.e if rows.e is None else rows.e,
        sorted_rows=rows.e is not None,
        c=c,
        order=call.order,
        formula=call.formula,
        rows=found.rows,
        row_order=rows.row_order,
        keep=rows.keep,
        dz=call.empty(slots + 1, call.block_n, call.block_v, dtype=problem.dtype),  # one to spare
        column_sums=None if sums.dbias is None else call.empty(slots, call.block_v),
        de=sums.de,
        dc=sums.dc,
        dbias=sums.dbias,
        mass_e=dead.mass_e,
        mass=dead.mass,
        norm=found.norm,
    )
    chunk = call.kernels.live(problem, spec, live)
    for k in range(plan.chunks):
        chunk(k)
