"""Row chunks of one pass: all logits of some rows at a time, where those of all rows exceed the scratch memory.

dC is summed over the chunks in its own dtype, by the product itself. The chunks depend on metadata and on the number of
rows in use alone, so the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv, logits_bytes, padded, pitch, windows
from cce.backends.problem import Gradients, Inputs, Outputs, Problem
from cce.spec import Spec

#: Rows of a chunk: consecutive ones, or any, ascending.
RowsOfChunk = slice | Tensor

#: Bytes of logits that are always made at once. More are worth leaving out the rows without a target, whose number has
#: to be asked for.
FEW_BYTES = 128 * 2**20
#: Chunks after the first into which rows may be divided. Each rounds the sum of a dC that is narrower than float32:
#: with four, and a first one of an eighth of the rows, the error of dC stays below 1.5 times that of one chunk
#: (docs/numerics.md). A float32 sum costs time only, and without a dC there is none.
MOST_ROUNDED, MOST_WIDE, MOST_WITHOUT = 4, 16, 64
#: Least rows of a later chunk, with a dC and without: with fewer, its sum over rows is too short for a product's speed.
LEAST_ROWS, LEAST_WITHOUT = 512, 256
#: Rows of the first chunk: one part of these, but at least so many.
_FIRST_PART, _LEAST_FIRST = 8, 256
#: Logits of a later chunk; more would gain nothing, and offsets within 32 bits are sure to suffice every library.
_MOST_LOGITS = 2**31 - 1
#: Chunks have a multiple of these rows, as kernels' tiles do.
_UNIT = 128
_LEAST_TILE = 128  # columns of the narrowest tile, which has two float32 numbers a row


@dataclass(frozen=True)
class RowChunks:
    """Division of the rows.

    Attributes:
        first: rows of the first chunk, in their order, with a target or without: while the GPU computes them, the host
            learns how many of the others have one.
        most: largest number of rows of a later chunk; 0 where the first has all.
    """

    first: int
    most: int

    def later(self, rows: int) -> list[tuple[int, int]]:
        """Chunks of the ``rows`` in use after the first chunk, of about equal size."""
        return windows(rows, _UNIT, 1, self.most) if rows else []


def row_chunks(problem: Problem, spec: Spec) -> RowChunks | None:
    """Choose the chunks of a problem, from metadata alone; None if one pass would not be faster or too inaccurate."""
    n, size = problem.n, logits_bytes(problem)
    if size <= min(FEW_BYTES, spec.scratch_bytes):
        return RowChunks(n, 0)
    fit = min(int(spec.scratch_bytes * _share(problem)) // _row_bytes(problem), _MOST_LOGITS // pitch(problem.v))
    fit = fit // _UNIT * _UNIT
    first = max(_LEAST_FIRST, n // _FIRST_PART // _UNIT * _UNIT)
    if n - first < _LEAST_FIRST:
        return RowChunks(n, 0) if size <= spec.scratch_bytes else None
    if problem.dtype == torch.float16:  # whose sums may exceed its range before they are scaled
        return None
    least, most = _limits(problem)
    if fit < min(least, n - first):
        return None
    first = min(first, fit)
    return RowChunks(first, fit) if cdiv(n - first, fit) <= most else None


def _limits(problem: Problem) -> tuple[int, int]:
    """Least rows of a later chunk, unless there are fewer, and most such chunks."""
    if not problem.grad_c:
        return LEAST_WITHOUT, MOST_WITHOUT
    return LEAST_ROWS, MOST_ROUNDED if problem.c_dtype.itemsize < 4 else MOST_WIDE


def _share(problem: Problem) -> float:
    """Share of the scratch memory for chunks: kernels may need aligned copies of the rows of ``c`` beside them."""
    return 1.0 if padded(problem.d, problem.dtype) == problem.d else 7 / 8


def _row_bytes(problem: Problem) -> int:
    """Bytes of scratch memory of a row: logits, maxima and sums of its tiles, two copies of its e, its dE."""
    vectors = 2 * padded(problem.d, problem.dtype) * problem.dtype.itemsize + problem.d * problem.dtype.itemsize
    return pitch(problem.v) * problem.dtype.itemsize + 8 * cdiv(problem.v, _LEAST_TILE) + vectors


def inputs_of(inputs: Inputs[Tensor], rows: RowsOfChunk) -> Inputs[Tensor]:
    """The inputs of some rows; those of ``e`` are copied only if they are not consecutive."""
    targets = inputs.targets[rows]
    if isinstance(rows, slice) and inputs.rows is None:
        return replace(inputs, e=inputs.e[rows], targets=targets)
    if inputs.rows is not None:
        return replace(inputs, targets=targets, rows=inputs.rows[rows])
    assert isinstance(rows, Tensor)
    return replace(inputs, targets=targets, rows=rows)


class Total:
    """Results of all rows, filled chunk by chunk.

    Outputs and dE are 0 in rows that no chunk has. dC is the sum over the chunks so far, to which
    the product of the next one is added in place; None before the first.
    """

    def __init__(self, e: Tensor, problem: Problem) -> None:
        n, k = problem.n, problem.k
        lse, lse_low = e.new_zeros((2, n), dtype=torch.float32).unbind()
        self.outputs = Outputs(lse, e.new_zeros((n, k), dtype=torch.float32), lse_low)
        self._de = e.new_zeros((n, problem.d), dtype=problem.e_dtype) if problem.grad_e else None
        self.dc: Tensor | None = None
        self._dbias: Tensor | None = None

    def add(self, rows: RowsOfChunk, outputs: Outputs[Tensor], gradients: Gradients[Tensor]) -> None:
        """Take over the results of a chunk; its dC is the sum."""
        for name in ("lse", "nll", "lse_low"):
            _put(getattr(self.outputs, name), rows, getattr(outputs, name))
        if self._de is not None and gradients.de is not None:
            _put(self._de, rows, gradients.de)
        self.dc = gradients.dc
        if self._dbias is not None and gradients.dbias is not None:
            self._dbias += gradients.dbias
        else:
            self._dbias = gradients.dbias

    @property
    def gradients(self) -> Gradients[Tensor]:
        return Gradients(self._de, self.dc, self._dbias)


def _put(out: Tensor, rows: RowsOfChunk, values: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values)
