"""Row chunks of one pass: all logits of some rows at a time, where those of all rows exceed the scratch memory.

dC is summed over the chunks in its own dtype, by the product itself, but for its heaviest rows. The chunks depend on
metadata and on the number of rows in use alone, so the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.products import add_product, narrow_product, product
from cce.backends.gpu.sizes import cdiv, logits_bytes, padded, pitch, windows
from cce.backends.problem import Gradients, Inputs, Outputs, Problem
from cce.spec import Spec

#: Rows of a chunk: consecutive ones, or any, ascending.
RowsOfChunk = slice | Tensor

#: Bytes of logits that are always made at once. More are worth leaving out the rows without a target, whose number has
#: to be asked for.
FEW_BYTES = 128 * 2**20
#: Chunks after the first into which rows may be divided. Each rounds the sum of a dC that is narrower than float32, but
#: for the wide rows: with ten its error stays below 1.5 times that of one chunk. A float32 sum costs time only, and
#: without a dC there is none.
MOST_ROUNDED, MOST_WIDE, MOST_WITHOUT = 10, 16, 64
#: Least rows of a later chunk, with a dC and without: with fewer, its sum over rows is too short for a product's speed.
LEAST_ROWS, LEAST_WITHOUT = 896, 256
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
    room = int(spec.scratch_bytes * _share(problem)) - wide_rows(problem) * problem.d * 6  # float32, and rounded
    fit = min(room // _row_bytes(problem), _MOST_LOGITS // pitch(problem.v))
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


def wide_rows(problem: Problem) -> int:
    """Number of rows of dC that are summed in float32, where dC itself is narrower.

    They are those of the entries that are targets most often, and hold most of dC (docs/numerics.md).
    """
    if not problem.grad_c or problem.c_dtype.itemsize >= 4:
        return 0
    part = max(cdiv(problem.v, 64), min(512, cdiv(problem.v, 16)))
    return min(problem.n * problem.k, part)


def _limits(problem: Problem) -> tuple[int, int]:
    """Least rows of a later chunk, unless there are fewer, and most such chunks."""
    if not problem.grad_c:
        return LEAST_WITHOUT, MOST_WITHOUT
    return LEAST_ROWS, MOST_ROUNDED if problem.c_dtype.itemsize < 4 else MOST_WIDE


def _share(problem: Problem) -> float:
    """Share of the scratch memory for chunks: kernels may need aligned copies of the rows of ``c`` beside them."""
    return 1.0 if padded(problem.d, problem.dtype) == problem.d else 7 / 8


def _row_bytes(problem: Problem) -> int:
    """Bytes of scratch memory of a row: logits, some twice, maxima and sums of tiles, two copies of its e, its dE."""
    vectors = 2 * padded(problem.d, problem.dtype) * problem.dtype.itemsize + problem.d * problem.dtype.itemsize
    logits = (pitch(problem.v) + wide_rows(problem)) * problem.dtype.itemsize
    return logits + 8 * cdiv(problem.v, _LEAST_TILE) + vectors


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

    Outputs and dE are 0 in rows that no chunk has. dC is the sum over the chunks so far, to which the product of the
    next one is added in place. Rows of the entries that are targets most often are summed in float32, too.
    """

    def __init__(self, e: Tensor, targets: Tensor, problem: Problem) -> None:
        n, k, wide = problem.n, problem.k, wide_rows(problem)
        lse, lse_low = e.new_zeros((2, n), dtype=torch.float32).unbind()
        self.outputs = Outputs(lse, e.new_zeros((n, k), dtype=torch.float32), lse_low)
        self._de = e.new_zeros((n, problem.d), dtype=problem.e_dtype) if problem.grad_e else None
        self._dc: Tensor | None = None
        self._entries = most_frequent(targets, problem.v, wide) if wide else None
        self._wide: Tensor | None = None  # the rows of dC of these entries
        self._dbias: Tensor | None = None

    def add(self, rows: RowsOfChunk, outputs: Outputs[Tensor], gradients: Gradients[Tensor]) -> None:
        """Take over the results of a chunk, but for its dC."""
        for name in ("lse", "nll", "lse_low"):
            _put(getattr(self.outputs, name), rows, getattr(outputs, name))
        if self._de is not None and gradients.de is not None:
            _put(self._de, rows, gradients.de)
        if self._dbias is not None and gradients.dbias is not None:
            self._dbias += gradients.dbias
        else:
            self._dbias = gradients.dbias

    def add_dc(self, dz: Tensor, e: Tensor) -> None:
        """Add dz^T e of a chunk to dC."""
        if self._dc is None:
            self._dc = narrow_product(dz.T, e)
        else:
            add_product(dz.T, e, self._dc)
        if self._entries is not None:
            self._wide = product(dz.index_select(1, self._entries).T, e, torch.float32, self._wide)

    @property
    def gradients(self) -> Gradients[Tensor]:
        """The gradients, once all chunks have been added."""
        if self._dc is not None and self._entries is not None and self._wide is not None:
            self._dc.index_copy_(0, self._entries, self._wide.to(self._dc.dtype))
        return Gradients(self._de, self._dc, self._dbias)


def most_frequent(targets: Tensor, v: int, count: int) -> Tensor:
    """The ``count`` entries out of ``v`` that are targets most often, those of lower number first among equals."""
    found = targets.reshape(-1)
    counts = found.new_zeros(v, dtype=torch.int32)  # torch.bincount would wait for the GPU
    counts.index_add_(0, found.clamp(min=0), (found >= 0).to(torch.int32))
    return counts.sort(descending=True, stable=True).indices[:count]


def _put(out: Tensor, rows: RowsOfChunk, values: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values)
