"""The filtered backward: live tiles only, and what stands for the dead ones (docs/algorithm.md, steps 3 to 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu.products import product
from cce.backends.gpu.sizes import cdiv, row_blocks, slot_bytes
from cce.backends.triton import plan as plans
from cce.backends.triton.call import Call
from cce.backends.triton.gradients import Formula, add_rank_one_dc, add_rank_one_de, finish_de
from cce.backends.triton.kernels.compensation import dead_mass_kernel, mean_rows_kernel
from cce.backends.triton.kernels.gradient import sparse_kernel
from cce.backends.triton.kernels.products import dbias_kernel, products_kernel
from cce.backends.triton.operands import dot_dtype, gather, matrix, needs_wide, tma_ready
from cce.backends.triton.repeat import Repeated
from cce.problem import Gradients, Inputs, Maps, Outputs, Upstream
from cce.rows import used_rows
from cce.worklist import WorkList, target_positions


@dataclass(frozen=True)
class Rows:
    """The rows of ``e`` as the products read them.

    Attributes:
        e: a copy in the work list's order, with zeros for rows that want no gradient; or ``e`` as it is.
        copied: which of the two.
    """

    e: Tensor
    copied: bool

    @classmethod
    def of(cls, call: Call, live: plans.Live) -> Rows:
        """A copy if it takes no more than a third of the scratch memory."""
        if 3 * call.problem.n * call.problem.d * call.e.element_size() > call.spec.scratch_bytes:
            return cls(call.e, False)
        return cls(sorted_rows(call, live, 0, call.problem.n), True)


def sorted_rows(call: Call, live: plans.Live, n0: int, n1: int) -> Tensor:
    """(n1 - n0, D): rows n0 to n1 of the work list's order."""
    out = call.empty(n1 - n0, call.problem.d, dtype=call.e.dtype)
    return gather(call.e, live.row_order[n0:n1], out, live.keep)


@dataclass(frozen=True)
class Dead:
    """What the dead tiles add.

    Attributes:
        de: (N, D) float32, m^T cbar, rows in the work list's order; None where dE is not wanted.
        mass_e: (T, D) float32, m e; mass: (T,) row sums of m.
    """

    de: Tensor | None
    mass_e: Tensor | None
    mass: Tensor | None


