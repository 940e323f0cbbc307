"""The plan of a filtered backward: live tiles in chunks that fit into the scratch memory, made on the device.

Tiles are BLOCK_N rows, in the work list's order, by BLOCK_V places of the vocabulary. A chunk is a run of whole
vocabulary blocks, so that it completes dC of its entries; its live tiles have ``slots`` in the scratch memory, numbered
by row block and then by vocabulary block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv, power_of_two, row_blocks
from cce.backends.problem import Maps, Upstream
from cce.backends.triton.call import Call
from cce.backends.triton.kernels.worklist import (
    blocks_kernel,
    chunks_kernel,
    columns_kernel,
    count_kernel,
    hits_kernel,
    items_kernel,
    live_kernel,
    rows_kernel,
    scan_kernel,
)


@dataclass(frozen=True)
class Live:
    """The live tiles.

    Attributes:
        row_order: (N,) int64; block b holds rows ``row_order[b * BLOCK_N : (b + 1) * BLOCK_N]``.
        keep: (N,) bool, in the rows' own order: whether the row needs a gradient.
        live: (T, B) int8.
    """

    row_order: Tensor
    keep: Tensor
    live: Tensor


@dataclass(frozen=True)
class Plan:
    """Tiles that each launch computes, as int32 arrays.

    Attributes:
        chunks: number of launches, as many as the worst case takes; most find nothing to do.
        max_items: largest number of items in a chunk.
        before: (B, T + 1) number of a row block's live tiles before each vocabulary block; tile_list: (B, T) these
            tiles.
        live_count: (T,) number of live row blocks of a vocabulary block; block_list, slot_list: (T, B) these, and their
            slots.
        chunk_start: (chunks + 1,) first vocabulary block of each chunk.
        block_slot, block_tiles, block_first: (chunks, B) first slot of a row block, its number of live tiles, and the
            place of the first of them in tile_list.
        item_block, item_first, item_slot, item_tiles: (chunks, max_items) an item is what one program computes at a
            time: its row block, its first live tile (a place in tile_list), that tile's slot, and its number of tiles.
            items: (chunks,) number of items.
    """

    chunks: int
    max_items: int
    before: Tensor
    tile_list: Tensor
    live_count: Tensor
    block_list: Tensor
    slot_list: Tensor
    chunk_start: Tensor
    block_slot: Tensor
    block_tiles: Tensor
    block_first: Tensor
    item_block: Tensor
    item_first: Tensor
    item_slot: Tensor
    item_tiles: Tensor
    items: Tensor


def find_live(
    call: Call,
    target_place: Tensor,
    in_use: Tensor,
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
    lse: Tensor | None = None,
) -> Live:
    """Find the live tiles from the map of the forward; rows with similar numbers of hits share a block.

    Rows that do not count come last, so that the other rows form the same blocks as in a call without them. A row whose
    gradient is NaN or infinite needs every tile. If ``lse`` (N,) is given, so does a row without a softmax, even if its
    gradient is 0: 0 times NaN is NaN.
    """
    n, t, blocks = call.problem.n, call.tiles, row_blocks(call.problem, call.spec)
    keep, total = (upstream.a != 0) | (upstream.g != 0).any(1), upstream.a
    if upstream.h is not None:
        keep |= upstream.h != 0
        total = total + upstream.h
    everywhere = ~(total if lse is None else total + lse).isfinite()  # not finite where one term is not
    keep = (keep | everywhere) & in_use
    assert maps.tile_mass is not None
    block_n, block_t, programs = 64, 16, min(8, cdiv(t, 16))
    hit = call.empty(t, n, dtype=torch.int8)
    counts = call.empty(programs, n, dtype=torch.int32)
    hits_kernel[(cdiv(n, block_n), programs)](
        maps.tile_mass, keep, everywhere, target_place, upstream.g, hit, counts, n, t, target_place.shape[1],
        maps.tile_mass.stride(0), cdiv(t, programs), BLOCK_V=call.block_v, BLOCK_N=block_n, BLOCK_T=block_t,
    )  # fmt: skip
    if call.spec.row_order == "live" and call.block_n > 1:
        key = torch.where(in_use, counts.sum(0, dtype=torch.int32), t + 1)
    else:
        key = (~in_use).to(torch.int8)
    row_order = key.argsort(stable=True)
    live = call.empty(t, blocks, dtype=torch.int8)
    group = max(1, 1024 // call.block_n)
    live_kernel[(t, cdiv(blocks, group))](hit, row_order, live, n, t, blocks, BLOCK_N=call.block_n, GROUP=group)
    return Live(row_order, keep, live)


def make(call: Call, found: Live, slots: int, pack: int) -> Plan:
    """Make the plan for ``slots`` tiles of scratch memory, up to ``pack`` of which one program computes at a time."""
    t, blocks = call.tiles, row_blocks(call.problem, call.spec)
    wide = power_of_two(blocks)
    slots = min(slots, blocks * t + blocks)
    step = slots - blocks + 1  # a chunk's last vocabulary block begins before its step ends, and may bring B tiles
    chunks = cdiv(blocks * t + 1, step)

    def ints(*shape: int) -> Tensor:
        return call.empty(*shape, dtype=torch.int32)

    # The items of a chunk without vocabulary blocks are never written: it has 0.
    plan = Plan(
        chunks, slots, before=ints(blocks, t + 1), tile_list=ints(blocks, t), live_count=ints(t),
        block_list=ints(t, blocks), slot_list=ints(t, blocks), chunk_start=ints(chunks + 1),
        block_slot=ints(chunks, blocks), block_tiles=ints(chunks, blocks), block_first=ints(chunks, blocks),
        item_block=ints(chunks, slots), item_first=ints(chunks, slots), item_slot=ints(chunks, slots),
        item_tiles=ints(chunks, slots), items=torch.zeros(chunks, dtype=torch.int32, device=call.e.device),
    )  # fmt: skip
    earlier, item_count, items_earlier = ints(t), ints(t), ints(t)
    sizes = {"PACK": pack, "BLOCKS": wide}
    rows_kernel[(blocks,)](found.live, plan.before, plan.tile_list, t, blocks, BLOCK_T=1024)
    count_kernel[(t,)](found.live, plan.live_count, blocks, BLOCKS=wide)
    scan_kernel[(1,)](plan.live_count, earlier, t, BLOCK_T=2048)
    chunks_kernel[(chunks + 1,)](earlier, plan.chunk_start, t, step, chunks, BLOCK_T=1024)
    ranges = (plan.block_slot, plan.block_tiles, plan.block_first)
    blocks_kernel[(chunks,)](plan.before, plan.chunk_start, *ranges, t, blocks, BLOCKS=wide)
    columns_kernel[(t,)](
        found.live, plan.before, earlier, *ranges, plan.block_list, plan.slot_list, item_count, t, blocks, step, **sizes
    )
    scan_kernel[(1,)](item_count, items_earlier, t, BLOCK_T=2048)
    items_kernel[(t,)](
        found.live, plan.before, earlier, plan.chunk_start, *ranges, items_earlier, plan.item_block, plan.item_first,
        plan.item_slot, plan.item_tiles, plan.items, t, blocks, step, slots, **sizes,
    )  # fmt: skip
    return plan
