"""The kernels for sm_90 and 16-bit operands (cuda/sm90): bulk copies and ``wgmma``; some warps load, others multiply.

Cases these kernels do not cover run on the portable kernels: float32, blocks of the filter other than 128 x 128 in the
filtered backward, its dbias, and rows of ``e`` that were not copied into the work list's order.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_longlong, c_ubyte, c_uint, c_void_p

import torch
from torch import Tensor

from cce.backends.cupy import arguments as structs
from cce.backends.cupy.ahead import AheadArguments
from cce.backends.cupy.dense import set_window, tensors_of
from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Arguments, Launch, strided
from cce.backends.cupy.portable import PortableKernels, rows_of_places
from cce.backends.cupy.sm90_one_pass import Sm90OnePass
from cce.backends.cupy.sm90_tiles import THREADS, TILE_N, TILE_V, cluster_of, grid_of, is_served, variant_of
from cce.backends.cupy.tensor_maps import TensorMap, boxes
from cce.backends.cupy.variants import dense_macros, rows_macros
from cce.backends.gpu.arrays import Dense, GradientOfWindow, Live, Sizes, Window
from cce.backends.gpu.library import Ahead
from cce.backends.gpu.sizes import cdiv, place_of_copy
from cce.backends.problem import Problem
from cce.spec import Spec

BLOCK = 128  # of the filter, in rows and columns


class StatisticsArguments(Arguments):
    """Arguments of sm90/statistics.cu."""

    _fields_ = (
        ("e_map", TensorMap), ("c_map", TensorMap), ("bias", c_void_p), ("weight", c_void_p),
        ("splits", structs.Splits), ("tiles", structs.Tiles), ("formula", structs.Formula),
        *((name, c_int) for name in ("N", "V", "D", "S", "first", "carry")), ("ahead", AheadArguments),
        ("padding", c_ubyte * 64),
    )  # fmt: skip


class GradientArguments(Arguments):
    """Arguments of sm90/gradient.cu."""

    _fields_ = (
        ("e_map", TensorMap), ("c_map", TensorMap), ("bias", c_void_p), ("weight", c_void_p), ("rows", structs.Rows),
        ("dz", c_void_p), ("column_sums", c_void_p), ("pitch", c_longlong), ("formula", structs.Formula),
        *((name, c_int) for name in ("N", "V", "D", "first")), ("padding", c_ubyte * 64),
    )  # fmt: skip


_TABLES = (
    "tile_list", "live_count", "block_list", "slot_list", "chunk_start", "block_slot", "block_tiles", "block_first",
    "item_block", "item_first", "item_slot", "item_tiles", "items",
)  # fmt: skip


class PlanArguments(Arguments):
    """Struct ``Plan`` of sm90/live.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in _TABLES), *((name, c_int) for name in ("max_items", "T", "B"))
    )  # fmt: skip


class LiveArguments(Arguments):
    """Arguments of sm90/live.cu."""

    _fields_ = (
        *((name, TensorMap) for name in ("e_map", "c_map", "dz_map")), ("plan", PlanArguments), ("rows", structs.Rows),
        ("order", c_void_p), ("row_of", c_void_p), ("c_rows", c_void_p), ("c_pieces", c_uint),
        *((name, c_void_p) for name in ("bias", "dz", "de", "dc", "mass_e", "norm", "counters")),
        ("formula", structs.Formula),
        *((name, c_int) for name in ("N", "V", "D", "width", "first_chunk", "last_chunk", "phases")),
        ("padding", c_ubyte * 64),
    )  # fmt: skip


