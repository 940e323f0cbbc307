"""Correct results to compare with: float64 on a sample of rows and of tiles of the vocabulary.

The gradients of a big problem are too large to compute in float64, so some rows of dE and some tiles of dC represent
all. Two answers are computed for each sample: the true gradient, and the one a filter should give, in which the live
tiles keep their softmax and the dead ones have its mean over the tile (compensated) or nothing. The first shows the
accuracy of a result, the second whether a backend computes what it claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cce.backends.problem import Problem, Upstream
from cce.benchmarks.float64 import pieces, relative_error, row_lse
from cce.benchmarks.heads import CHUNK_LOGITS, Head
from cce.frontend.decision import Request, decide
from cce.frontend.mean_logit import mean_logit_order
from cce.frontend.operators import forward_of
from cce.reference.roundoff import LAMBDA
from cce.spec import Spec

ROWS, TILES = 64, 16  # sizes of a sample
#: Values of the conformance kit's a-priori bounds on small heads (docs/numerics.md): the least allowed errors.
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}

Gradients = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Live:
    """The live tiles of a filter: (T, N) for each row, and whether dead ones are compensated."""

    rows: Tensor
    compensate: bool

    def fraction(self, v: int, block_v: int) -> float:
        """Share of the logits in live tiles."""
        width = torch.full((len(self.rows),), float(block_v), dtype=torch.float64)
        width[-1] = v - (len(self.rows) - 1) * block_v
        return float((self.rows.sum(1).cpu().double() * width).sum() / (self.rows.shape[1] * v))


@dataclass(frozen=True)
class Sample:
    """Sampled rows of dE and entries of dC, in whole tiles of an order of the vocabulary.

    Attributes:
        order: (V,) vocabulary in the order of the tiles.
        block_v: number of entries in a tile.
        rows: (R,) sampled rows of e.
        tiles: numbers of the sampled tiles.
        exact: float64 dE of the rows, dC of the entries.
        dense: relative errors of dE and dC computed densely in the inputs' dtype.
    """

    order: Tensor
    block_v: int
    rows: Tensor
    tiles: list[int]
    exact: Gradients
    dense: tuple[float, float]

    @property
    def entries(self) -> Tensor:
        """Entries of the sampled tiles, (S,)."""
        return torch.cat([self.order[t * self.block_v : (t + 1) * self.block_v] for t in self.tiles])

    def of(self, gradients: tuple[Tensor, ...]) -> Gradients:
        """Sampled rows and entries of dE and dC."""
        return gradients[0][self.rows], gradients[1][self.entries]

    def errors(self, gradients: tuple[Tensor, ...], expected: Gradients | None = None) -> tuple[float, float]:
        """Relative errors of dE and dC, against the true gradients or those ``expected``."""
        de, dc = (relative_error(f, x) for f, x in zip(self.of(gradients), expected or self.exact, strict=True))
        return de, dc


@dataclass
class Oracle:
    """float64 answers for one head; samples are made when a spec's tiles first need them."""

    head: Head
    lse: Tensor = field(init=False)
    loss: float = field(init=False)
    _samples: dict[tuple[str, int], Sample] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        e, c, targets = self.head.e, self.head.c, self.head.targets
        self.lse = row_lse(e, c)
        of_target = torch.cat(
            [(x.double() * c[t].double()).sum(1) for x, t in zip(e.split(4096), targets.split(4096), strict=True)]
        )
        self.loss = float((self.lse - of_target).mean())

    def sample(self, spec: Spec | None = None) -> Sample:
        """Sample for a resolved ``spec``; None stands for tiles by mean logit."""
        natural = spec is not None and spec.filter != "none" and spec.vocab_order == "natural"
        key = ("natural" if natural else "mean_logit", (spec and spec.block_v) or 128)
        if key not in self._samples:
            self._samples[key] = self._made(*key)
        return self._samples[key]

    def _made(self, name: str, block_v: int) -> Sample:
        e, c, targets = self.head.e, self.head.c, self.head.targets
        order = mean_logit_order(e, c, None, targets[:, None])
        if name == "natural":
            order = torch.arange(len(c), device=c.device)
        rows = _spread(len(e), ROWS, e.device)
        tiles = _spread(-(-len(c) // block_v), TILES, e.device).tolist()
        made = Sample(order, block_v, rows, tiles, (e, c), (0.0, 0.0))
        exact = self.gradients(made)
        dense = tuple(relative_error(f, x) for f, x in zip(self._dense(made), exact, strict=True))
        return Sample(order, block_v, rows, tiles, exact, (dense[0], dense[1]))

    def gradients(self, sample: Sample, live: Live | None = None) -> Gradients:
        """Gradients dE and dC of a sample in float64, of the loss or of a filter with these live tiles."""
        return self._de(sample, live), self._dc(sample, live)

    def _de(self, sample: Sample, live: Live | None) -> Tensor:
        e, c, rows = self.head.e[sample.rows].double(), self.head.c, sample.rows
        p = torch.cat([torch.exp(e @ piece.T - self.lse[rows, None]) for _, piece in pieces(c)], 1)  # [R, V]
        if live is not None:
            p = _filtered(p[:, sample.order], live.rows[:, rows].T, sample.block_v, live.compensate)
            p = torch.empty_like(p).scatter_(1, sample.order.expand_as(p), p)
        p[torch.arange(len(p), device=p.device), self.head.targets[rows]] -= 1
        return sum((p[:, v0 : v0 + len(piece)] @ piece for v0, piece in pieces(c)), torch.zeros_like(e)) / len(self.lse)

    def _dc(self, sample: Sample, live: Live | None) -> Tensor:
        e, targets, found = self.head.e.double(), self.head.targets, []
        for t in sample.tiles:
            entries = sample.order[t * sample.block_v : (t + 1) * sample.block_v]
            p = torch.exp(e @ self.head.c[entries].double().T - self.lse[:, None])  # [N, BLOCK_V]
            if live is not None:
                p = _filtered(p, live.rows[t, :, None], len(entries), live.compensate)
            p -= (targets[:, None] == entries).double()
            found.append(p.T @ e / len(e))
        return torch.cat(found)

    def _dense(self, sample: Sample) -> Gradients:
        """Gradients of the sample by a dense computation in the inputs' dtype: the cost of rounding alone."""
        (e, c, targets), dtype, n = (self.head.e, self.head.c, self.head.targets), self.head.e.dtype, len(self.lse)
        rows, entries, wide = sample.rows, sample.entries, torch.promote_types(dtype, torch.float32)
        # Use the rounded logits: with another log-sum-exp, rows of the softmax would not sum to 1.
        lse = torch.cat([(x @ c.T).to(wide).logsumexp(1) for x in e.split(max(1, CHUNK_LOGITS // len(c)))])
        p = (e[rows] @ c.T).to(wide).sub_(lse[rows, None]).exp_()
        p[torch.arange(len(p), device=p.device), targets[rows]] -= 1
        de = (p / n).to(dtype) @ c
        del p
        q = (e @ c[entries].T).to(wide).sub_(lse[:, None]).exp_()
        q -= (targets[:, None] == entries).to(q.dtype)
        return de, (q / n).to(dtype).T @ e


def floor(dtype: torch.dtype, v: int) -> float:
    """Relative error that is always allowed: that of the dtype, and of two sums over the vocabulary in float32."""
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return FLOOR[dtype] + 2 * LAMBDA * math.sqrt(v) * unit


def live_tiles(head: Head, backend: str, problem: Problem, spec: Spec) -> Live:
    """Live tiles of a backend's filter, from the same forward and work list as in its backward."""
    targets, grads = head.targets[:, None], "e,c"
    request = Request(backend, spec.key, problem.softcap, problem.logit_scale, "", grads)
    call = decide(head.e, head.c, None, targets, request.key)
    found = forward_of(call, head.e, head.c, None, targets, None, None)
    assert found is not None, "a head without targets"
    each = torch.full_like(found.outputs.lse, 1 / len(targets))
    work = call.backend.work_list(found.inputs, found.problem, call.spec, found.maps, Upstream(each, each[:, None]))
    return Live(work.row_live, spec.compensate)


def _filtered(p: Tensor, live: Tensor, block_v: int, compensate: bool) -> Tensor:
    """Return ``p`` (M, V) in the order of the tiles; tiles dead in ``live`` (M, T) have their mean or nothing."""
    m, v, tiles = *p.shape, live.shape[1]
    padded = torch.nn.functional.pad(p, (0, tiles * block_v - v)).reshape(m, tiles, block_v)
    width = torch.full((tiles,), float(block_v), dtype=p.dtype, device=p.device)
    width[-1] = v - (tiles - 1) * block_v
    instead = padded.sum(2) / width if compensate else torch.zeros_like(live, dtype=p.dtype)
    return torch.where(live[:, :, None], padded, instead[:, :, None]).reshape(m, -1)[:, :v]


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """Numbers below ``size``, at most ``count`` of them, evenly spread from the first to the last."""
    return torch.linspace(0, size - 1, min(count, size), dtype=torch.float64, device=device).round().long().unique()
