"""The work list, the tiles that the backward computes, made from the forward's maps (docs/design.md, 4.1).

Every backend must find the same list, apart from tiles within rounding of the threshold;
:func:`threshold_margin` measures how near they are, :func:`clear_threshold` finds a threshold far from all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce.backends.problem import Inputs, Outputs, Problem, Upstream
from cce.reference.dense import IEEE
from cce.spec import Spec

Array = np.ndarray


@dataclass(frozen=True)
class Tiling:
    """The B x T tiles of a problem, BLOCK_N tokens by BLOCK_V vocabulary entries each, the last ones ragged.

    Attributes:
        N, V: numbers of rows and vocabulary entries.
        BLOCK_N, BLOCK_V: size of a tile.
        order: (V,) vocabulary entries in the order the tiles take them.
    """

    N: int
    V: int
    BLOCK_N: int
    BLOCK_V: int
    order: Array

    @classmethod
    def of(cls, inputs: Inputs[Array], problem: Problem, spec: Spec) -> Tiling:
        assert spec.block_n is not None and spec.block_v is not None, "the reference needs a resolved spec"
        order = np.arange(problem.v) if inputs.vocab_order is None else inputs.vocab_order
        return cls(problem.n, problem.v, spec.block_n, spec.block_v, order)

    @property
    def B(self) -> int:
        """Number of token blocks."""
        return -(-self.N // self.BLOCK_N)

    @property
    def T(self) -> int:
        """Number of vocabulary blocks."""
        return -(-self.V // self.BLOCK_V)

    @property
    def cols(self) -> Array:
        """Number of real columns of each vocabulary block, (T,): BLOCK_V except in the last."""
        return np.minimum(self.BLOCK_V, self.V - np.arange(self.T) * self.BLOCK_V)

    @property
    def tile_of(self) -> Array:
        """Vocabulary block of each entry, (V,)."""
        tile_of = np.empty(self.V, dtype=np.int64)
        tile_of[self.order] = np.arange(self.V) // self.BLOCK_V
        return tile_of

    def tokens(self, b: int, row_order: Array) -> Array:
        """Rows of token block ``b``, (rows,)."""
        return row_order[b * self.BLOCK_N : (b + 1) * self.BLOCK_N]

    def vocabulary(self, t: int) -> Array:
        """Entries of vocabulary block ``t``, (cols,)."""
        return self.order[t * self.BLOCK_V : (t + 1) * self.BLOCK_V]


@dataclass(frozen=True)
class TileMaps:
    """Statistics of each row and vocabulary block, from which all else is computed; (T, N) each, as logarithms.

    The block's log-sum-exp is ``tile_max + tile_log_sum``, kept as two numbers: a large maximum would round the other
    away.

    Attributes:
        tile_max: largest logit of the row in vocabulary block t.
        tile_log_sum: log-sum-exp of the block's logits, less tile_max; 0 where all are -inf.
        tile_entropy: entropy of the row's softmax restricted to the block.
    """

    tile_max: Array
    tile_log_sum: Array
    tile_entropy: Array

    @IEEE
    def log_max(self, lse: Array, lse_low: Array, t: Any = slice(None)) -> Array:
        """Logarithm of the row's largest p in block t; of all blocks by default."""
        found: Array = (self.tile_max[t] - lse) - lse_low
        return found

    @IEEE
    def log_mass(self, lse: Array, lse_low: Array, t: Any = slice(None)) -> Array:
        """Logarithm of the row's probability in block t, ``tile_lse - lse``; of all blocks by default."""
        return self.log_max(lse, lse_low, t) + self.tile_log_sum[t]

    @IEEE
    def sum_about(self, m: Array, t: int) -> Array:
        """Sum of ``exp(z - m)`` over block t, (N,)."""
        found: Array = np.exp((self.tile_max[t] - np.where(np.isneginf(m), 0.0, m)) + self.tile_log_sum[t])
        return found


@dataclass(frozen=True)
class WorkList:
    """The tiles that the backward has to compute.

    Attributes:
        hit: (T, N) bool, whether the row has something to compute in the tile.
        row_order: (N,) int64 permutation; token block b is ``row_order[b * BLOCK_N : (b + 1) * BLOCK_N]``.
        live: (B, T) bool, whether some row of the block hits the tile.
        row_live: (T, N) bool, ``live`` for each row, in the rows' original order.
        live_fraction: area of the live tiles divided by N V; 0 if there are no rows.
    """

    hit: Array
    row_order: Array
    live: Array
    row_live: Array
    live_fraction: float


@IEEE
def work_list(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
) -> WorkList:
    """Find the live tiles and the order of the rows.

    Args:
        inputs, problem, spec: those of the forward; ``spec`` is resolved.
        outputs, maps: what the forward returned.
        upstream: a row whose gradients are all zero hits nothing.

    Source: docs/design.md, section 4.1; the rule "element" is that of arXiv 2411.09009, section 4.3.
    """
    tiling = Tiling.of(inputs, problem, spec)
    row_order = np.arange(tiling.N)
    if spec.filter == "none":
        hit = np.ones((tiling.T, tiling.N), dtype=bool)
    else:
        undecided, held = _open_and_held(inputs, tiling, upstream)
        # hit_it: the filter's quantity exceeds the threshold, or the tile holds a target of the row.
        hit = held | (undecided & (filter_hits(spec, outputs, maps) | _everywhere(upstream)))
        if spec.row_order == "live":
            # Rows with similar numbers of hits share a block; the sort is stable, so that all backends agree on ties.
            row_order = np.argsort(hit.sum(axis=0), kind="stable")
    return _blocks(tiling, hit, row_order)


