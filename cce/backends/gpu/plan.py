"""The plan of a filtered backward: live tiles, in chunks that fit into the scratch memory, all of it on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Which tiles each launch computes; int32 arrays on the device, contiguous.

    A chunk is a run of whole vocabulary blocks, so that dC of its entries is complete with it; its live tiles have
    slots in the scratch memory, numbered by row block and then by vocabulary block.

    Attributes:
        chunks: launches, as many as the worst case takes; most find nothing to do.
        max_items: items of a chunk at the most.
        tile_list: (B, T) per row block its live vocabulary blocks, ascending, those of earlier chunks first.
        live_count: (T,) live row blocks of a vocabulary block; block_list, slot_list: (T, B) those, ascending, and the
            slots (within the chunk) of their tiles.
        chunk_start: (chunks + 1,) first vocabulary block of each chunk; all T are in some chunk, live or not.
        block_slot, block_tiles, block_first: (chunks, B) first slot of a row block, how many live tiles it has in the
            chunk (their slots follow one another), and the place of the first of them in its row of tile_list.
        item_block, item_first, item_slot, item_tiles: (chunks, max_items) row block, first of its live tiles (a place
            in its row of tile_list), its slot, and how many of them (1 to ``pack``): what one program computes at a
            time, by vocabulary block and then by row block: those at work together share rows of ``c``.
        items: (chunks,) how many.
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
