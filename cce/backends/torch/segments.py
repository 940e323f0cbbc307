"""The pieces of the vocabulary the backward walks through: dense runs, and single tiles with their live rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.torch.forward import chunks
from cce.problem import Inputs, Problem, Upstream
from cce.spec import Spec
from cce.worklist import target_positions


@dataclass(frozen=True)
class Segment:
    """Vocabulary tiles t0 to t1 (columns v0 to v1) whose live rows are the same.

    ``live`` (N,) bool marks them, None stands for all. ``rows`` (L,) int64, ascending, are their indices, made by
    :meth:`located` when the walk arrives: those of all tiles at once would take more than the logits.
    """

    t0: int
    t1: int
    v0: int
    v1: int
    live: Tensor | None = None
    rows: Tensor | None = None

    def located(self) -> Segment:
        """The segment with its rows."""
        return self if self.live is None else replace(self, rows=self.live.nonzero()[:, 0])


def segments(problem: Problem, spec: Spec, columns: int, row_live: Tensor | None) -> list[Segment]:
    """The whole vocabulary; neighbouring tiles that are live in all rows are joined up to ``columns``."""
    if row_live is None:
        return [Segment(k.t0, k.t1, k.v0, k.v1) for k in chunks(problem, spec, columns)]
    assert spec.block_v is not None
    live = [count for tiles in row_live.split(16) for count in tiles.sum(1).tolist()]
    found: list[Segment] = []
    for t, count in enumerate(live):
        v0, v1 = t * spec.block_v, min(problem.v, (t + 1) * spec.block_v)
        last = found[-1] if found else None
        whole = count == problem.n
        if whole and last is not None and last.live is None and _joins(last, v1, columns, spec.block_v):
            found[-1] = Segment(last.t0, t + 1, last.v0, v1)
        else:
            found.append(Segment(t, t + 1, v0, v1, None if whole else row_live[t]))
    return found


def _joins(last: Segment, v1: int, columns: int, block_v: int) -> bool:
    return v1 - last.v0 <= columns and (v1 - last.v0) % block_v == 0


class Targets:
    """The target entries of a problem, sorted by their place in the vocabulary.

    Each entry (i, k) subtracts ``g[i, k]`` from the gradient of its logit.
    """

    def __init__(self, inputs: Inputs[Tensor], upstream: Upstream[Tensor], found: list[Segment]) -> None:
        # An entry without gradient is no entry: its tile may be dead, and its row not among the segment's.
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
        """Position among the segment's rows, column within it, and value of the entries in segment ``index``."""
        here = slice(self._ends[index], self._ends[index + 1])
        row = self.row[here]
        if segment.rows is not None:
            row = torch.searchsorted(segment.rows, row)
        return row, self.place[here] - segment.v0, self.value[here]
