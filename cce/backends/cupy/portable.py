"""The kernels for every GPU, option, dtype and block size: ``cp.async``, ``ldmatrix`` and ``mma.sync``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cce.backends.cupy import arguments as structs
from cce.backends.cupy import compensation, lists
from cce.backends.cupy import rows as row_kernels
from cce.backends.cupy.dense import set_window, tensors_of
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Launch, strided
from cce.backends.cupy.one_pass import PortableOnePass
from cce.backends.cupy.variants import (
    TARGET_THREADS,
    THREADS,
    TILE_N,
    TILE_V,
    gradient_variant,
    live_variant,
    products_variants,
    statistics_variant,
    targets_variant,
)
from cce.backends.gpu.arrays import DeadMass, Dense, Formula, GradientOfWindow, Live, Rows, Sizes, Splits, Tiles, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.plan import Plan
from cce.backends.gpu.sizes import cdiv
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.spec import Spec


class PortableKernels(Kernels):
    """Kernels with tiles of 128 x 128, or 128 x 256 where a vocabulary block has 256 columns."""

    def __init__(self) -> None:
        self._one_pass: OnePassKernels = PortableOnePass()

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return []

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        wide = problem.maps(spec) and (spec.block_v or 0) > TILE_V
        pack = max(1, TILE_V // (spec.block_v or TILE_V))
        return Sizes(TILE_N, 2 * TILE_V if wide else TILE_V, TILE_N, TILE_V, pack, 2 * Gpu.current().processors)

    def one_pass(self) -> OnePassKernels:
        return self._one_pass

    def target_logits(self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor) -> None:
        n, k = targets.shape
        arguments = structs.TargetsArguments(
            e=strided(e), c=strided(c), stride_en=e.stride(0), stride_ed=e.stride(1), stride_cv=c.stride(0),
            stride_cd=c.stride(1), bias=formula.bias, targets=targets, out=out, formula=structs.Formula.of(formula),
            D=e.shape[1], K=k,
        )  # fmt: skip
        variant = targets_variant(Gpu.current(), e.dtype, c.dtype, formula)
        Launch(variant, n * k, TARGET_THREADS, arguments)()

    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        e, c, formula, splits, tiles = window.e, window.c, window.formula, window.splits, window.tiles
        number = len(splits.max)
        arguments = structs.StatisticsArguments(
            e=structs.Matrix.of(e), c=structs.Matrix.of(c), bias=formula.bias, weight=window.weight,
            splits=structs.Splits.of(splits), tiles=structs.Tiles.of(tiles), formula=structs.Formula.of(formula),
            N=len(e), V=len(c), first=window.first, S=number,
        )  # fmt: skip
        columns = self.sizes(problem, spec).forward_columns
        variant = statistics_variant(Gpu.current(), e.dtype, formula, spec, splits, tiles, columns)
        Launch(variant, cdiv(len(e), TILE_N) * number, THREADS, arguments)()

    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        blocks = cdiv(len(dense.e), TILE_N)
        arguments = structs.GradientArguments(
            e=structs.Matrix.of(dense.e), rows=structs.Rows.of(dense.rows), formula=structs.Formula.of(dense.formula),
            N=len(dense.e),
        )  # fmt: skip
        launch = Launch(gradient_variant(Gpu.current(), dense), 0, THREADS, arguments, tensors_of(dense))

        def window(c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
            arguments.c, arguments.pitch_dz = structs.Matrix.of(c), dz.stride(0)
            set_window(arguments, dense, c, first, dz, column_sums)
            launch.grid = blocks * cdiv(c.shape[0], TILE_V), 1
            launch()

        return window

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        launches = _launches(problem, spec, live, self.sizes(problem, spec).pack)

        def chunk(number: int) -> None:
            for launch in launches:
                launch.arguments.chunk = number
                launch()

        return chunk

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        compensation.mean_rows(spec, c, order, out)

    def dead_mass(self, problem: Problem, spec: Spec, mass: DeadMass) -> bool:
        compensation.dead_mass(problem, spec, mass)
        return True

    def joined(
        self, splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return row_kernels.joined(splits, target_logits, targets, in_use)

    def fill_maps(
        self,
        problem: Problem,
        spec: Spec,
        lse: Tensor,
        lse_low: Tensor,
        in_use: Tensor,
        tiles: Tiles,
        maps: Maps[Tensor],
    ) -> bool:
        row_kernels.fill_maps(spec, lse, lse_low, in_use, tiles, maps)
        return True

    def work_list(
        self,
        inputs: Inputs[Tensor],
        problem: Problem,
        spec: Spec,
        rows: Rows,
        maps: Maps[Tensor],
        upstream: Upstream[Tensor],
    ) -> Work:
        return lists.work_list(inputs, problem, spec, rows, maps, upstream)

    def plan(self, live: Tensor, slots: int, pack: int) -> Plan:
        return lists.plan(live, slots, pack)

    def gather_rows(self, e: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
        row_kernels.gather_rows(e, row_order, keep, out)

    def scatter_rows(
        self, spec: Spec, total: Tensor, norm: Tensor | None, row_order: Tensor, keep: Tensor, out: Tensor
    ) -> None:
        row_kernels.scatter_rows(total, norm, row_order, out)
        out.masked_fill_(~keep[:, None], 0)


def rows_of_places(live: Live) -> Tensor:
    """Row at each place of the work list, or -1: one read instead of two, ahead of the product that needs it."""
    if live.row_of is not None:
        return live.row_of
    return torch.where(live.keep[live.row_order], live.row_order, -1).to(torch.int32)


def _launches(problem: Problem, spec: Spec, live: Live, pack: int) -> list[Launch]:
    """Launches of a chunk: dx of its live tiles, both products, dbias."""
    row_of = rows_of_places(live)
    launches = [_dx(problem, spec, live, row_of, pack)]
    if live.de is not None or live.dc is not None or live.dbias is not None:
        launches += _products(problem, spec, live, row_of)
    return launches


def _dx(problem: Problem, spec: Spec, live: Live, row_of: Tensor, pack: int) -> Launch:
    gpu, plan = Gpu.current(), live.plan
    arguments = structs.LiveArguments(
        e=structs.Matrix.of(live.e), c=structs.Matrix.of(live.c), order=live.order, bias=live.formula.bias,
        rows=structs.Rows.of(live.rows), row_of=row_of, tile_list=plan.tile_list, item_block=plan.item_block,
        item_first=plan.item_first, item_slot=plan.item_slot, item_tiles=plan.item_tiles, items=plan.items, dz=live.dz,
        column_sums=live.column_sums, formula=structs.Formula.of(live.formula), N=problem.n, V=len(live.c),
        T=plan.tile_list.shape[1], max_items=plan.item_block.shape[1],
    )  # fmt: skip
    grid = min(plan.max_items, 2 * gpu.processors)
    return Launch(live_variant(gpu, spec, live, pack), grid, THREADS, arguments, [row_of])


def _products(problem: Problem, spec: Spec, live: Live, row_of: Tensor) -> list[Launch]:
    gpu, plan = Gpu.current(), live.plan
    counters = torch.zeros(plan.chunks, 2, dtype=torch.int32, device=live.e.device)
    tables = ("tile_list", "block_slot", "block_tiles", "block_first", "live_count", "block_list", "slot_list")
    arguments = structs.ProductsArguments(
        dz=live.dz, e=structs.Matrix.of(live.e), c=structs.Matrix.of(live.c), order=live.order, row_of=row_of,
        **{name: getattr(plan, name) for name in tables}, de=live.de, chunk_start=plan.chunk_start, counters=counters,
        mass_e=live.mass_e, mass=live.mass, norm=live.norm, dc=live.dc, column_sums=live.column_sums, dbias=live.dbias,
        N=problem.n, V=len(live.c), D=live.e.shape[1], T=plan.tile_list.shape[1], blocks=plan.tile_list.shape[0],
        dc_columns=0 if live.dc is None else live.dc.shape[1],
    )  # fmt: skip
    products, dbias = products_variants(gpu, spec, live)
    launches = []
    if live.de is not None or live.dc is not None:
        launches.append(Launch(products, 2 * gpu.processors, THREADS, arguments, [row_of, counters]))
    if live.dbias is not None:
        launches.append(Launch(dbias, gpu.processors, THREADS, arguments, [row_of, counters]))
    return launches
