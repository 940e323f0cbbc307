"""The filtered backward: live tiles by the kernels, compensation for the dead ones by torch.

A ``c`` the kernels cannot take (another dtype or layout, or a row size that is no multiple of 16 bytes) is copied as a
whole, in addition to the scratch memory: live tiles may lie anywhere in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Live
from cce.backends.gpu.compensation import Dead, compensation
from cce.backends.gpu.gradients import Scaled, add_mean_logit_to_de, add_mean_logit_to_entries, rounded_de
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.operands import Call, aligned
from cce.backends.gpu.sizes import copied_in_scratch, row_blocks, slot_bytes
from cce.backends.gpu.sorted_rows import SortedRows
from cce.backends.gpu.used_rows import in_rows
from cce.backends.gpu.work import Work
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.spec import Spec


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
    upstream = in_rows(upstream, used)
    found = Scaled.of(call, inputs, outputs, upstream)
    work = kernels.work_list(inputs, problem, spec, found.rows, maps, upstream)
    row_order, live = work.row_order, work.live
    rows = SortedRows.of(call, row_order, work.keep)
    c = aligned(inputs.c, problem.dtype)
    dead = Dead(None, None, None)
    if spec.compensate:
        dead = compensation(call, c, rows, live, found, outputs, maps)
    total = dead.de
    if problem.grad_e:
        if total is None:
            total = torch.zeros(problem.n, call.e.shape[1], dtype=torch.float32, device=call.e.device)
        if found.s is not None:
            add_mean_logit_to_de(call, inputs, found.s.index_select(0, row_order), total)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    _live_tiles(call, c, found, rows, work, dead, Gradients(total, dc, dbias))
    del rows, dead, work, live, c
    de = None
    if total is not None:
        de = rounded_de(call, total, found.norm, row_order)
        de.masked_fill_(~used[:, None], 0)  # the products add 0 times an entry, which may be NaN
    if found.s is not None:
        add_mean_logit_to_entries(call, inputs.logit_weight, found.s, found.norm, dc, dbias)
    return Gradients(de, dc, dbias)


def _live_tiles(
    call: Call, c: Tensor, found: Scaled, rows: SortedRows, work: Work, dead: Dead, sums: Gradients[Tensor]
) -> None:
    """Add to dE, and write dC and dbias: for every chunk there may be, most of which find nothing to do."""
    problem, spec = call.problem, call.spec
    left = spec.scratch_bytes - copied_in_scratch(problem, spec)
    slots = max(left // slot_bytes(problem, spec), 2 * row_blocks(problem, spec))
    plan = call.kernels.plan(work.live, slots, call.sizes.pack)
    slots = plan.max_items
    arguments = Live(
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
        row_of=work.row_of,
    )
    chunk = call.kernels.live(problem, spec, arguments)
    for k in range(plan.chunks):
        chunk(k)
