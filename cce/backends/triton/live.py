"""Launches of a filtered backward: dx of a chunk's live tiles, then their sums dE, dC and dbias."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cce.backends.gpu.arrays import Live
from cce.backends.problem import Problem
from cce.backends.triton.kernels.live import live_kernel
from cce.backends.triton.kernels.products import dbias_kernel, products_kernel
from cce.backends.triton.launch import Launch
from cce.backends.triton.operands import (
    Operands,
    dot_dtype,
    matrix,
    needs_wide,
    precision_of,
    tma_ready,
    values_of,
)
from cce.backends.triton.repeat import Repeated
from cce.spec import Spec


def launches_of_chunk(problem: Problem, spec: Spec, live: Live, launch: Launch) -> Callable[[int], None]:
    """Function that launches a chunk's kernels; the chunk's number is their only argument that changes."""
    run = _Run(problem, spec, live, launch)
    steps = [run.dx()]
    if live.de is not None or live.dc is not None:
        steps.append(run.products())
    if live.dbias is not None:
        steps.append(run.dbias())

    def chunk(number: int) -> None:
        for step in steps:
            step(chunk=number)

    return chunk


class _Run:
    """The arrays that the launches of all chunks share."""

    def __init__(self, problem: Problem, spec: Spec, live: Live, launch: Launch) -> None:
        assert spec.block_n is not None and spec.block_v is not None
        self.problem, self.live, self.launch = problem, live, launch
        self.block_n, self.block_v, self.v = spec.block_n, spec.block_v, len(live.c)
        plan = live.plan
        self.blocks, self.tiles = plan.tile_list.shape
        self.dz = live.dz.view(-1, spec.block_v)
        self.entries = live.dz.new_empty((plan.max_items, spec.block_v), dtype=torch.int32)
        self.dz_tma = launch.tma and tma_ready(self.dz)
        self.operands = Operands.of(launch, launch.sparse, live.e, live.c, spec.block_v)
        # Tiles of c are read as boxes, one or two a program, where they are boxes of the matrix.
        few = 2 * spec.block_v >= launch.sparse.columns
        self.boxes = self.operands.c_tma and live.order is None and few

    def dx(self) -> Repeated:
        """Compute dx of the chunk's live tiles into the scratch memory."""
        live, plan, tile, factors = self.live, self.live.plan, self.launch.sparse, self.operands
        e_tma = factors.e_tma and live.sorted_rows  # rows of a block may lie anywhere
        stored = self.dz_tma and self.boxes
        arguments = {
            **factors.arguments(live.formula), **values_of(live.rows),
            "e": matrix(live.e, tile.rows, tile.depth, e_tma), "E_TMA": e_tma,
            "c": factors.c_matrix(live.c) if self.boxes else live.c, "C_TMA": self.boxes, "bias": live.formula.bias,
            "dz": matrix(self.dz, self.block_n, self.block_v, stored), "DZ_TMA": stored,
            "order": live.order, "ORDER": live.order is not None, "dbias": live.column_sums,
            "slot_entries": self.entries, "row_order": live.row_order, "keep": live.keep,
            "tile_list": plan.tile_list, "item_block": plan.item_block, "item_first": plan.item_first,
            "item_slot": plan.item_slot, "item_tiles": plan.item_tiles, "items": plan.items,
            "N": self.problem.n, "V": self.v, "T": self.tiles, "max_items": plan.max_items,
            "SORTED": live.sorted_rows, "DBIAS": live.column_sums is not None,
            "MASK": self.v % self.block_v != 0, "BLOCK_N": tile.rows, "TILE_V": tile.columns,
            "BLOCK_V": self.block_v, "BLOCK_D": tile.depth,
        }  # fmt: skip
        grid = (self.launch.programs,)
        return Repeated(live_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)

    def products(self) -> Repeated:
        """Compute de += dx c, and dC of the chunk's entries."""
        live, plan, n, d = self.live, self.live.plan, self.problem.n, self.live.e.shape[1]
        of_e, of_c, e, c, dc = self.launch.de, self.launch.dc, self.live.e, self.live.c, self.live.dc
        e_tma = live.sorted_rows and self.operands.e_tma
        dc_tma = dc is not None and self.launch.tma and live.order is None and tma_ready(dc)
        counters = torch.zeros(plan.chunks, 2, dtype=torch.int32, device=e.device)
        arguments = {
            "e_dz": matrix(self.dz, self.block_n, of_e.depth, self.dz_tma),
            "c_dz": matrix(self.dz, of_c.depth, of_c.rows, self.dz_tma),
            "e": matrix(e, of_c.depth, of_c.columns, e_tma), "c": matrix(c, of_e.depth, of_e.columns, self.boxes),
            "slot_entries": self.entries, "tile_list": plan.tile_list, "block_slot": plan.block_slot,
            "block_tiles": plan.block_tiles, "block_first": plan.block_first, "de": live.de,
            "order": live.order, "row_order": live.row_order, "keep": live.keep, "live_count": plan.live_count,
            "block_list": plan.block_list, "slot_list": plan.slot_list, "chunk_start": plan.chunk_start,
            "counters": counters, "mass_e": live.mass_e, "norm": live.norm,
            "dc": None if dc is None else matrix(dc, of_c.rows, of_c.columns, dc_tma),
            "N": n, "V": self.v, "D": d, "T": self.tiles, "blocks": self.blocks,
            "stride_en": e.stride(0), "stride_ed": e.stride(1), "stride_cv": c.stride(0),
            "stride_cd": c.stride(1), "stride_dc": d, "DE": live.de is not None, "DC": dc is not None,
            "SORTED": live.sorted_rows, "DZ_TMA": self.dz_tma, "C_TMA": self.boxes, "E_TMA": e_tma,
            "DC_TMA": dc_tma, "EVEN_D": d % of_e.columns == 0,
            "DOT": dot_dtype(e.dtype), "PRECISION": precision_of(live.formula), "ORDER": live.order is not None,
            "COMPENSATE": live.mass_e is not None, "NORM": live.norm is not None,
            "WIDE": needs_wide(c) or (dc is not None and needs_wide(dc)), "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v, "E_BLOCK_D": of_e.columns, "E_BLOCK_K": of_e.depth, "E_STAGES": of_e.stages,
            "C_BLOCK_M": of_c.rows, "C_BLOCK_D": of_c.columns, "C_BLOCK_K": of_c.depth, "C_STAGES": of_c.stages,
        }  # fmt: skip
        return Repeated(products_kernel, (self.launch.programs,), arguments, num_warps=of_c.warps)

    def dbias(self) -> Repeated:
        """Compute dbias of the chunk's entries."""
        live, plan = self.live, self.live.plan
        arguments = {
            "dbias_slots": live.column_sums, "order": live.order, "live_count": plan.live_count,
            "block_list": plan.block_list, "slot_list": plan.slot_list, "chunk_start": plan.chunk_start,
            "mass": live.mass, "norm": live.norm, "dbias": live.dbias, "V": self.v, "blocks": self.blocks,
            "ORDER": live.order is not None, "COMPENSATE": live.mass is not None, "NORM": live.norm is not None,
            "BLOCK_V": self.block_v,
        }  # fmt: skip
        return Repeated(dbias_kernel, (self.launch.programs,), arguments)
