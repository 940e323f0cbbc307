"""The pieces of the vocabulary the backward walks through: dense runs, and single tiles with their live rows.

Rows are in the work list's order, in which those of a tile are whole blocks, most often neighbours: a slice then
selects them, and nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Problem, Upstream
from cce.backends.shared.worklist import target_positions
from cce.backends.torch.forward import chunks
from cce.spec import Spec


@dataclass(frozen=True)
class Segment:
    """Vocabulary tiles t0 to t1 (columns v0 to v1) with the same live row blocks, ``blocks``; None stands for all.

    ``rows`` are the rows of the blocks, set by :meth:`located` when the segment's turn comes: a slice if the blocks are
    neighbours, else (L,) int64, ascending. Indices of all segments at once would take more memory than the logits.
    """

    t0: int
    t1: int
    v0: int
    v1: int
    blocks: tuple[int, ...] | None = None
    rows: slice | Tensor = field(default_factory=lambda: slice(0, 0))

    def located(self, problem: Problem, spec: Spec, device: torch.device) -> Segment:
        """Return the segment with its rows set."""
        blocks, block_n = self.blocks, spec.block_n or 1
        if blocks is None:
            return replace(self, rows=slice(0, problem.n))
        if not blocks:
            return self
        runs = [slice(b * block_n, min(problem.n, (b + 1) * block_n)) for b in blocks]
        if blocks[-1] - blocks[0] + 1 == len(blocks):
            return replace(self, rows=slice(runs[0].start, runs[-1].stop))
        return replace(self, rows=torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs]))

    def __len__(self) -> int:
        return len(self.rows) if isinstance(self.rows, Tensor) else self.rows.stop - self.rows.start

    def part(self, n0: int, n1: int) -> slice | Tensor:
        """Rows n0 to n1, counted within the segment."""
        if isinstance(self.rows, Tensor):
            return self.rows[n0:n1]
        return slice(self.rows.start + n0, self.rows.start + n1)


def segments(problem: Problem, spec: Spec, columns: int, live: Tensor | None) -> list[Segment]:
    """Divide the whole vocabulary into segments, joining neighbouring tiles live in all rows up to ``columns``.

    ``live`` (B, T) bool marks the live tiles of every row block; None stands for all.
    """
    if live is None:
        return [Segment(k.t0, k.t1, k.v0, k.v1) for k in chunks(problem, spec, columns)]
    assert spec.block_v is not None
    found: list[Segment] = []
    for t, on in enumerate(live.T.tolist()):
        v0, v1 = t * spec.block_v, min(problem.v, (t + 1) * spec.block_v)
        last = found[-1] if found else None
        if not all(on):
            found.append(Segment(t, t + 1, v0, v1, tuple(b for b, is_live in enumerate(on) if is_live)))
        elif last is not None and last.blocks is None and _joins(last, v1, columns, spec.block_v):
            found[-1] = Segment(last.t0, t + 1, last.v0, v1)
        else:
            found.append(Segment(t, t + 1, v0, v1))
    return found


def _joins(last: Segment, v1: int, columns: int, block_v: int) -> bool:
    return v1 - last.v0 <= columns and (v1 - last.v0) % block_v == 0


class Targets:
    """The target entries of a problem, sorted by their place in the vocabulary.

    Each entry (i, k) subtracts ``g[i, k]`` from the gradient of its logit.
    """

    def __init__(self, inputs: Inputs[Tensor], upstream: Upstream[Tensor], found: list[Segment]) -> None:
        # Drop entries without a gradient: their tile may be dead, and their row not in the segment.
        place = torch.where(upstream.g == 0, -1, target_positions(inputs))
        k = place.shape[1]
        order = place.flatten().argsort(stable=True)
        self.place = place.flatten()[order]
        self.row = order // k
        self.value = upstream.g.flatten()[order].neg()
        ends = torch.tensor([segment.v1 for segment in found], device=place.device)
        first = int((self.place < 0).sum())
        self._ends = [first, *torch.searchsorted(self.place, ends).tolist()]

    def of(self, index: int, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column within the segment, and value, of the entries in segment ``index``."""
        here = slice(self._ends[index], self._ends[index + 1])
        row, rows = self.row[here], segment.rows
        row = torch.searchsorted(rows, row) if isinstance(rows, Tensor) else row - rows.start
        return row, self.place[here] - segment.v0, self.value[here]
