"""Forward: log-sum-exp of every tile, then of every row; the logits live one piece at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.torch.arithmetic import Arithmetic, Rows, along_vocabulary, gathered
from cce.backends.torch.logits import logits_
from cce.backends.torch.plan import Plan
from cce.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.spec import Spec
from cce.worklist import target_positions


@dataclass(frozen=True)
class Chunk:
    """Whole vocabulary tiles t0 to t1, which are the columns v0 to v1; a ragged last tile stands alone."""

    t0: int
    t1: int
    v0: int
    v1: int


def chunks(problem: Problem, spec: Spec, columns: int) -> list[Chunk]:
    """The vocabulary in chunks of at most ``columns`` columns (a multiple of BLOCK_V)."""
    assert spec.block_v is not None
    block_v, whole = spec.block_v, problem.v // spec.block_v
    step = columns // block_v
    starts = [(t0, min(whole, t0 + step)) for t0 in range(0, whole, step)]
    found = [Chunk(t0, t1, t0 * block_v, t1 * block_v) for t0, t1 in starts]
    if problem.v % block_v:
        found.append(Chunk(whole, whole + 1, whole * block_v, problem.v))
    return found


def forward(inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
    """All rows, a block of rows at a time; fills ``maps``."""
    arithmetic = Arithmetic.choose(problem, spec)
    plan = Plan.choose(problem, spec, gathered(inputs))
    vocabulary = chunks(problem, spec, plan.columns)
    rows = Rows(inputs, arithmetic, keep=False)
    targets = target_positions(inputs)
    closed_form = None
    if "weighted_logit" in problem.outputs and problem.softcap is None:
        closed_form = _closed_form(inputs, problem, arithmetic, rows, plan)
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
    if closed_form is not None:
        return replace(outputs, weighted_logit=closed_form)
    return outputs


def weights_along(inputs: Inputs[Tensor], problem: Problem, v0: int, v1: int, like: Tensor) -> Tensor:
    """(v1 - v0,) logit weights u of a chunk; 1 / V each if none are given."""
    if inputs.logit_weight is None:
        return like.new_full((v1 - v0,), 1.0 / problem.v)
    return along_vocabulary(inputs, inputs.logit_weight, v0, v1).to(like.dtype)


def weighted_rows(inputs: Inputs[Tensor], problem: Problem, arithmetic: Arithmetic, step: int) -> Tensor:
    """(D,) sum_v u_v c_v, in pieces of ``step`` rows of ``c``."""
    total = inputs.c.new_zeros(problem.d, dtype=arithmetic.result)
    for v0 in range(0, problem.v, step):
        v1 = min(problem.v, v0 + step)
        piece = along_vocabulary(inputs, inputs.c, v0, v1).to(arithmetic.result)
        total += weights_along(inputs, problem, v0, v1, total) @ piece
    return total


def _closed_form(inputs: Inputs[Tensor], problem: Problem, arithmetic: Arithmetic, rows: Rows, plan: Plan) -> Tensor:
    """(N,) sum_v u_v z_iv = logit_scale (e_i . sum_v u_v c_v + sum_v u_v bias_v): no logit is needed."""
    mean = weighted_rows(inputs, problem, arithmetic, step=plan.columns)
    offset = mean.new_zeros(())
    if inputs.bias is not None:
        u = weights_along(inputs, problem, 0, problem.v, mean)
        offset = u @ along_vocabulary(inputs, inputs.bias, 0, problem.v).to(mean.dtype)
    pieces = [rows.block(n0, n1).to(mean.dtype) @ mean for n0, n1 in plan.row_blocks(problem.n)]
    return (torch.cat(pieces) + offset) * problem.logit_scale


class RowBlock:
    """Running sums of one block of rows along the vocabulary."""

    def __init__(
        self, inputs: Inputs[Tensor], problem: Problem, spec: Spec, arithmetic: Arithmetic, targets: Tensor, n0: int
    ) -> None:
        n, like = len(targets), inputs.e.new_empty(0, dtype=arithmetic.result)
        self.inputs, self.problem, self.spec, self.targets, self.n0 = inputs, problem, spec, targets, n0
        self.tiled = bool(problem.maps(spec))
        self.online = spec.lse_accumulation == "online"
        self.parts: list[tuple[Tensor, Tensor | None]] = []  # (rows, 1) log-sum-exp and entropy of each chunk
        self.tiles: list[tuple[Chunk, Tensor, Tensor]] = []  # each chunk's tile_lse and filter's quantity (rows, tiles)
        self.target_logits = like.new_zeros(targets.shape)
        self.weighted = like.new_zeros(n) if _capped_weights(problem) else None
        self.best = like.new_full((n,), -torch.inf)
        self.prediction = torch.zeros(n, dtype=torch.int64, device=like.device)

    def add(self, chunk: Chunk, z: Tensor, maps: Maps[Tensor]) -> None:
        """One chunk's logits (rows, columns), which are overwritten."""
        self._targets(chunk, z)
        if "prediction" in self.problem.outputs:
            self._prediction(chunk, z)
        if self.weighted is not None:
            self.weighted += z @ weights_along(self.inputs, self.problem, chunk.v0, chunk.v1, z)
        # Without maps nobody asks for the tiles: the chunk is one.
        tiles = z.view(len(z), chunk.t1 - chunk.t0 if self.tiled else 1, -1)
        m, tile_lse, tile_entropy = tile_sums(tiles, entropy="entropy" in self.problem.outputs)
        if self.tiled:
            self.tiles.append((chunk, tile_lse, m if self.spec.filter == "element" else tile_lse))
        if maps.tile_entropy is not None and tile_entropy is not None:
            maps.tile_entropy[chunk.t0 : chunk.t1, self.n0 : self.n0 + len(z)] = tile_entropy.T
        # One partial a chunk: those of all tiles would be larger than the logits of a piece.
        self.parts.append(_join([(tile_lse, tile_entropy)]))
        if self.online:
            self.parts = [_join(self.parts)]

    def finish(self, maps: Maps[Tensor]) -> Outputs[Tensor]:
        lse, entropy = _join(self.parts)
        for chunk, tile_lse, quantity in self.tiles:
            assert maps.tile_mass is not None and self.spec.threshold is not None
            mass = (tile_lse - lse.masked_fill(lse == -torch.inf, 0)).exp_()
            hit = quantity > lse + math.log(self.spec.threshold)
            mass = torch.where(hit, -mass.clamp(min=LEAST_HIT), mass)
            maps.tile_mass[chunk.t0 : chunk.t1, self.n0 : self.n0 + len(mass)] = mass.T
        return Outputs(
            lse[:, 0],
            self.target_logits,
            None if entropy is None else entropy[:, 0],
            self.weighted,
            self._entries() if "prediction" in self.problem.outputs else None,
        )

    def _targets(self, chunk: Chunk, z: Tensor) -> None:
        # From the same accumulator as the log-sum-exp, so that lse - z is never negative.
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


