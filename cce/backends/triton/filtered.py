"""The filtered backward: live tiles, and compensation for the dead ones (docs/algorithm.md, steps 3 to 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.lent import Stretch, shaped, stretches
from cce.backends.gpu.sizes import cdiv, row_blocks, slot_bytes
from cce.backends.problem import Gradients, Inputs, Maps, Outputs, Upstream
from cce.backends.shared.rows import used_rows
from cce.backends.shared.worklist import WorkList, target_positions
from cce.backends.triton import plan as plans
from cce.backends.triton.call import Call
from cce.backends.triton.compensation import Dead, compensation
from cce.backends.triton.gradients import Formula, add_rank_one_dc, add_rank_one_de, finish_de
from cce.backends.triton.kernels.gradient import sparse_kernel
from cce.backends.triton.kernels.products import dbias_kernel, products_kernel
from cce.backends.triton.operands import dot_dtype, matrix, needs_wide, tma_ready
from cce.backends.triton.repeat import Repeated
from cce.backends.triton.sorted_rows import Rows

#: Share of the remaining entries that the next stretch takes; each stretch has its own plan, of about ten small
#: kernels.
_SHARE, _MOST_STRETCHES = 2 / 3, 2


def filtered(
    call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], maps: Maps[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Run one pass over the chunks of the plan; every launch finds its work in memory, and the host never waits."""
    problem = call.problem
    formula = Formula.of(call, inputs, outputs, upstream)
    live = plans.find_live(call, formula.target_place, used_rows(inputs), maps, upstream, outputs.lse)
    rows = Rows.of(call, live)
    dead = compensation(call, formula, live, rows, maps) if call.spec.compensate else None
    total = None
    if problem.grad_e:
        total = (
            dead.de
            if dead is not None
            else torch.zeros(problem.n, problem.d, dtype=torch.float32, device=call.e.device)
        )
        assert total is not None
        if formula.upstream.s is not None:
            add_rank_one_de(call, inputs, formula.upstream.s.index_select(0, live.row_order), total)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    # With a vocabulary order, rows of dC are written in any order.
    lending = dc if call.order is None else None
    for stretch in stretches(problem.v, lending, call.block_v, _SHARE, call.spec.scratch_bytes, _MOST_STRETCHES):
        part = _Part(call, formula, live, dead, Gradients(total, dc, dbias)).of(stretch)
        _Run(part, rows, stretch.lent).all_chunks()
    de = rows.de
    del rows, dead
    if total is not None:
        de = finish_de(call, total, formula.norm, live.row_order, live.keep, de)
    if formula.upstream.s is not None:
        s = formula.upstream.s if formula.norm is None else formula.upstream.s * formula.norm
        add_rank_one_dc(call, inputs.logit_weight, s, dc, dbias)
    return Gradients(de, dc, dbias)


