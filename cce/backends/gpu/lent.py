"""Memory of dC for dx: rows that later chunks of the vocabulary will write are lent to earlier ones, at no cost.

This memory is far larger than the scratch memory, so chunks are fewer and their sums longer. The last entries, with too
few rows after them, use the scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes beyond which nothing is gained, and the kernels' 32-bit offsets would overflow.
_MOST = 2**30


@dataclass(frozen=True)
class Stretch:
    """A run of the vocabulary.

    Attributes:
        v0, v1: its first place, and the first place after it.
        lent: (bytes,) uint8, rows of dC from v1 on; None where the scratch memory is larger.
    """

    v0: int
    v1: int
    lent: Tensor | None


def share_of_chunk(n: int, d: int) -> float:
    """Share of the remaining entries whose dx, of n rows, fits into the rows of dC of the others.

    A stretch is then one chunk, as long as possible.
    """
    return d / (n + d)


def stretches(
    v: int, dc: Tensor | None, unit: int, share: float, scratch_bytes: int, most: int | None = None
) -> list[Stretch]:
    """Divide the vocabulary into stretches, each a share of the entries left.

    Args:
        v: number of entries.
        dc: (V, D) contiguous, not yet written, and to be written in ascending order; None if there is no such tensor.
        unit: every stretch but the last is a multiple of it.
        share: in (0, 1), largest share of the entries left that a stretch takes: the rows of the others are lent.
        scratch_bytes: fewer bytes than these are not worth lending.
        most: largest number of stretches that are lent rows.
    """
    found: list[Stretch] = []
    v0 = 0
    while dc is not None and len(found) != most:
        v1 = v0 + int((v - v0) * share) // unit * unit
        lent = bytes_of(dc[v1:])
        if lent.numel() <= scratch_bytes or v1 == v0:
            break
        found.append(Stretch(v0, v1, lent[:_MOST]))
        v0 = v1
    return [*found, Stretch(v0, v, None)]


def bytes_of(x: Tensor) -> Tensor:
    """Memory of a contiguous tensor, as bytes."""
    return x.view(-1).view(torch.uint8)


def shaped(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tensor of this shape and dtype over the first bytes of ``memory``."""
    return memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
