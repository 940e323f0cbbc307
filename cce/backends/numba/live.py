"""Launches of a filtered backward: dx of a chunk's live tiles, and their sums dE, dC and dbias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cce.backends.gpu.arrays import Live
from cce.backends.numba.choice import KINDS, Choice
from cce.backends.numba.compile import dbias_kernel, live_kernel, products_kernel
from cce.backends.numba.launch import Kernel, prepare_all
from cce.backends.numba.operands import pieces_of, pitch_of, with_rest
from cce.backends.numba.options import Gradient, Product, Sums
from cce.backends.problem import Problem
from cce.spec import Spec

_Launch = tuple[Kernel, int, tuple[Any, ...]]  # kernel, number of thread blocks, arguments


def launches(problem: Problem, spec: Spec, live: Live, choice: Choice) -> list[Callable[..., None]]:
    """Launches of a chunk; each is called with the chunk's number."""
    found = [_dx(problem, spec, live, choice)]
    de = None if live.de is None else _product(spec, live, choice, "de")
    dc = None if live.dc is None else _product(spec, live, choice, "dc")
    if de is not None and dc is not None and de.tile.threads == dc.tile.threads:
        found.append(_sums(problem, spec, live, choice, Sums(de, dc)))
    else:
        found += [_sums(problem, spec, live, choice, Sums(de, None))] if de is not None else []
        found += [_sums(problem, spec, live, choice, Sums(None, dc))] if dc is not None else []
    if live.dbias is not None:
        found.append(_dbias(problem, spec, live, choice))
    return prepare_all(found)


def _dx(problem: Problem, spec: Spec, live: Live, choice: Choice) -> _Launch:
    plan, formula, rows = live.plan, live.formula, with_rest(live.rows)
    kernel = live_kernel(
        Gradient(
            choice.live, bias=formula.bias is not None, scale=formula.scale != 1, softcap=formula.softcap is not None,
            entropy=rows.h is not None, sums=live.column_sums is not None, one_target=problem.k == 1,
            ordered=live.order is not None, sorted=live.sorted_rows, block_n=spec.block_n or 0,
            block_v=spec.block_v or 0,
        )
    )  # fmt: skip
    return kernel, min(choice.programs, plan.max_items), (
        live.e, live.c, formula.bias, live.order, live.row_order, live.keep,
        live.dz, live.column_sums, plan.tile_list, plan.item_block, plan.item_first, plan.item_slot, plan.item_tiles,
        plan.items, rows.lse, rows.entropy, rows.a, rows.g, rows.h, rows.targets, problem.n, len(live.c),
        spec.tiles(len(live.c)), problem.k, pieces_of(live.e), pitch_of(live.e), pitch_of(live.c), plan.max_items,
        formula.scale, formula.softcap or 0.0, 0,
    )  # fmt: skip


def _product(spec: Spec, live: Live, choice: Choice, name: str) -> Product:
    assert spec.block_n is not None and spec.block_v is not None
    tile = choice.de if name == "de" else choice.dc
    if name == "de":
        return Product(tile, spec.block_n, spec.block_v, ordered=live.order is not None)
    assert live.dc is not None
    return Product(
        tile, spec.block_n, spec.block_v, out=KINDS.get(live.dc.dtype, "ieee"), ordered=live.order is not None,
        sorted=live.sorted_rows, compensate=live.mass_e is not None, norm=live.norm is not None,
    )  # fmt: skip


def _sums(problem: Problem, spec: Spec, live: Live, choice: Choice, options: Sums) -> _Launch:
    plan, e, c = live.plan, live.e, live.c
    drawn = torch.zeros(plan.chunks, dtype=torch.int32, device=e.device)
    return products_kernel(options), choice.programs * options.resident, (
        drawn, live.dz, e, c, live.order, live.row_order, live.keep,
        plan.tile_list, plan.block_slot, plan.block_tiles, plan.block_first, plan.live_count, plan.block_list,
        plan.slot_list, plan.chunk_start, live.mass_e, live.norm, live.de, live.dc, problem.n, len(c), e.shape[1],
        spec.tiles(len(c)), 0 if live.dc is None else live.dc.shape[1], plan.block_list.shape[1], pieces_of(e),
        pitch_of(e), pitch_of(c), 0,
    )  # fmt: skip


def _dbias(problem: Problem, spec: Spec, live: Live, choice: Choice) -> _Launch:
    assert spec.block_n is not None and spec.block_v is not None
    plan = live.plan
    options = Product(
        choice.dc, spec.block_n, spec.block_v, ordered=live.order is not None, compensate=live.mass is not None,
        norm=live.norm is not None,
    )  # fmt: skip
    return dbias_kernel(options), choice.programs, (
        live.column_sums, live.order, plan.live_count, plan.slot_list, plan.chunk_start, live.mass,
        live.norm, live.dbias, len(live.c), plan.block_list.shape[1], 0,
    )  # fmt: skip