@dataclass(frozen=True)
class _Part:
    """A run of the vocabulary as a problem of its own; its sums are parts of the whole sums."""

    call: Call
    formula: Formula
    live: plans.Live
    dead: Dead | None
    sums: Gradients[Tensor]

    def of(self, stretch: Stretch) -> _Part:
        """Part that covers a stretch of this one."""
        call, v0, v1 = self.call, stretch.v0, stretch.v1
        if v1 - v0 == call.problem.v:
            return self
        t0, t1 = v0 // call.block_v, cdiv(v1, call.block_v)

        def entries(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[v0:v1]

        return _Part(
            replace(call, problem=replace(call.problem, v=v1 - v0), c=call.c[v0:v1], bias=entries(call.bias)),
            replace(self.formula, target_place=self.formula.target_place - v0),
            replace(self.live, live=self.live.live[t0:t1]),
            None if self.dead is None else self.dead.of_blocks(t0, t1),
            replace(self.sums, dc=entries(self.sums.dc), dbias=entries(self.sums.dbias)),
        )


class _Run:
    """The scratch memory, and the launches of a chunk; the chunk's number is their only argument that changes."""

    def __init__(self, part: _Part, rows: Rows, lent: Tensor | None) -> None:
        self.call, self.formula, self.live, self.rows, self.dead = part.call, part.formula, part.live, rows, part.dead
        call, sums = part.call, part.sums
        problem = call.problem
        self.plan = plans.make(call, part.live, self._slots(lent), call.launch.sparse.columns // call.block_v)
        slots = self.plan.max_items
        shape = (slots + 1) * call.block_n, call.block_v  # one spare
        if lent is None:
            self.scratch = call.empty(*shape, dtype=problem.dtype)
        else:
            self.scratch = shaped(lent, shape, problem.dtype)
        self.entries = call.empty(slots, call.block_v, dtype=torch.int32)
        self.column_sums = call.empty(slots, call.block_v) if problem.grad_bias else None
        self.counters = torch.zeros(self.plan.chunks, 2, dtype=torch.int32, device=call.e.device)
        self.dz_tma = call.launch.tma and tma_ready(self.scratch)
        self.launches = [self._dz()]
        if sums.de is not None or sums.dc is not None:
            self.launches.append(self._products(sums.de, sums.dc))
        if sums.dbias is not None:
            self.launches.append(self._dbias(sums.dbias))

    def _slots(self, lent: Tensor | None) -> int:
        """Number of tiles for which the memory of dx has room."""
        problem, spec = self.call.problem, self.call.spec
        size = slot_bytes(problem, spec)
        if lent is None:
            return max((spec.scratch_bytes - self.rows.scratch) // size, 2 * row_blocks(problem, spec))
        dx = self.call.block_n * self.call.block_v * problem.dtype.itemsize
        return min(lent.numel() // dx - 1, spec.scratch_bytes // (size - dx))  # a slot's rest is scratch memory

    def all_chunks(self) -> None:
        """Launch every chunk there may be; most find nothing to do."""
        for chunk in range(self.plan.chunks):
            for launch in self.launches:
                launch(chunk=chunk)

    @property
    def boxes(self) -> bool:
        """Whether tiles of ``c`` are read as boxes, one or two per program."""
        return self.call.c_tma and 2 * self.call.block_v >= self.call.launch.sparse.columns

    def _dz(self) -> Repeated:
        """Compute dx of the chunk's live tiles into the scratch memory."""
        call, plan, tile, problem = self.call, self.plan, self.call.launch.sparse, self.call.problem
        operands = call.operands(tile, self.rows.e, c_rows=call.block_v, gather=not self.boxes)
        if not self.rows.copied:  # rows of a block may lie anywhere
            operands |= {"e": self.rows.e, "E_TMA": False}
        stored = self.dz_tma and self.boxes
        arguments = {
            **operands, **self.formula.arguments(),
            "dz": matrix(self.scratch, call.block_n, call.block_v, stored), "DZ_TMA": stored,
            "order": call.order, "ORDER": call.order is not None, "dbias": self.column_sums,
            "slot_entries": self.entries, "row_order": self.live.row_order, "keep": self.live.keep,
            "tile_list": plan.tile_list, "item_block": plan.item_block, "item_first": plan.item_first,
            "item_slot": plan.item_slot, "item_tiles": plan.item_tiles, "items": plan.items,
            "N": problem.n, "V": problem.v, "T": call.tiles, "max_items": plan.max_items,
            "SORTED": self.rows.copied, "DBIAS": self.column_sums is not None,
            "MASK": problem.v % call.block_v != 0, "BLOCK_N": tile.rows, "TILE_V": tile.columns,
            "BLOCK_V": call.block_v, "BLOCK_D": tile.depth,
        }  # fmt: skip
        grid = (call.launch.programs,)
        return Repeated(sparse_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)

    def _products(self, de: Tensor | None, dc: Tensor | None) -> Repeated:
        """Compute de += dx c, and dC of the chunk's entries."""
        call, plan, problem = self.call, self.plan, self.call.problem
        of_e, of_c = call.launch.de, call.launch.dc
        e, e_tma = self.rows.e, self.rows.copied and call.e_tma(self.rows.e)
        mass_e = None if self.dead is None else self.dead.mass_e
        dc_tma = dc is not None and call.launch.tma and call.order is None and tma_ready(dc)
        arguments = {
            "e_dz": matrix(self.scratch, call.block_n, of_e.depth, self.dz_tma),
            "c_dz": matrix(self.scratch, of_c.depth, of_c.rows, self.dz_tma),
            "e": matrix(e, of_c.depth, of_c.columns, e_tma), "c": matrix(call.c, of_e.depth, of_e.columns, self.boxes),
            "slot_entries": self.entries, "tile_list": plan.tile_list, "block_slot": plan.block_slot,
            "block_tiles": plan.block_tiles, "block_first": plan.block_first, "de": de,
            "order": call.order,
            "row_order": self.live.row_order, "keep": self.live.keep, "live_count": plan.live_count,
            "block_list": plan.block_list, "slot_list": plan.slot_list, "chunk_start": plan.chunk_start,
            "counters": self.counters, "mass_e": mass_e, "norm": self.formula.norm,
            "dc": None if dc is None else matrix(dc, of_c.rows, of_c.columns, dc_tma),
            "N": problem.n, "V": problem.v, "D": problem.d, "T": call.tiles, "blocks": plan.before.shape[0],
            "stride_en": e.stride(0), "stride_ed": e.stride(1), "stride_cv": call.c.stride(0),
            "stride_cd": call.c.stride(1), "stride_dc": problem.d, "DE": de is not None, "DC": dc is not None,
            "SORTED": self.rows.copied, "DZ_TMA": self.dz_tma, "C_TMA": self.boxes, "E_TMA": e_tma,
            "DC_TMA": dc_tma, "EVEN_D": problem.d % of_e.columns == 0,
            "DOT": dot_dtype(problem.dtype), "PRECISION": call.precision, "ORDER": call.order is not None,
            "COMPENSATE": mass_e is not None, "NORM": self.formula.norm is not None,
            "WIDE": needs_wide(call.c) or problem.v * problem.d >= 2**31, "BLOCK_N": call.block_n,
            "BLOCK_V": call.block_v, "E_BLOCK_D": of_e.columns, "E_BLOCK_K": of_e.depth, "E_STAGES": of_e.stages,
            "C_BLOCK_M": of_c.rows, "C_BLOCK_D": of_c.columns, "C_BLOCK_K": of_c.depth, "C_STAGES": of_c.stages,
        }  # fmt: skip
        return Repeated(products_kernel, (call.launch.programs,), arguments, num_warps=of_c.warps)

    def _dbias(self, dbias: Tensor) -> Repeated:
        """Compute dbias of the chunk's entries."""
        call, plan = self.call, self.plan
        mass = None if self.dead is None else self.dead.mass
        arguments = {
            "dbias_slots": self.column_sums, "order": call.order, "live_count": plan.live_count,
            "block_list": plan.block_list, "slot_list": plan.slot_list, "chunk_start": plan.chunk_start, "mass": mass,
            "norm": self.formula.norm, "dbias": dbias, "V": call.problem.v, "blocks": plan.before.shape[0],
            "ORDER": call.order is not None, "COMPENSATE": mass is not None, "NORM": self.formula.norm is not None,
            "BLOCK_V": call.block_v,
        }  # fmt: skip
        return Repeated(dbias_kernel, (call.launch.programs,), arguments)


def live_tiles(call: Call, inputs: Inputs[Tensor], maps: Maps[Tensor], upstream: Upstream[Tensor]) -> WorkList:
    """The live tiles, in the form of the other backends."""
    place, used = target_positions(inputs).to(torch.int32), used_rows(inputs)
    live = plans.find_live(call, place, used, maps, upstream)
    position = torch.empty_like(live.row_order)
    position[live.row_order] = torch.arange(call.problem.n, device=position.device)
    found = live.live != 0  # (T, B)
    return WorkList(live.row_order, found.T, found.index_select(1, position // call.block_n) & used)
