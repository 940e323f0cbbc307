"""Memory of dC for dx: what later chunks of the vocabulary will write is lent to earlier ones, and costs nothing.

It is larger than the scratch memory by far, so that chunks are fewer and their sums longer. The last entries, with too
few behind them, have the scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes beyond which nothing is gained, and kernels' 32-bit offsets would end.
_MOST = 2**30


@dataclass(frozen=True)
class Stretch:
    """A run of the vocabulary.

    Attributes:
        v0, v1: its first place, and the first behind it.
        lent: (bytes,) uint8, rows of dC from v1 on; None where the scratch memory is larger.
    """

    v0: int
    v1: int
    lent: Tensor | None


def share_of_chunk(n: int, d: int) -> float:
    """Of the entries that are left, those whose dx, n rows of it, fits into the others' rows of dC.

    A stretch is one chunk then, as long as it can be.
    """
    return d / (n + d)


def stretches(
    v: int, dc: Tensor | None, unit: int, share: float, scratch_bytes: int, most: int | None = None
) -> list[Stretch]:
    """The vocabulary in stretches, each of a share of what is left.

    Args:
        v: entries.
        dc: (V, D) contiguous, to be written in ascending order and not yet written; None if there is none such.
        unit: a stretch is a multiple of it, except for the last.
        share: in (0, 1), of the entries that are left, at most: the others' rows are lent.
        scratch_bytes: less than these are not worth being lent.
        most: stretches that are lent rows.
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
    """The memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)


def shaped(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of some bytes, as a tensor."""
    return memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
