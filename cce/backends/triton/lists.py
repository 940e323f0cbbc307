"""Launches that find the live tiles and make the plan of the chunks, on the device; the host reads nothing of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Rows
from cce.backends.gpu.plan import Plan, shapes
from cce.backends.gpu.sizes import cdiv, power_of_two
from cce.backends.gpu.work import Work
from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.backends.shared.rows import used_rows
from cce.backends.triton.kernels.lists import (
    blocks_kernel,
    chunks_kernel,
    columns_kernel,
    count_kernel,
    hits_kernel,
    items_kernel,
    live_tiles_kernel,
    scan_kernel,
    tile_list_kernel,
)
from cce.spec import Spec


def work_list(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, rows: Rows, maps: Maps[Tensor], upstream: Upstream[Tensor]
) -> Work:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.work_list`; rows with similar numbers of hits share a block.

    Rows that do not count come last, so that the other rows form the same blocks as in a call without them. A row whose
    gradient is NaN or infinite needs every tile; so does one without a softmax, whose map says so.
    """
    in_use, mass = used_rows(inputs), maps.tile_mass
    assert mass is not None and spec.block_n is not None and spec.block_v is not None
    keep, total = (upstream.a != 0) | (upstream.g != 0).any(1), upstream.a
    if upstream.h is not None:
        keep |= upstream.h != 0
        total = total + upstream.h
    everywhere = ~total.isfinite()  # not finite where one term is not
    (t, n), blocks = mass.shape, cdiv(problem.n, spec.block_n)
    block_n, block_t, programs = 64, 16, min(8, cdiv(t, 16))
    hit = mass.new_empty((t, n), dtype=torch.int8)
    counts = mass.new_empty((programs, n), dtype=torch.int32)
    hits_kernel[(cdiv(n, block_n), programs)](
        mass, keep, everywhere, rows.targets, upstream.g, hit, counts, n, t, problem.k, mass.stride(0),
        cdiv(t, programs), BLOCK_V=spec.block_v, BLOCK_N=block_n, BLOCK_T=block_t,
    )  # fmt: skip
    if spec.row_order == "live" and spec.block_n > 1:
        key = torch.where(in_use, counts.sum(0, dtype=torch.int32), t + 1)
    else:
        key = (~in_use).to(torch.int8)
    row_order = key.argsort(stable=True)
    live = mass.new_empty((t, blocks), dtype=torch.bool)
    group = max(1, 1024 // spec.block_n)
    live_tiles_kernel[(t, cdiv(blocks, group))](
        hit, row_order, live.view(torch.int8), n, t, blocks, BLOCK_N=spec.block_n, GROUP=group
    )
    return Work(row_order, keep, live)


def plan(live: Tensor, slots: int, pack: int) -> Plan:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.plan`."""
    t, blocks = live.shape
    chunks, slots, step, tables = shapes(t, blocks, slots)
    on, wide = live.view(torch.int8), power_of_two(blocks)

    # One allocation: each would take the host longer than some of the kernels run.
    others = {"before": (blocks, t + 1), "earlier": (t,), "item_count": (t,), "items_earlier": (t,)}
    sizes = {name: math.prod(shape) for name, shape in (tables | others).items()}
    memory = live.new_empty(sum(sizes.values()), dtype=torch.int32).split(list(sizes.values()))
    found = {
        name: x if len(shape) == 1 else x.view(shape)
        for (name, shape), x in zip((tables | others).items(), memory, strict=True)
    }
    before, earlier, item_count, items_earlier = (found.pop(name) for name in others)
    found["items"].zero_()  # those of a chunk without vocabulary blocks are never written
    flags = {"PACK": pack, "BLOCKS": wide}
    tile_list_kernel[(blocks,)](on, before, found["tile_list"], t, blocks, BLOCK_T=1024)
    count_kernel[(t,)](on, found["live_count"], blocks, BLOCKS=wide)
    scan_kernel[(1,)](found["live_count"], earlier, t, BLOCK_T=2048)
    chunks_kernel[(chunks + 1,)](earlier, found["chunk_start"], t, step, chunks, BLOCK_T=1024)
    ranges = [found[name] for name in ("block_slot", "block_tiles", "block_first")]
    blocks_kernel[(chunks,)](before, found["chunk_start"], *ranges, t, blocks, BLOCKS=wide)
    columns_kernel[(t,)](
        on, before, earlier, *ranges, found["block_list"], found["slot_list"], item_count, t, blocks, step, **flags
    )
    scan_kernel[(1,)](item_count, items_earlier, t, BLOCK_T=2048)
    items = [found[name] for name in ("item_block", "item_first", "item_slot", "item_tiles", "items")]
    items_kernel[(t,)](
        on, before, earlier, found["chunk_start"], *ranges, items_earlier, *items, t, blocks, step, slots, **flags
    )
    return Plan(chunks, slots, **found)
