"""The work list: tiles that the backward computes (docs/algorithm.md, step 3), for every backend that takes tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Maps, Problem, Upstream
from cce.spec import Spec


@dataclass(frozen=True)
class WorkList:
    """The live tiles of one backward.

    Attributes:
        row_order: (N,) int64; block b holds rows ``row_order[b * BLOCK_N : (b + 1) * BLOCK_N]``.
        live: (B, T) bool, whether tile (b, t) is live.
        row_live: (T, N) bool, the same per row in the rows' own order; False for rows that are not in use.
    """

    row_order: Tensor
    live: Tensor
    row_live: Tensor


def work_list(
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
    in_use: Tensor | None = None,
) -> WorkList:
    """Find the live tiles under a resolved ``spec``, without a host synchronisation, in up to 3 bytes per (row, tile).

    Rows that are not ``in_use`` (N,) come last, so that the other rows form the same blocks as in a call without them.
    """
    row_order, live = live_blocks(inputs, problem, spec, maps, upstream, in_use)
    places = torch.arange(problem.n, device=row_order.device)
    block_of_row = torch.empty_like(row_order).scatter_(0, row_order, places // _size(spec.block_n))
    row_live = live.index_select(1, block_of_row)
    return WorkList(row_order, live.T, row_live if in_use is None else row_live.logical_and_(in_use))


def live_blocks(
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
    in_use: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The row order (N,) and the live tiles (T, B) of :func:`work_list`."""
    hit = _hits(inputs, problem, spec, maps, upstream)  # (T, N)
    n, block_n = problem.n, min(problem.n, _size(spec.block_n))  # a block beyond the rows takes no memory
    row_order = _row_order(hit, spec, in_use)
    blocks = -(-n // block_n)
    hit = hit.index_select(1, row_order)  # one (T, N) at a time: rebinding frees the previous one
    if blocks * block_n != n:
        hit = torch.nn.functional.pad(hit, (0, blocks * block_n - n))
    return row_order, hit.view(-1, blocks, block_n).any(-1)


def _row_order(hit: Tensor, spec: Spec, in_use: Tensor | None) -> Tensor:
    """Order of the rows, (N,): by their number of hits (stable), or as they are."""
    tiles, n = hit.shape
    if spec.row_order != "live" or _size(spec.block_n) == 1:
        return torch.arange(n, device=hit.device) if in_use is None else (~in_use).to(torch.int8).argsort(stable=True)
    # A sum of flags widens them first, so take a few tiles at a time.
    step = max(16, spec.scratch_bytes // (16 * n))
    hits = torch.stack([part.sum(0, dtype=torch.int32) for part in hit.split(step)]).sum(0)
    if in_use is not None:
        hits = torch.where(in_use, hits, tiles + 1)
    return hits.argsort(stable=True)


def live_fraction(work: WorkList, problem: Problem, spec: Spec) -> float:
    """Area of the live tiles divided by N V."""
    block_v = _size(spec.block_v)
    widths = torch.full((spec.tiles(problem.v),), block_v, dtype=torch.float64, device="cpu")
    widths[-1] = problem.v - (len(widths) - 1) * block_v
    rows = work.row_live.sum(1).to("cpu", torch.float64)
    return float((rows * widths).sum() / (problem.n * problem.v))


def target_positions(inputs: Inputs[Tensor]) -> Tensor:
    """Place of each target in the vocabulary order of the tiles, (N, K) int64; -1 stays -1."""
    if inputs.vocab_order is None:
        return inputs.targets
    order = inputs.vocab_order
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.where(inputs.targets < 0, inputs.targets, place[inputs.targets.clamp(min=0)])


def _hits(
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    maps: Maps[Tensor],
    upstream: Upstream[Tensor],
) -> Tensor:
    """Mask (T, N) of the tiles each row needs, by the filter's rule or for a target in them."""
    assert maps.tile_mass is not None
    hit = ~(maps.tile_mass >= 0)  # true for a row of NaN, too
    # A row that receives no gradient (a masked token, say) has nothing to compute; one whose gradient is NaN or inf
    # must be computed in every tile, whatever their mass.
    active = (upstream.a != 0) | (upstream.g != 0).any(1)
    everywhere = ~upstream.a.isfinite()
    if upstream.h is not None:
        active |= upstream.h != 0
        everywhere |= ~upstream.h.isfinite()
    hit |= everywhere
    # Targets mark their tile; targets that do not count mark an extra row T, cut off afterwards.
    tiles = hit.shape[0]
    counts = (inputs.targets >= 0) & (upstream.g != 0)
    tile = torch.where(counts, target_positions(inputs) // _size(spec.block_v), tiles)
    marks = torch.zeros(tiles + 1, problem.n, dtype=torch.bool, device=hit.device)
    marks.scatter_(0, tile.T, True)
    return hit.logical_or_(marks[:tiles]).logical_and_(active)


def _size(block: int | None) -> int:
    assert block is not None, "a resolved spec is needed"
    return block
