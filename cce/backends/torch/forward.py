"""The forward: log-sum-exp of every tile, then of every row; only one piece of the logits exists at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.backends.shared.pair import finite, joined, pair
from cce.backends.shared.weighted_logit import weighted_logit
from cce.backends.shared.worklist import target_positions
from cce.backends.torch.arithmetic import Arithmetic, Rows, along_vocabulary, gathered
from cce.backends.torch.logits import logits_
from cce.backends.torch.plan import Plan
from cce.spec import Spec


@dataclass(frozen=True)
class Chunk:
    """Whole vocabulary tiles t0 to t1, covering columns v0 to v1; a ragged last tile is a chunk of its own."""

    t0: int
    t1: int
    v0: int
    v1: int


def chunks(problem: Problem, spec: Spec, columns: int) -> list[Chunk]:
    """Divide the vocabulary into chunks of at most ``columns`` columns (a multiple of BLOCK_V)."""
    assert spec.block_v is not None
    block_v, whole = spec.block_v, problem.v // spec.block_v
    step = columns // block_v
    starts = [(t0, min(whole, t0 + step)) for t0 in range(0, whole, step)]
    found = [Chunk(t0, t1, t0 * block_v, t1 * block_v) for t0, t1 in starts]
    if problem.v % block_v:
        found.append(Chunk(whole, whole + 1, whole * block_v, problem.v))
    return found


def forward(inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
    """Compute the outputs of all rows, a block of rows at a time; fill ``maps``."""
    arithmetic = Arithmetic.choose(problem, spec)
    plan = Plan.choose(problem, spec, gathered(inputs))
    vocabulary = chunks(problem, spec, plan.columns)
    rows = Rows(inputs, arithmetic, keep=False)
    targets = target_positions(inputs)
    closed_form = None
    if "weighted_logit" in problem.outputs and problem.softcap is None:
        closed_form = weighted_logit(inputs, problem, spec)  # before the buffer takes the memory
    buffer = inputs.e.new_empty(plan.rows * plan.columns, dtype=arithmetic.result)
    blocks = []
    for n0, n1 in plan.row_blocks(problem.n):
        block = RowBlock(inputs, problem, spec, arithmetic, targets[n0:n1], n0)
        e = rows.block(n0, n1)
        for chunk in vocabulary:
            c = arithmetic.columns(inputs, chunk.v0, chunk.v1)
            out = buffer[: (n1 - n0) * (chunk.v1 - chunk.v0)].view(n1 - n0, chunk.v1 - chunk.v0)
            z = logits_(problem, arithmetic, e, c, arithmetic.bias(inputs, chunk.v0, chunk.v1), out)
            block.add(chunk, z, maps)
        blocks.append(block.finish(maps))
    outputs = _concatenate(blocks)
    return outputs if closed_form is None else replace(outputs, weighted_logit=closed_form)


def weights_along(inputs: Inputs[Tensor], problem: Problem, v0: int, v1: int, like: Tensor) -> Tensor:
    """Logit weights u of a chunk, (v1 - v0,); 1 / V each if none are given."""
    if inputs.logit_weight is None:
        return like.new_full((v1 - v0,), 1.0 / problem.v)
    return along_vocabulary(inputs, inputs.logit_weight, v0, v1).to(like.dtype)


class RowBlock:
    """Running sums of one block of rows along the vocabulary."""

    def __init__(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, arithmetic: Arithmetic, targets: Tensor, n0: int
    ) -> None:
        n, like = len(targets), inputs.e.new_empty(0, dtype=arithmetic.result)
        self.inputs, self.problem, self.spec, self.targets, self.n0 = inputs, problem, spec, targets, n0
        self.tiled = bool(problem.maps(spec))
        self.online = spec.lse_accumulation == "online"
        self.parts: list[Sums] = []  # one tile for each chunk
        self.tiles: list[tuple[Chunk, Sums]] = []  # all tiles of each chunk
        self.target_logits = like.new_zeros(targets.shape)
        self.weighted = like.new_zeros(n) if _capped_weights(problem) else None
        self.best = like.new_full((n,), -torch.inf)
        self.prediction = torch.zeros(n, dtype=torch.int64, device=like.device)

    def add(self, chunk: Chunk, z: Tensor, maps: Maps[Tensor]) -> None:
        """Add one chunk's logits (rows, columns), which are overwritten."""
        self._targets(chunk, z)
        if "prediction" in self.problem.outputs:
            self._prediction(chunk, z)
        if self.weighted is not None:
            self.weighted += z @ weights_along(self.inputs, self.problem, chunk.v0, chunk.v1, z)
        # Without maps, single tiles are not needed: the chunk is one tile.
        tiles = z.view(len(z), chunk.t1 - chunk.t0 if self.tiled else 1, -1)
        found = tile_sums(tiles, entropy="entropy" in self.problem.outputs)
        if self.tiled:
            self.tiles.append((chunk, found))
        if maps.tile_entropy is not None and found.entropy is not None:
            maps.tile_entropy[chunk.t0 : chunk.t1, self.n0 : self.n0 + len(z)] = found.entropy.T
        # Keep one partial sum per chunk: those of all tiles would be larger than the logits of a piece.
        self.parts.append(_join([found]))
        if self.online:
            self.parts = [_join(self.parts)]

    def finish(self, maps: Maps[Tensor]) -> Outputs[Tensor]:
        row = _join(self.parts)
        for chunk, tiles in self.tiles:
            self._fill(maps, chunk, tiles, row)
        lse, lse_low = pair(row.max[:, 0], row.log_sum[:, 0])
        # A target's logit is one of those summed, so only the rounding of the logarithm can make nll negative.
        nll = (row.log_sum + (row.max - self.target_logits)).clamp_(min=0).masked_fill_(self.targets < 0, 0)
        return Outputs(
            lse,
            nll,
            lse_low,
            None if row.entropy is None else row.entropy[:, 0].masked_fill(~lse.isfinite(), torch.nan),
            self.weighted,
            self._entries() if "prediction" in self.problem.outputs else None,
        )

    def _fill(self, maps: Maps[Tensor], chunk: Chunk, tiles: Sums, row: Sums) -> None:
        """Fill in the masses of a chunk's tiles; the filter compares differences from the row's log-sum-exp."""
        assert maps.tile_mass is not None and self.spec.threshold is not None
        log_max = (tiles.max - row.max) - row.log_sum  # log of the largest p
        log_mass = torch.where(tiles.max == -torch.inf, log_max, log_max + tiles.log_sum)
        quantity = log_max if self.spec.filter == "element" else log_mass
        mass = log_mass.exp()
        mass = torch.where(quantity <= math.log(self.spec.threshold), mass, -mass.clamp(min=LEAST_HIT))
        maps.tile_mass[chunk.t0 : chunk.t1, self.n0 : self.n0 + len(mass)] = mass.T

    def _targets(self, chunk: Chunk, z: Tensor) -> None:
        # Read from the same accumulator as the log-sum-exp, so that lse - z is never negative.
        column = self.targets - chunk.v0
        inside = (column >= 0) & (column < z.shape[1])
        found = z.gather(1, column.clamp(0, z.shape[1] - 1))
        self.target_logits = torch.where(inside, found, self.target_logits)

    def _prediction(self, chunk: Chunk, z: Tensor) -> None:
        value, column = z.max(1)
        better = value > self.best
        self.best = torch.where(better, value, self.best)
        self.prediction = torch.where(better, column + chunk.v0, self.prediction)

    def _entries(self) -> Tensor:
        order = self.inputs.vocab_order
        return self.prediction if order is None else order[self.prediction]


