"""Sizes shared by the GPU backends' host code: blocks, scratch memory, splits; from metadata alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cce.backends.problem import Problem
from cce.spec import Spec

#: Tiles of the filter that a matrix unit can work on.
BLOCKS_N = (16, 32, 64, 128)
BLOCKS_V = (16, 32, 64, 128, 256)
#: Columns of the narrowest chunk of the exact backward: no tile of it may be wider.
LEAST_COLUMNS = 256
#: Limit, in bytes, on memory held besides the gradients if it includes a copy of ``e`` outside the scratch memory.
MOST_BESIDE = 128 * 2**20
#: Place of a copy of the rows of ``e``: in the scratch memory; in the memory of dE, which is written after the copy was
#: read for the last time; or in memory of its own, up to twice the scratch memory, if everything held besides the
#: gradients (the float32 dE, and a row of dC for each vocabulary block, but not yet dE) stays within MOST_BESIDE.
Place = Literal["scratch", "de", "beside", "nowhere"]
#: Alignment, in bytes, of the rows of an operand.
ALIGNMENT = 16


@dataclass(frozen=True)
class Blocks:
    """A problem, a resolved spec, and its blocks."""

    problem: Problem
    spec: Spec

    @property
    def block_n(self) -> int:
        assert self.spec.block_n is not None
        return self.spec.block_n

    @property
    def block_v(self) -> int:
        assert self.spec.block_v is not None
        return self.spec.block_v

    @property
    def tiles(self) -> int:
        """T, the number of vocabulary blocks."""
        return self.spec.tiles(self.problem.v)


#: Most targets that one program counts; beyond this, torch operations are faster.
MOST_WEIGHED = 2**14


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up. Triton's own wraps its arguments for the compiler and takes ten times as long."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def row_blocks(problem: Problem, spec: Spec) -> int:
    """B, the number of row blocks."""
    assert spec.block_n is not None
    return -(-problem.n // spec.block_n)


def slot_bytes(problem: Problem, spec: Spec) -> int:
    """Bytes of scratch memory of a live tile: dx, its entries and column sums, its item of the plan."""
    assert spec.block_n is not None and spec.block_v is not None
    return spec.block_n * spec.block_v * problem.dtype.itemsize + 8 * spec.block_v + 16


def pitch(columns: int) -> int:
    """Row pitch of the scratch memory in elements: a multiple of 16, more than tensor maps and wide stores need."""
    return -(-columns // 16) * 16


def logits_bytes(problem: Problem) -> int:
    """Bytes of all logits in the products' dtype."""
    return problem.n * pitch(problem.v) * problem.dtype.itemsize


def least_scratch(problem: Problem, spec: Spec) -> int:
    """Least scratch bytes of a backward: for a narrow chunk, or two vocabulary blocks whose tiles are all live."""
    if spec.filter == "none":
        return problem.n * LEAST_COLUMNS * problem.dtype.itemsize
    return 2 * row_blocks(problem, spec) * slot_bytes(problem, spec)


def windows(places: int, tile: int, row_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Runs of whole tiles, of about equal size, whose rows fit into ``budget`` bytes; at least one tile each."""
    step = max(tile, budget // row_bytes // tile * tile)
    step = cdiv(cdiv(places, cdiv(places, step)), tile) * tile
    return [(v0, min(places, v0 + step)) for v0 in range(0, places, step)]


def busiest_splits(blocks: int, tiles: int, programs: int, most: int) -> int:
    """Number of splits, at most ``most``, that keeps the multiprocessors busiest.

    ``programs`` share ``blocks`` row blocks times the splits; each walks all tiles of its split.
    """

    def rounds(splits: int) -> int:
        """Approximate number of tiles that the busiest multiprocessor computes one after the other."""
        return cdiv(blocks * splits, programs) * cdiv(tiles, splits)

    return min(range(1, min(tiles, most) + 1), key=lambda splits: (rounds(splits), splits))


def place_of_copy(problem: Problem, spec: Spec, share: float) -> Place:
    """Place of a filtered backward's copy of the rows of ``e`` in the work list's order.

    Args:
        share: largest share of the scratch memory that a copy may take.
    """
    copy, scratch, width = _rows_bytes(problem), spec.scratch_bytes, padded(problem.d, problem.dtype)
    if copy <= share * scratch and copy + least_scratch(problem, spec) <= scratch:
        return "scratch"
    results = problem.n * problem.d * problem.de_dtype.itemsize * problem.grad_e
    if copy <= results:
        return "de"
    sums = (problem.n * problem.grad_e + spec.tiles(problem.v) * problem.grad_c * spec.compensate) * width * 4
    return "beside" if copy <= 2 * scratch and scratch + copy + sums - results <= MOST_BESIDE else "nowhere"


def _rows_bytes(problem: Problem) -> int:
    """Bytes of aligned rows of ``e``."""
    return problem.n * padded(problem.d, problem.dtype) * problem.dtype.itemsize


def padded(d: int, dtype: torch.dtype) -> int:
    """D, padded so that a row is a multiple of 16 bytes."""
    unit = ALIGNMENT // dtype.itemsize
    return cdiv(d, unit) * unit
