"""The triton backend's kernels, as the contract of ``cce/backends/gpu/kernels.py`` requires them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from cce.backends.gpu.arrays import (
    DeadMass,
    Dense,
    Formula,
    GradientOfWindow,
    Live,
    Rows,
    Sizes,
    Splits,
    Tiles,
    Window,
)
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.plan import Plan
from cce.backends.gpu.sizes import cdiv
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.triton import compensation, lists, rows
from cce.backends.triton.choice import launch_of
from cce.backends.triton.kernels.gradient import gradient_kernel
from cce.backends.triton.kernels.statistics import statistics_kernel
from cce.backends.triton.kernels.targets import target_logits_kernel
from cce.backends.triton.live import launches_of_chunk
from cce.backends.triton.one_pass import TritonOnePass
from cce.backends.triton.operands import Operands, matrix, needs_wide, targets_arguments, values_of
from cce.backends.triton.repeat import Repeated
from cce.spec import Spec

if triton.knobs.runtime.interpret:
    from cce.backends.triton.triton_private import correct_bfloat16

    correct_bfloat16()


class TritonKernels(Kernels):
    """Kernels compiled by Triton for the options of a call, at the first such call."""

    any_layout = True
    # Gemma 2's rows take a third of the default scratch memory, and larger models' fit into dE's: more would leave the
    # live tiles too few slots.
    rows_in_scratch = 1 / 3

    def __init__(self) -> None:
        self._one_pass = TritonOnePass()

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return []

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        launch = launch_of(problem, spec)
        pack = max(1, launch.sparse.columns // (spec.block_v or launch.sparse.columns))
        forward, dense = launch.forward, launch.dense
        return Sizes(forward.rows, forward.columns, dense.rows, dense.columns, pack, launch.programs)

    def one_pass(self) -> OnePassKernels:
        return self._one_pass

    def target_logits(self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor) -> None:
        arguments = targets_arguments(e, c, targets.shape[1], formula, False)
        target_logits_kernel[tuple(targets.shape)](e, c, formula.bias, targets, out, None, **arguments)

    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        launch, splits, tiles, n = launch_of(problem, spec), window.splits, window.tiles, len(window.e)
        tile = launch.forward
        factors = Operands.of(launch, tile, window.e, window.c)
        block_v = tile.columns if tiles is None else spec.block_v
        in_use = splits.max.new_ones(n, dtype=torch.bool) if window.in_use is None else window.in_use
        maps = (None, None, None) if tiles is None else (tiles.max, tiles.log_sum, tiles.entropy)
        statistics_kernel[(cdiv(n, tile.rows) * len(splits.max),)](
            **factors.matrices, **factors.arguments(window.formula), bias=window.formula.bias, weight=window.weight,
            in_use=in_use, split_max=splits.max, split_sum=splits.sum, split_gap=splits.gap,
            split_weighted=splits.weighted, split_best=splits.best,
            **dict(zip(("tile_max", "tile_log_sum", "tile_entropy"), maps, strict=True)),
            N=n, V=len(window.c), stride_t=n, SPLITS=len(splits.max), first_tile=window.first // tile.columns,
            CARRY=window.first > 0, ONLINE=spec.lse_accumulation == "online",
            ENTROPY=splits.gap is not None, WEIGHTED=splits.weighted is not None, PREDICTION=splits.best is not None,
            MAPS=tiles is not None, TILE_ENTROPY=maps[2] is not None, BLOCK_N=tile.rows,
            TILE_V=tile.columns, BLOCK_V=block_v, BLOCK_D=tile.depth, GROUP_N=launch.group_n, FLATTEN=tile.flatten,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def outputs(
        self,
        problem: Problem,
        splits: Splits,
        target_logits: Tensor,
        targets: Tensor,
        in_use: Tensor,
        order: Tensor | None,
    ) -> Outputs[Tensor]:
        return rows.outputs(problem, splits, target_logits, targets, in_use, order)

    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        launch, e, formula = launch_of(problem, spec), dense.e, dense.formula
        tile, n = launch.dense, len(e)
        programs = min(launch.programs, cdiv(n, tile.rows) * cdiv(problem.v, tile.columns))
        step: Repeated | None = None
        factors: Operands | None = None

        def window(c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
            nonlocal step, factors
            columns = slice(first, first + len(c))
            if step is None or factors is None:  # all windows have the same strides
                factors = Operands.of(launch, tile, e, c)
                wide = needs_wide(e) or problem.v * c.stride(0) + problem.d * c.stride(1) >= 2**31
                step = Repeated(gradient_kernel, (programs,), {
                    **factors.arguments(formula, wide), **values_of(dense.rows), "e": factors.matrices["e"],
                    "s": dense.rows.s, "N": n, "WEIGHTED": dense.weight is not None, "DBIAS": column_sums is not None,
                    "DZ_TMA": launch.tma, "BLOCK_N": tile.rows, "TILE_V": tile.columns, "BLOCK_D": tile.depth,
                    "GROUP_N": launch.group_n, "FLATTEN": tile.flatten,
                }, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
            step(
                c=factors.c_matrix(c), bias=None if formula.bias is None else formula.bias[columns],
                weight=None if dense.weight is None else dense.weight[columns],
                dz=matrix(dz, tile.rows, tile.columns, launch.tma), dbias=column_sums, stride_dz=dz.stride(0),
                first=first, columns=len(c),
            )  # fmt: skip

        return window

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        return launches_of_chunk(problem, spec, live, launch_of(problem, spec))

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        compensation.mean_rows(spec, c, order, out)

    def dead_mass(self, problem: Problem, spec: Spec, mass: DeadMass) -> bool:
        compensation.dead_mass(problem, spec, mass)
        return True

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
        rows.fill_maps(spec, lse, lse_low, in_use, tiles, maps)
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
        rows.gather_rows(e, row_order, keep, out)

    def scatter_rows(
        self, spec: Spec, total: Tensor, norm: Tensor | None, row_order: Tensor, keep: Tensor, out: Tensor
    ) -> None:
        rows.scatter_rows(total, norm, row_order, keep, out)

    def add_rank_one(self, spec: Spec, out: Tensor, u: Tensor, total: Tensor) -> None:
        rows.add_rank_one(out, u, total)