def filtered(
    call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], maps: Maps[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """One pass over the chunks of the plan; every launch finds its work in memory, and the host waits for nothing."""
    problem = call.problem
    formula = Formula.of(call, inputs, outputs, upstream)
    live = plans.find_live(call, formula.target_place, used_rows(inputs), maps, upstream)
    rows = Rows.of(call, live)
    dead = None
    if call.spec.compensate:
        dead = _compensation(call, formula, live, rows, maps)
    total = None
    if problem.grad_e:
        total = dead.de if dead is not None else torch.zeros(problem.n, problem.d, device=call.e.device)
        assert total is not None
        if formula.upstream.s is not None:
            add_rank_one_de(call, inputs.logit_weight, formula.upstream.s.index_select(0, live.row_order), total)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    _Run(call, formula, live, rows, dead, Gradients(total, dc, dbias)).all_chunks()
    del rows, dead
    de = finish_de(call, total, live.row_order, formula.norm) if total is not None else None
    if formula.upstream.s is not None:
        s = formula.upstream.s if formula.norm is None else formula.upstream.s * formula.norm
        add_rank_one_dc(call, inputs.logit_weight, s, dc, dbias)
    return Gradients(de, dc, dbias)


def _compensation(call: Call, formula: Formula, live: plans.Live, rows: Rows, maps: Maps[Tensor]) -> Dead:
    """The products with the dead tiles' mass, in pieces of the map that fit into the scratch memory."""
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
    """(T, D) the mean row of ``c`` of each vocabulary block, in the products' dtype."""
    problem = call.problem
    means = call.empty(call.tiles, problem.d, dtype=problem.dtype)
    mean_rows_kernel[(call.tiles, cdiv(problem.d, 256))](
        call.c, call.order, None, means, problem.v, problem.d, call.c.stride(0), call.c.stride(1),
        ORDER=call.order is not None, WEIGHTED=False, ROWS=call.block_v, STEP=min(32, call.block_v), BLOCK_D=256,
    )  # fmt: skip
    return means


def _dead_mass(
    call: Call, formula: Formula, live: plans.Live, maps: Maps[Tensor], m: Tensor, t0: int, t1: int
) -> Tensor:
    """(t1 - t0, N): the sum of dx over the columns of each dead tile, rows in the work list's order."""
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
    """out = m e, (tiles, D); without a copy of the sorted rows, some of them at a time."""
    n, d = call.problem.n, call.problem.d
    if rows.copied:
        out.copy_(product(m, rows.e, torch.float32))
        return
    step = max(1, call.spec.scratch_bytes // 8 // (d * call.e.element_size()))
    out.zero_()
    for n0 in range(0, n, step):
        n1 = min(n, n0 + step)
        product(m[:, n0:n1], sorted_rows(call, live, n0, n1), torch.float32, out)


class _Run:
    """The scratch memory, and the launches of a chunk; which chunk is their only argument that changes."""

    def __init__(
        self, call: Call, formula: Formula, live: plans.Live, rows: Rows, dead: Dead | None, sums: Gradients[Tensor]
    ) -> None:
        self.call, self.formula, self.live, self.rows, self.dead = call, formula, live, rows, dead
        problem, tile = call.problem, call.launch.sparse
        left = call.spec.scratch_bytes - (rows.e.nbytes if rows.copied else 0)
        slots = max(left // slot_bytes(problem, call.spec), 2 * row_blocks(problem, call.spec))
        self.plan = plans.make(call, live, slots, tile.columns // call.block_v)
        slots = self.plan.max_items
        self.scratch = call.empty((slots + 1) * call.block_n, call.block_v, dtype=problem.dtype)  # one to spare
        self.entries = call.empty(slots, call.block_v, dtype=torch.int32)
        self.column_sums = call.empty(slots, call.block_v) if problem.grad_bias else None
        self.counters = torch.zeros(self.plan.chunks, 2, dtype=torch.int32, device=call.e.device)
        self.dz_tma = call.launch.tma and tma_ready(self.scratch)
        self.launches = [self._dz()]
        if sums.de is not None or sums.dc is not None:
            self.launches.append(self._products(sums.de, sums.dc))
        if sums.dbias is not None:
            self.launches.append(self._dbias(sums.dbias))

    def all_chunks(self) -> None:
        """Every chunk there may be; most find nothing to do."""
        for chunk in range(self.plan.chunks):
            for launch in self.launches:
                launch(chunk=chunk)

    @property
    def boxes(self) -> bool:
        """Tiles of ``c`` are read as boxes, one or two for a program."""
        return self.call.c_tma and 2 * self.call.block_v >= self.call.launch.sparse.columns

    def _dz(self) -> Repeated:
        """dx of the chunk's live tiles into the scratch memory."""
        call, plan, tile, problem = self.call, self.plan, self.call.launch.sparse, self.call.problem
        operands = call.operands(tile, self.rows.e, c_rows=call.block_v, gather=not self.boxes)
        if not self.rows.copied:  # rows of a block are anywhere
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
            "BLOCK_V": call.block_v, "BLOCK_D": tile.depth, "FLATTEN": tile.flatten,
        }  # fmt: skip
        grid = (call.launch.programs,)
        return Repeated(sparse_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)

    def _products(self, de: Tensor | None, dc: Tensor | None) -> Repeated:
        """de += dx c, and rows of dC of the chunk's entries."""
        call, plan, problem = self.call, self.plan, self.call.problem
        of_e, of_c = call.launch.de, call.launch.dc
        e, e_tma = self.rows.e, self.rows.copied and call.e_tma(self.rows.e)
        mass_e = None if self.dead is None else self.dead.mass_e
        dc_tma = dc is not None and call.launch.tma and call.order is None and tma_ready(dc)
        de_tma = de is not None and call.launch.tma and tma_ready(de)
        arguments = {
            "e_dz": matrix(self.scratch, call.block_n, of_e.depth, self.dz_tma),
            "c_dz": matrix(self.scratch, of_c.depth, of_c.rows, self.dz_tma),
            "e": matrix(e, of_c.depth, of_c.columns, e_tma), "c": matrix(call.c, of_e.depth, of_e.columns, self.boxes),
            "slot_entries": self.entries, "tile_list": plan.tile_list, "block_slot": plan.block_slot,
            "block_tiles": plan.block_tiles, "block_first": plan.block_first, "de": de,
            "de_in": None if de is None or not de_tma else matrix(de, call.block_n, of_e.columns, True),
            "order": call.order,
            "row_order": self.live.row_order, "keep": self.live.keep, "live_count": plan.live_count,
            "block_list": plan.block_list, "slot_list": plan.slot_list, "chunk_start": plan.chunk_start,
            "counters": self.counters, "mass_e": mass_e, "norm": self.formula.norm,
            "dc": None if dc is None else matrix(dc, of_c.rows, of_c.columns, dc_tma),
            "N": problem.n, "V": problem.v, "D": problem.d, "T": call.tiles, "blocks": plan.before.shape[0],
            "stride_en": e.stride(0), "stride_ed": e.stride(1), "stride_cv": call.c.stride(0),
            "stride_cd": call.c.stride(1), "stride_dc": problem.d, "DE": de is not None, "DC": dc is not None,
            "SORTED": self.rows.copied, "DZ_TMA": self.dz_tma, "C_TMA": self.boxes, "E_TMA": e_tma,
            "DE_TMA": de_tma, "DC_TMA": dc_tma, "EVEN_D": problem.d % of_e.columns == 0,
            "DOT": dot_dtype(problem.dtype), "PRECISION": call.precision, "ORDER": call.order is not None,
            "COMPENSATE": mass_e is not None, "NORM": self.formula.norm is not None,
            "WIDE": needs_wide(call.c) or problem.v * problem.d >= 2**31, "BLOCK_N": call.block_n,
            "BLOCK_V": call.block_v, "E_BLOCK_D": of_e.columns, "E_BLOCK_K": of_e.depth, "E_STAGES": of_e.stages,
            "C_BLOCK_M": of_c.rows, "C_BLOCK_D": of_c.columns, "C_BLOCK_K": of_c.depth, "C_STAGES": of_c.stages,
        }  # fmt: skip
        return Repeated(products_kernel, (call.launch.programs,), arguments, num_warps=of_c.warps)

    def _dbias(self, dbias: Tensor) -> Repeated:
        """dbias of the chunk's entries."""
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
    """The live tiles, as other backends tell them."""
    place = target_positions(inputs).to(torch.int32).contiguous()
    live = plans.find_live(call, place, used_rows(inputs), maps, upstream)
    position = torch.empty_like(live.row_order)
    position[live.row_order] = torch.arange(call.problem.n, device=position.device)
    found = live.live != 0  # (T, B)
    return WorkList(live.row_order, found.T, found.index_select(1, position // call.block_n))
