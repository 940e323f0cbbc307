"""The numba backend's kernels, as the contract of ``cce/backends/gpu/kernels.py`` requires them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cce.backends.gpu.arrays import DeadMass, Dense, Formula, GradientOfWindow, Live, Sizes, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.sizes import ALIGNMENT, padded
from cce.backends.numba import compensation
from cce.backends.numba.choice import KINDS, Choice, choose, gpu_of
from cce.backends.numba.compile import gradient_kernel, statistics_kernel, target_logits_kernel
from cce.backends.numba.live import launches
from cce.backends.numba.operands import pieces_of, pitch_of, with_rest
from cce.backends.numba.options import Gradient, Statistics, Targets
from cce.backends.problem import Problem
from cce.spec import Spec


class NumbaKernels(Kernels):
    """Kernels compiled for the options of a call, at the first such call."""

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        # Kernels count 16 bytes at a time, in 32 bits.
        pieces = padded(problem.d, problem.dtype) * problem.dtype.itemsize // ALIGNMENT
        return [
            f"{name} of {rows} x {problem.d} takes 2**35 bytes or more: its kernels cannot count them"
            for name, rows in (("e", problem.n), ("c", problem.v))
            if rows * pieces >= 2**31
        ]

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        choice = _choice(problem, spec, True)
        return Sizes(
            choice.forward.rows, choice.forward.columns, choice.gradient.rows, choice.gradient.columns, choice.pack,
            choice.programs,
        )  # fmt: skip

    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        e, c, formula, splits, tiles = window.e, window.c, window.formula, window.splits, window.tiles
        tile = _choice(problem, spec, formula.ieee).forward
        kernel = statistics_kernel(
            Statistics(
                tile, bias=formula.bias is not None, scale=formula.scale != 1, softcap=formula.softcap is not None,
                online=spec.lse_accumulation == "online", entropy=splits.gap is not None,
                weighted=splits.weighted is not None, prediction=splits.best is not None, maps=tiles is not None,
                tile_entropy=tiles is not None and tiles.entropy is not None,
                block_v=(spec.block_v or 0) if tiles is not None else 0,
            )
        )  # fmt: skip
        n, count = len(e), len(splits.max)
        maps = (None, None, None) if tiles is None else (tiles.max, tiles.log_sum, tiles.entropy)
        kernel(
            -(-n // tile.rows) * count, e, c, formula.bias, window.weight, splits.max, splits.sum, splits.gap,
            splits.weighted, splits.best, *maps, n, len(c), pieces_of(e), pitch_of(e), pitch_of(c), count,
            window.first // tile.columns, formula.scale, formula.softcap or 0.0,
        )  # fmt: skip

    def target_logits(self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor) -> None:
        simulated = gpu_of(e.device.type).simulated
        options = Targets(
            KINDS.get(e.dtype, "ieee"), KINDS.get(c.dtype, "ieee"), bias=formula.bias is not None,
            scale=formula.scale != 1, softcap=formula.softcap is not None, warps=1 if simulated else 4,
        )  # fmt: skip
        blocks = 1 if simulated else -(-targets.numel() // 4)
        target_logits_kernel(options)(
            blocks, e, c, formula.bias, targets, out, len(e), targets.shape[1], e.shape[1], *e.stride(), *c.stride(),
            formula.scale, formula.softcap or 0.0,
        )  # fmt: skip

    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        e, formula, rows, weight = dense.e, dense.formula, with_rest(dense.rows), dense.weight
        choice = _choice(problem, spec, formula.ieee)
        tile = choice.gradient
        kernel = gradient_kernel(
            Gradient(
                tile, bias=formula.bias is not None, scale=formula.scale != 1, softcap=formula.softcap is not None,
                entropy=rows.h is not None, weighted=weight is not None, sums=dense.column_sums,
                one_target=problem.k == 1,
            )
        )  # fmt: skip
        blocks = -(-len(e) // tile.rows)

        def window(c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
            # Arguments are packed anew for each window: this takes less time than the kernels.
            columns = slice(first, first + len(c))
            bias, u = (None if x is None else x[columns] for x in (formula.bias, weight))
            kernel(
                min(blocks * -(-len(c) // tile.columns), choice.programs), e, c, bias, u, dz, column_sums, rows.lse,
                rows.entropy, rows.a, rows.g, rows.h, rows.s, rows.targets, len(e), len(c), problem.k, pieces_of(e),
                pitch_of(e), pitch_of(c), dz.stride(0), first, formula.scale, formula.softcap or 0.0,
            )  # fmt: skip

        return window

    def mean_rows(self, problem: Problem, spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
        compensation.mean_rows(spec, c, order, out)

    def dead_mass(self, problem: Problem, spec: Spec, mass: DeadMass) -> bool:
        compensation.dead_mass(problem, spec, mass)
        return True

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        steps = launches(problem, spec, live, _choice(problem, spec, live.formula.ieee))

        def chunk(number: int) -> None:
            for launch in steps:
                launch(number)

        return chunk


def _choice(problem: Problem, spec: Spec, ieee: bool) -> Choice:
    return choose(problem, spec, gpu_of(problem.device), ieee)
