"""Compensation for skipped tiles: their mass times the tile's mean row (docs/algorithm.md, step 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.problem import Maps, Outputs, Problem, Upstream
from cce.spec import Spec


def dead_mass(
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
    row_live: Tensor,
    t0: int,
    t1: int,
) -> Tensor:
    """Sum of dx over the columns of each skipped tile, (t1 - t0, N); 0 where the tile is live.

    ``m_it = logit_scale * softcap'(zbar) * tile_mass * (a + h (tile_entropy - log tile_mass - H))``

    zbar, the log of the tile's mean exp(z), stands for its logits in the softcap's derivative.
    """
    assert maps.tile_mass is not None
    p = maps.tile_mass[t0:t1].clamp(min=0).to(upstream.a.dtype)  # (t, N); negative for tiles hit
    entropy = None if maps.tile_entropy is None else maps.tile_entropy[t0:t1]
    mass = p * dead_weight(problem, spec, outputs, p, entropy, upstream, t0, t1) * problem.logit_scale
    return mass.masked_fill_(row_live[t0:t1], 0)


def dead_weight(
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    p: Tensor,
    tile_entropy: Tensor | None,
    upstream: Upstream[Tensor],
    t0: int,
    t1: int,
) -> Tensor:
    """Factor of the mass ``p`` of tiles t0 to t1, without the scale: (N,), or (t1 - t0, N) if it depends on the tile.

    ``p`` and ``tile_entropy`` (t1 - t0, N) belong to these tiles; all arguments have their rows in the same order,
    whichever it is.
    """
    weight = upstream.a
    if upstream.h is not None:
        assert tile_entropy is not None and outputs.entropy is not None
        # A tile of masked entries has log p = -inf and no mass: keep 0 * inf out.
        weight = weight + upstream.h * (tile_entropy - p.log().clamp_(min=-1e4) - outputs.entropy)
    if problem.softcap is not None:
        zbar = p.log() + outputs.lse - columns_of_tiles(problem, spec, t0, t1, p).log()[:, None]
        weight = weight * (1 - (zbar / problem.softcap).clamp(-1, 1).square())
    return weight


def columns_of_tiles(problem: Problem, spec: Spec, t0: int, t1: int, like: Tensor) -> Tensor:
    """Number of columns of each tile, (t1 - t0,): BLOCK_V, fewer in the last; dtype and device of ``like``."""
    assert spec.block_v is not None
    columns = torch.full((t1 - t0,), float(spec.block_v), dtype=like.dtype, device=like.device)
    if t1 == spec.tiles(problem.v):
        columns[-1] = problem.v - (t1 - 1) * spec.block_v
    return columns
