"""The plan of a filtered backward: live tiles in chunks that fit into the scratch memory, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv


@dataclass(frozen=True)
class Plan:
    """Tiles that each launch computes, as contiguous int32 arrays on the device.

    A chunk is a run of whole vocabulary blocks, so that it completes dC of its entries; its live tiles have slots in
    the scratch memory, numbered by row block and then by vocabulary block.

    Attributes:
        chunks: number of launches, as many as the worst case takes; most find nothing to do.
        max_items: largest number of items in a chunk.
        tile_list: (B, T) live vocabulary blocks of each row block, ascending, those of earlier chunks first.
        live_count: (T,) number of live row blocks of a vocabulary block; block_list, slot_list: (T, B) these blocks,
            ascending, and the slots (within the chunk) of their tiles.
        chunk_start: (chunks + 1,) first vocabulary block of each chunk; all T are in some chunk, live or not.
        block_slot, block_tiles, block_first: (chunks, B) first slot of a row block, its number of live tiles in the
            chunk (their slots are consecutive), and the place of the first of them in its row of tile_list.
        item_block, item_first, item_slot, item_tiles: (chunks, max_items) an item is what one program computes at a
            time: its row block, its first live tile (a place in that row of tile_list), that tile's slot, and its
            number of tiles (1 to ``pack``). Items are sorted by vocabulary block and then by row block, so that those
            computed together share rows of ``c``.
        items: (chunks,) number of items.
    """

    chunks: int
    max_items: int
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


def shapes(tiles: int, blocks: int, slots: int) -> tuple[int, int, int, dict[str, tuple[int, ...]]]:
    """Number of chunks, slots in use, live tiles between the starts of two chunks, and the tables' shapes."""
    slots = min(slots, blocks * tiles + blocks)
    step = slots - blocks + 1  # a chunk's last vocabulary block begins before its step ends, and may bring B tiles
    chunks = cdiv(blocks * tiles + 1, step)
    tables = {
        "tile_list": (blocks, tiles), "live_count": (tiles,), "block_list": (tiles, blocks),
        "slot_list": (tiles, blocks), "chunk_start": (chunks + 1,), "items": (chunks,),
    }  # fmt: skip
    for name in ("block_slot", "block_tiles", "block_first"):
        tables[name] = (chunks, blocks)
    for name in ("item_block", "item_first", "item_slot", "item_tiles"):
        tables[name] = (chunks, slots)
    return chunks, slots, step, tables


def make(live: Tensor, slots: int, pack: int) -> Plan:
    """Make the plan for ``slots`` tiles of scratch memory, up to ``pack`` of which one program computes at a time.

    Args:
        live: (T, B) bool, the live tiles.
        slots: at least 2 B; slots beyond the number of tiles are not used.
        pack: largest number of tiles in an item.
    """
    tiles, blocks = live.shape
    chunks, slots, step, _ = shapes(tiles, blocks, slots)
    before, in_column = _counts(live.T), _counts(live)  # (B, T + 1), (T, B + 1)
    live_count = in_column[:, -1].contiguous()
    earlier = _counts(live_count[None])[0]  # (T + 1,) live tiles in earlier vocabulary blocks
    chunk_start = torch.searchsorted(earlier[:-1], step * _range(chunks + 1, live), out_int32=True)
    starts = before.index_select(1, chunk_start).T  # (chunks + 1, B)
    block_first, block_tiles = starts[:-1].contiguous(), starts.diff(dim=0).contiguous()
    block_slot = _counts(block_tiles)[:, :-1].contiguous()

    # For each tile (T, B): number of its row block's tiles that precede it in its chunk, and its slot.
    chunk = earlier[:-1] // step
    rank = before[:, :-1].T - block_first.index_select(0, chunk)
    slot = block_slot.index_select(0, chunk) + rank
    count = (block_tiles.index_select(0, chunk) - rank).clamp_(max=pack)
    place = before[:, :-1].T  # in the row block's list
    block = _range(blocks, live).expand(tiles, blocks)
    (tile_list,) = _live_first(live.T, before, _range(tiles, live).expand(blocks, tiles))
    block_list, slot_list = _live_first(live, in_column, block, slot)
    begins = live & (rank % pack == 0)
    items, (item_block, item_first, item_slot, item_tiles) = _items(
        begins, chunk, chunk_start, slots, block, place, slot, count
    )
    return Plan(
        chunks, slots, tile_list, live_count, block_list, slot_list, chunk_start, block_slot, block_tiles, block_first,
        item_block, item_first, item_slot, item_tiles, items,
    )  # fmt: skip


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=like.device)


def _counts(x: Tensor) -> Tensor:
    """Sums of the columns that precede each column, (rows, columns + 1) int32; the last is the sum of all."""
    return torch.nn.functional.pad(x.cumsum(1, dtype=torch.int32), (1, 0))


def _live_first(live: Tensor, before: Tensor, *values: Tensor) -> list[Tensor]:
    """Values of the live tiles of each row, in their order, then the others; ``before`` counts the live ones."""
    rows, columns = live.shape
    column = _range(columns, live)
    behind = before[:, -1:] + column - before[:, :-1]  # places of dead tiles
    place = torch.where(live, before[:, :-1], behind) + columns * _range(rows, live)[:, None]
    index = place.flatten().to(torch.int64)
    found = (torch.empty(rows * columns, dtype=torch.int32, device=live.device) for _ in values)
    return [x.scatter_(0, index, value.flatten()).view(rows, columns) for x, value in zip(found, values, strict=True)]


def _items(
    begins: Tensor, chunk: Tensor, chunk_start: Tensor, slots: int, *values: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Number of items of each chunk, (chunks,); and each of the values (T, B), in the items' order, (chunks, slots).

    ``begins`` (T, B): whether an item begins with the tile. ``chunk`` (T,): chunk of each vocabulary block.
    """
    chunks, blocks = len(chunk_start) - 1, begins.shape[1]
    number = _counts(begins.reshape(1, -1))[0]  # counts items, by vocabulary block and then by row block
    first = number[::blocks].index_select(0, chunk_start)  # (chunks + 1,)
    place = chunk * slots - first.index_select(0, chunk)  # (T,)
    place = place[:, None] + number[:-1].view(begins.shape)
    nobody = chunks * slots  # destination of tiles that begin no item
    index = torch.where(begins, place, nobody).flatten().to(torch.int64)
    tables = []
    for value in values:
        table = torch.zeros(nobody + 1, dtype=torch.int32, device=begins.device)
        tables.append(table.scatter_(0, index, value.flatten())[:-1].view(chunks, slots))
    return first.diff(), tables
