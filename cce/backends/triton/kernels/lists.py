"""The work list on the device (docs/algorithm.md, step 3): the live tiles, and the plan of the chunks.

The host reads nothing of it: the number of live tiles, the number of chunks they fill and where each chunk begins stay
in device memory, and the kernels loop over what they find there. ``plan.py`` describes the arrays.
"""

import triton
import triton.language as tl

from cce.backends.triton.kernels.tiles import store_as_held


@triton.jit
def hits_kernel(
    tile_mass, active, everywhere, target_place, g, hit, counts,
    N, T, K, stride_mass, per_program,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write hit [T, N]: the row needs the tile, by the filter's rule or for a target in it; and counts [programs, N].

    ``counts`` holds the number of each row's hits. ``active`` [N]: the row needs some tile; ``everywhere`` [N]: all.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * per_program
    on = tl.load(active + rows, mask=rows < N, other=0) != 0
    every = tl.load(everywhere + rows, mask=rows < N, other=0) != 0
    total = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(first, tl.minimum(first + per_program, T), BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        inside = (tiles < tl.minimum(first + per_program, T))[:, None] & (rows < N)[None, :]
        mass = tl.load(tile_mass + tiles.to(tl.int64)[:, None] * stride_mass + rows[None, :], mask=inside, other=0.0)
        found = ((mass >= 0) == 0) | every[None, :]  # NaN in all tiles of a row without a softmax
        for k in range(K):
            place = tl.load(target_place + rows.to(tl.int64) * K + k, mask=rows < N, other=-1)
            counted = (place >= 0) & (tl.load(g + rows.to(tl.int64) * K + k, mask=rows < N, other=0.0) != 0)
            found = found | (counted[None, :] & ((place // BLOCK_V)[None, :] == tiles[:, None]))
        found = found & on[None, :]
        tl.store(hit + tiles.to(tl.int64)[:, None] * N + rows[None, :], found.to(tl.int8), mask=inside)
        total += tl.sum((found & inside).to(tl.int32), 0)
    store_as_held(counts + tl.program_id(1) * N + rows, total, rows < N)


@triton.jit
def live_tiles_kernel(hit, row_order, live, N, T, blocks, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Write live [T, blocks]: some row of the block, in the work list's order, needs the tile."""
    t = tl.program_id(0)
    b = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    row = b[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    source = tl.load(row_order + row, mask=row < N, other=0)
    found = tl.load(hit + t.to(tl.int64) * N + source, mask=row < N, other=0)
    tl.store(live + t * blocks + b, tl.max(found.to(tl.int32), 1).to(tl.int8), mask=b < blocks)


@triton.jit
def tile_list_kernel(live, before, tile_list, T, blocks, BLOCK_T: tl.constexpr):
    """Write each row block's live tiles, ascending, and before [blocks, T + 1], the number that precede each tile."""
    b = tl.program_id(0)
    total = 0
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        on = tl.load(live + tiles * blocks + b, mask=tiles < T, other=0).to(tl.int32)
        earlier = total + tl.cumsum(on, 0) - on
        tl.store(before + b * (T + 1) + tiles, earlier, mask=tiles < T)
        tl.store(tile_list + b * T + earlier, tiles, mask=on > 0)
        total += tl.sum(on, 0)
    tl.store(before + b * (T + 1) + T, total)


@triton.jit
def count_kernel(live, live_count, blocks, BLOCKS: tl.constexpr):
    """Write live_count [T], the number of live row blocks of each vocabulary block."""
    t = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    on = tl.load(live + t * blocks + b, mask=b < blocks, other=0).to(tl.int32)
    tl.store(live_count + t, tl.sum(on, 0))


@triton.jit
def chunks_kernel(earlier, chunk_start, T, step, chunks, BLOCK_T: tl.constexpr):
    """Write chunk_start [chunks + 1]: chunk k has the blocks preceded by k step to (k + 1) step live tiles."""
    k = tl.program_id(0)
    count = 0
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        found = tl.load(earlier + tiles, mask=tiles < T, other=2147483647)
        count += tl.sum((found < k * step).to(tl.int32), 0)
    if k == chunks:
        count = T
    tl.store(chunk_start + k, count)


@triton.jit
def starts_of(
    on, t, before, earlier, block_slot, block_tiles, block_first, T, blocks, step,
    PACK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Chunk of vocabulary block t; for each row block, the slot of its tile and whether an item begins with it.

    An item is PACK live tiles of one row block, consecutive in its list; it is numbered by the first of them.
    """
    b = tl.arange(0, BLOCKS)
    here = b < blocks
    k = tl.load(earlier + t) // step
    place = tl.load(before + b * (T + 1) + t, mask=here, other=0)
    rank = place - tl.load(block_first + k * blocks + b, mask=here, other=0)
    slot = tl.load(block_slot + k * blocks + b, mask=here, other=0) + rank
    count = tl.load(block_tiles + k * blocks + b, mask=here, other=0)
    begins = (on != 0) & (rank % PACK == 0)
    return k, slot, begins, place, tl.minimum(count - rank, PACK)


@triton.jit
def columns_kernel(
    live, before, earlier, block_slot, block_tiles, block_first, block_list, slot_list, item_count,
    T, blocks, step, PACK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write each vocabulary block's live row blocks, their tiles' slots, and the number of items that begin there."""
    t = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    on = tl.load(live + t * blocks + b, mask=b < blocks, other=0).to(tl.int32)
    _, slot, begins, _, _ = starts_of(on, t, before, earlier, block_slot, block_tiles, block_first, T, blocks, step,
                                      PACK, BLOCKS)  # fmt: skip
    where = t * blocks + tl.cumsum(on, 0) - on
    tl.store(block_list + where, b, mask=on > 0)
    tl.store(slot_list + where, slot, mask=on > 0)
    tl.store(item_count + t, tl.sum(begins.to(tl.int32), 0))


@triton.jit
def items_kernel(
    live, before, earlier, chunk_start, block_slot, block_tiles, block_first, items_earlier,
    item_block, item_first, item_slot, item_tiles, items,
    T, blocks, step, max_items, PACK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the items of each chunk, by vocabulary block, then by row block: those at work together share rows of c."""
    t = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    on = tl.load(live + t * blocks + b, mask=b < blocks, other=0).to(tl.int32)
    k, slot, begins, place, tiles = starts_of(on, t, before, earlier, block_slot, block_tiles, block_first,
                                              T, blocks, step, PACK, BLOCKS)  # fmt: skip
    begin = begins.to(tl.int32)
    base = tl.load(items_earlier + t) - tl.load(items_earlier + tl.load(chunk_start + k))
    where = k * max_items + base + tl.cumsum(begin, 0) - begin
    tl.store(item_block + where, b, mask=begins)
    tl.store(item_first + where, place, mask=begins)
    tl.store(item_slot + where, slot, mask=begins)
    tl.store(item_tiles + where, tiles, mask=begins)
    if t + 1 == tl.load(chunk_start + k + 1):
        tl.store(items + k, base + tl.sum(begin, 0))


@triton.jit
def scan_kernel(x, earlier, T, BLOCK_T: tl.constexpr):
    """Write earlier [T]: the sum of all x before each. Runs as one program."""
    total = 0
    for start in range(0, T, BLOCK_T):
        where = start + tl.arange(0, BLOCK_T)
        count = tl.load(x + where, mask=where < T, other=0)
        tl.store(earlier + where, total + tl.cumsum(count, 0) - count, mask=where < T)
        total += tl.sum(count, 0)


@triton.jit
def blocks_kernel(before, chunk_start, block_slot, block_tiles, block_first, T, blocks, BLOCKS: tl.constexpr):
    """Write, for each chunk and row block, its first slot, its number of live tiles, and the first in its tile list."""
    k = tl.program_id(0)
    t0, t1 = tl.load(chunk_start + k), tl.load(chunk_start + k + 1)
    b = tl.arange(0, BLOCKS)
    here = b < blocks
    first = tl.load(before + b * (T + 1) + t0, mask=here, other=0)
    count = tl.load(before + b * (T + 1) + t1, mask=here, other=0) - first
    where = k * blocks + b
    tl.store(block_slot + where, tl.cumsum(count, 0) - count, mask=here)
    tl.store(block_tiles + where, count, mask=here)
    tl.store(block_first + where, first, mask=here)
