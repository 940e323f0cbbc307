"""The work list and the plan of a filtered backward, in a few kernels (cuda/lists.cu, cuda/lists_plan.cu)."""

from __future__ import annotations

import math
from ctypes import c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import Arguments, Launch, strided
from cce.backends.cupy.module import Variant
from cce.backends.gpu.arrays import Rows
from cce.backends.gpu.plan import Plan, shapes
from cce.backends.gpu.sizes import cdiv, row_blocks
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.spec import Spec

_THREADS, _TILES_THREADS = 256, 1024
_WARPS = _THREADS // 32
#: Most rows that are sorted by comparing all with all; beyond this, torch's sort takes less time.
MOST_RANKED = 2**14


class WorkArguments(Arguments):
    """Arguments of lists.cu."""

    _fields_ = (
        ("tile_mass", c_void_p), ("pitch_mass", c_longlong),
        *((name, c_void_p) for name in (
            "a", "g", "h", "places", "in_use", "hits", "counts", "keep", "row_order", "row_of", "live",
        )),
        *((name, c_int) for name in ("N", "T", "K", "B", "block_n", "block_v", "by_count")),
    )  # fmt: skip


_TABLES = (
    "tile_list", "live_count", "block_list", "slot_list", "chunk_start", "block_slot", "block_tiles", "block_first",
    "item_block", "item_first", "item_slot", "item_tiles", "items",
)  # fmt: skip


class PlanArguments(Arguments):
    """Arguments of lists_plan.cu."""

    _fields_ = (
        *((name, c_void_p) for name in ("live", "before", "chunk_of", *_TABLES)),
        *((name, c_int) for name in ("T", "B", "chunks", "slots", "step", "pack")),
    )  # fmt: skip


def work_variant(gpu: Gpu, name: str, half: bool) -> Variant:
    """Variant of a kernel of lists.cu; ``half``: the maps are float16."""
    return Variant("lists.cu", f"{name}_kernel", (("MAP_HALF", 1),) if half else (), gpu.architecture, 0)


def plan_variant(gpu: Gpu, name: str) -> Variant:
    """Variant of a kernel of lists_plan.cu."""
    return Variant("lists_plan.cu", f"{name}_kernel", (), gpu.architecture, 0)


def work_list(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, rows: Rows, maps: Maps[Tensor], upstream: Upstream[Tensor]
) -> Work:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.work_list`."""
    mass, n, device = maps.tile_mass, problem.n, rows.lse.device
    assert mass is not None
    tiles, blocks, by_count = len(mass), row_blocks(problem, spec), spec.row_order == "live" and spec.block_n != 1
    words = cdiv(tiles, 32)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def flags(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device=device)

    counts = torch.zeros(n, dtype=torch.int32, device=device)
    work = Work(torch.empty(n, dtype=torch.int64, device=device), flags(n), flags(tiles, blocks), ints(n))
    given = (upstream.a.contiguous(), upstream.g.contiguous(), None if upstream.h is None else upstream.h.contiguous())
    in_use, hits = used_rows(inputs).contiguous(), ints(words, n)
    arguments = WorkArguments(
        tile_mass=strided(mass), pitch_mass=mass.stride(0), a=given[0], g=given[1], h=given[2], places=rows.targets,
        in_use=in_use, hits=hits, counts=counts, keep=work.keep, row_order=work.row_order, row_of=work.row_of,
        live=work.live, N=n, T=tiles, K=problem.k, B=blocks, block_n=spec.block_n, block_v=spec.block_v,
        by_count=by_count,
    )  # fmt: skip
    gpu, half = Gpu.current(), mass.dtype == torch.float16

    def launch(name: str, *grid: int) -> None:
        Launch(work_variant(gpu, name, half), (grid[0], math.prod(grid[1:])), _THREADS, arguments)()

    launch("hits", cdiv(n, _THREADS), words)
    if n <= MOST_RANKED:
        launch("rank", cdiv(n, 32))
    else:
        work.row_order.copy_(counts.argsort(stable=True))
        launch("row_of", cdiv(n, _THREADS))
    launch("live_tiles", blocks, cdiv(words, _WARPS))
    return work


def plan(live: Tensor, slots: int, pack: int) -> Plan:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.plan`."""
    tiles, blocks = live.shape
    chunks, slots, step, sizes = shapes(tiles, blocks, slots)
    sizes = {**sizes, "before": (tiles + 1, blocks), "chunk_of": (tiles,)}
    lengths = [math.prod(shape) for shape in sizes.values()]
    memory = torch.empty(sum(lengths), dtype=torch.int32, device=live.device).split(lengths)
    tables = {name: part.view(shape) for (name, shape), part in zip(sizes.items(), memory, strict=True)}
    live = live.contiguous()
    arguments = PlanArguments(**tables, live=live, T=tiles, B=blocks, chunks=chunks, slots=slots, step=step, pack=pack)
    gpu = Gpu.current()
    Launch(plan_variant(gpu, "tile_list"), blocks, _TILES_THREADS, arguments)()
    Launch(plan_variant(gpu, "chunks"), cdiv(tiles, _WARPS), _THREADS, arguments)()
    Launch(plan_variant(gpu, "items"), cdiv(tiles + chunks, _WARPS), _THREADS, arguments)()
    return Plan(chunks, slots, **{name: tables[name] for name in _TABLES})