def _blocks(tiling: Tiling, hit: Array, row_order: Array) -> WorkList:
    """Make the work list from the hits: a tile is live if one of its rows hits it."""
    live = np.zeros((tiling.B, tiling.T), dtype=bool)
    row_live = np.zeros_like(hit)
    area = 0
    for b in range(tiling.B):
        tokens = tiling.tokens(b, row_order)
        live[b] = hit[:, tokens].any(axis=1)
        row_live[:, tokens] = live[b][:, None]
        area += len(tokens) * int(tiling.cols[live[b]].sum())
    return WorkList(hit, row_order, live, row_live, area / max(tiling.N * tiling.V, 1))


def _open_and_held(inputs: Inputs[Array], tiling: Tiling, upstream: Upstream[Array]) -> tuple[Array, Array]:
    """Pairs (T, N) that the threshold decides, and pairs that are hits because they hold a target."""
    # active_i: some gradient of the row is not zero, apart from that of weighted_logit, which is added outside the
    # tiles.
    active = (upstream.a != 0) | (upstream.g != 0).any(axis=1)
    if upstream.h is not None:
        active = active | (upstream.h != 0)
    held = np.zeros((tiling.T, tiling.N), dtype=bool)
    i, k = np.nonzero((inputs.targets >= 0) & (upstream.g != 0))
    held[tiling.tile_of[inputs.targets[i, k]], i] = True
    return active[None, :] & ~held, held


def _everywhere(upstream: Upstream[Array]) -> Array:
    """Mask of the rows whose gradient is NaN or inf, (N,): it is NaN or inf in every tile."""
    bad = ~np.isfinite(upstream.a)
    return bad if upstream.h is None else bad | ~np.isfinite(upstream.h)


@IEEE
def filter_hits(spec: Spec, outputs: Outputs[Array], maps: TileMaps) -> Array:
    """Mask of the pairs whose filter quantity exceeds the threshold, or is NaN, (T, N)."""
    assert spec.threshold is not None
    hits: Array = ~(np.exp(_log_quantity(spec, outputs, maps)) <= spec.threshold)
    return hits


def _log_quantity(spec: Spec, outputs: Outputs[Array], maps: TileMaps) -> Array:
    """Logarithm of the filter's quantity q, (T, N): largest p of the row in the tile, or its mass there."""
    assert outputs.lse_low is not None
    quantity = maps.log_max if spec.filter == "element" else maps.log_mass
    return quantity(outputs.lse, outputs.lse_low)


def _log_decisions(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
) -> Array:
    """Logarithms of all q that are compared with the threshold, ascending and finite."""
    if spec.filter == "none":
        return np.empty(0)
    undecided, _ = _open_and_held(inputs, Tiling.of(inputs, problem, spec), upstream)
    log_q = _log_quantity(spec, outputs, maps)[undecided]
    return np.unique(log_q[np.isfinite(log_q)])


@IEEE
def threshold_margin(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
) -> float:
    """Least ``|log(q / threshold)|`` over the pairs that the threshold decides; inf where there are none.

    A backend whose error in ``tile_max - lse`` is less than this finds the same live set.
    """
    assert spec.threshold is not None
    log_q = _log_decisions(inputs, problem, spec, outputs, maps, upstream)
    return float(np.abs(log_q - math.log(spec.threshold)).min(initial=np.inf))


@IEEE
def clear_threshold(
    inputs: Inputs[Array],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Array],
    maps: TileMaps,
    upstream: Upstream[Array],
    near: float,
    margin: float = 1e-3,
) -> float:
    """The threshold nearest to ``near``, in log, that is ``margin`` or more away from every q it decides.

    Args:
        inputs, problem, spec, outputs, maps, upstream: as in :func:`work_list`; ``spec.threshold`` is not read.
        near: the threshold wanted, in (0, 1).
        margin: least ``|log(q / threshold)|``: more than a backend's largest error in ``tile_max - lse``.

    Returns:
        The middle of a gap, in log, between consecutive q's that is at least two margins wide; ``near`` if nothing is
        decided. With many q's the gap may be far away: check the live fraction.
    """
    log_q = _log_decisions(inputs, problem, spec, outputs, maps, upstream)
    if log_q.size == 0:
        return near
    # Below the least q and above the largest (but below 1) there is room too.
    edges = np.concatenate([[log_q[0] - 4 * margin], log_q, [min(log_q[-1] + 4 * margin, 0.0)]])
    middles = ((edges[:-1] + edges[1:]) / 2)[np.diff(edges) >= 2 * margin]
    return math.exp(middles[np.abs(middles - math.log(near)).argmin()])