@dataclass(frozen=True)
class Sums:
    """Statistics of some rows in some tiles, (rows, tiles) each.

    Attributes:
        max: m, the largest logit; -inf where all are -inf.
        log_sum: log sum exp(z - m); 0 where m is -inf.
        entropy: entropy of the softmax within the tile; or None.
    """

    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None


def tile_sums(z: Tensor, entropy: bool) -> Sums:
    """Statistics of every tile of ``z`` (rows, tiles, BLOCK_V), which is overwritten.

    With s = sum exp(z - m): entropy = log s + sum exp(z - m) (m - z) / s. Every term of it is non-negative, so it
    cannot come out below 0.
    """
    m = z.amax(-1)  # (rows, tiles)
    # A tile of masked entries has m = -inf; a finite shift gives exp(-inf) = 0, where -inf + inf would be NaN.
    z.sub_(finite(m)[..., None])
    if not entropy:
        return Sums(m, _log(m, z.exp_().sum(-1)), None)
    exp = z.exp()
    s = exp.sum(-1)
    gap = -exp.mul_(z.clamp_(min=torch.finfo(z.dtype).min)).sum(-1)
    log_s = _log(m, s)
    return Sums(m, log_s, torch.where(m == -torch.inf, 0.0, log_s + gap / s))


def _log(m: Tensor, s: Tensor) -> Tensor:
    """Return log s; 0 where there is nothing to sum."""
    return s.log().masked_fill_(m == -torch.inf, 0)


def _join(parts: list[Sums]) -> Sums:
    """Statistics of the union of all tiles, (rows, 1), by the chain rule of the entropy.

    H = sum_t w_t (H_t - log w_t), w_t = exp(tile_lse_t - lse)
    """
    if len(parts) == 1 and parts[0].max.shape[1] == 1:
        return parts[0]
    m, log_s = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("max", "log_sum"))
    row_m, row_log_s = (x[:, None] for x in joined(m, log_s, 1))
    row_log_s = row_log_s.masked_fill(row_m == -torch.inf, 0)
    if parts[0].entropy is None:
        return Sums(row_m, row_log_s, None)
    entropy = torch.cat([part.entropy for part in parts if part.entropy is not None], 1)
    log_w = torch.where(m == -torch.inf, m, ((m - finite(row_m)) + log_s) - row_log_s)
    terms = log_w.exp() * (entropy - log_w.clamp(min=-1e4))  # a chunk of masked entries: no 0 * inf
    return Sums(row_m, row_log_s, terms.sum(1, keepdim=True))


def _capped_weights(problem: Problem) -> bool:
    return "weighted_logit" in problem.outputs and problem.softcap is not None


def _concatenate(blocks: list[Outputs[Tensor]]) -> Outputs[Tensor]:
    def all_rows(name: str) -> Any:
        parts = [getattr(block, name) for block in blocks]
        return None if parts[0] is None else torch.cat(parts)

    return Outputs(**{name: all_rows(name) for name in vars(blocks[0])})