def tile_sums(z: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maximum, log-sum-exp and entropy of every tile of ``z`` (rows, tiles, BLOCK_V), which is overwritten.

    With s = sum exp(z - m):  tile_lse = m + log s,  tile_entropy = log s + sum exp(z - m) (m - z) / s.
    Every term of the entropy is non-negative, so it cannot come out below 0.
    """
    m = z.amax(-1)  # (rows, tiles)
    # A tile of masked entries has m = -inf; a finite shift leaves exp(-inf) = 0 where -inf + inf is NaN.
    shift = m.clamp(min=torch.finfo(z.dtype).min)
    z.sub_(shift[..., None])
    if not entropy:
        return m, shift + z.exp_().sum(-1).log(), None
    exp = z.exp()
    s = exp.sum(-1)
    gap = -exp.mul_(z.clamp_(min=torch.finfo(z.dtype).min)).sum(-1)
    tile_entropy = torch.where(s > 0, s.log() + gap / s, 0.0)
    return m, shift + s.log(), tile_entropy


def _join(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """(rows, 1) log-sum-exp and entropy of the union of all tiles, by the chain rule of the entropy.

    H = sum_t w_t (H_t + lse - tile_lse_t),  w_t = exp(tile_lse_t - lse)
    """
    if len(parts) == 1 and parts[0][0].shape[1] == 1:
        return parts[0]
    tile_lse = torch.cat([part[0] for part in parts], 1)
    lse = tile_lse.logsumexp(1, keepdim=True)
    if parts[0][1] is None:
        return lse, None
    tile_entropy = torch.cat([part[1] for part in parts if part[1] is not None], 1)
    log_w = tile_lse - lse.masked_fill(lse == -torch.inf, 0)  # a chunk of masked entries: no -inf + inf
    terms = log_w.exp() * (tile_entropy - log_w.clamp(min=-1e4))
    return lse, terms.sum(1, keepdim=True)


def _capped_weights(problem: Problem) -> bool:
    return "weighted_logit" in problem.outputs and problem.softcap is not None


def _concatenate(blocks: list[Outputs[Tensor]]) -> Outputs[Tensor]:
    def all_rows(name: str) -> Any:
        parts = [getattr(block, name) for block in blocks]
        return None if parts[0] is None else torch.cat(parts)

    return Outputs(**{name: all_rows(name) for name in vars(blocks[0])})