class Sm90Kernels(PortableKernels):
    """Kernels with tiles of 128 x 256, whose thread blocks work in pairs that share loads of ``c``."""

    def __init__(self) -> None:
        super().__init__()
        self._one_pass = Sm90OnePass()

    def sizes(self, problem: Problem, spec: Spec) -> Sizes:
        if not is_served(problem.dtype):
            return super().sizes(problem, spec)
        cluster = cluster_of(problem.n)
        pack = TILE_V // BLOCK if _live_is_served(problem, spec) else super().sizes(problem, spec).pack
        programs = Gpu.current().processors // cluster
        return Sizes(cluster * TILE_N, TILE_V, TILE_N // 2, TILE_V, pack, programs)

    def statistics(self, problem: Problem, spec: Spec, window: Window) -> None:
        if is_served(window.e.dtype):
            self._statistics(spec, window, None)
        else:
            super().statistics(problem, spec, window)

    def gathers_ahead(self, problem: Problem) -> bool:
        return is_served(problem.dtype)

    def statistics_ahead(self, problem: Problem, spec: Spec, window: Window, ahead: Ahead) -> None:
        self._statistics(spec, window, ahead)

    def _statistics(self, spec: Spec, window: Window, ahead: Ahead | None) -> None:
        e, c, formula, splits, tiles = window.e, window.c, window.formula, window.splits, window.tiles
        number, cluster = len(splits.max), cluster_of(len(e))
        arguments = StatisticsArguments(
            e_map=boxes(e, TILE_N), c_map=boxes(c, TILE_V // cluster), bias=formula.bias, weight=window.weight,
            splits=structs.Splits.of(splits), tiles=structs.Tiles.of(tiles), formula=structs.Formula.of(formula),
            N=len(e), V=len(c), D=e.shape[1], S=number, first=window.first, carry=window.first > 0,
            ahead=AheadArguments.of(ahead),
        )  # fmt: skip
        macros: dict[str, int] = {
            "ENTROPY": splits.gap is not None, "WEIGHTED": splits.weighted is not None,
            "PREDICTION": splits.best is not None,
        }  # fmt: skip
        if tiles is not None:
            macros |= {
                "MAPS": True, "TILE_ENTROPY": tiles.entropy is not None,
                "ONLINE": spec.lse_accumulation == "online", "BLOCK_V": spec.block_v or 0,
            }  # fmt: skip
        variant = variant_of("statistics", cluster, e.dtype, formula, macros, splits.weighted is not None)
        Launch(variant, grid_of(cdiv(len(e), cluster * TILE_N) * number, cluster), THREADS, arguments)()

    def gradient(self, problem: Problem, spec: Spec, dense: Dense) -> GradientOfWindow:
        e, formula = dense.e, dense.formula
        if not is_served(e.dtype):
            return super().gradient(problem, spec, dense)
        n, d = e.shape
        cluster = cluster_of(n)
        blocks, box = cdiv(n, cluster * TILE_N), TILE_V // cluster
        arguments = GradientArguments(
            e_map=boxes(e, TILE_N), rows=structs.Rows.of(dense.rows), formula=structs.Formula.of(formula), N=n, D=d
        )
        columns = dense.column_sums + (dense.weight is not None)
        variant = variant_of("gradient", cluster, e.dtype, formula, dense_macros(dense), columns)
        launch = Launch(variant, 0, THREADS, arguments, tensors_of(dense))

        def window(c: Tensor, first: int, dz: Tensor, column_sums: Tensor | None) -> None:
            arguments.c_map, arguments.pitch = boxes(c, box), dz.stride(0)
            set_window(arguments, dense, c, first, dz, column_sums)
            launch.grid = grid_of(blocks * cdiv(c.shape[0], TILE_V), cluster), 1
            launch()

        return window

    def live(self, problem: Problem, spec: Spec, live: Live) -> Callable[[int], None]:
        if not _live_is_served(problem, spec) or not live.sorted_rows:
            return super().live(problem, spec, live)
        counters = torch.zeros(live.plan.chunks, 3, dtype=torch.int32, device=live.e.device)
        launch = _live_launch(problem, live, counters)

        def chunk(number: int) -> None:
            """Compute all chunks at once, at the call for the first."""
            if number == 0:
                launch()

        return chunk


def _live_launch(problem: Problem, live: Live, counters: Tensor) -> Launch:
    plan, gathered = live.plan, live.order is not None
    blocks, tiles = plan.tile_list.shape
    row_of = rows_of_places(live)
    arguments = LiveArguments(
        e_map=boxes(live.e, 64), c_map=boxes(live.c, 64), dz_map=boxes(live.dz.view(-1, BLOCK), 64),
        plan=PlanArguments(
            **{name: getattr(plan, name) for name in _TABLES}, max_items=plan.item_block.shape[1], T=tiles, B=blocks
        ),
        rows=structs.Rows.of(live.rows), order=live.order, row_of=row_of, c_rows=strided(live.c),
        c_pieces=live.c.stride(0) * live.c.element_size() // 16, bias=live.formula.bias, dz=live.dz, de=live.de,
        dc=live.dc, mass_e=live.mass_e, norm=live.norm, counters=counters, formula=structs.Formula.of(live.formula),
        N=problem.n, V=len(live.c), D=live.e.shape[1], width=0 if live.dc is None else live.dc.shape[1], first_chunk=0,
        last_chunk=plan.chunks, phases=1 if live.de is None and live.dc is None else 3,
    )  # fmt: skip
    macros = rows_macros(live.rows) | {"GATHER": gathered}
    # The multiplying warps' columns hold the bias of an item, or the dead tiles' mass of a product.
    variant = variant_of("live", 1, live.e.dtype, live.formula, macros, gathered + (live.formula.bias is None))
    return Launch(variant, Gpu.current().processors, THREADS, arguments, (row_of, counters), cooperative=True)


def _live_is_served(problem: Problem, spec: Spec) -> bool:
    """Whether these kernels serve the filtered backward, from metadata alone."""
    blocks = spec.block_n == BLOCK and spec.block_v == BLOCK
    pieces = problem.d % 8 == 0  # rows of dC are whole pieces of 16 bytes
    copied = place_of_copy(problem, spec, PortableKernels.rows_in_scratch) != "nowhere"
    return is_served(problem.dtype) and blocks and pieces and copied and not problem.grad_bias
