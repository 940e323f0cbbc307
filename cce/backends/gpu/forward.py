"""The forward: statistics of the vocabulary's splits by a kernel, joined in ascending order; the maps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cce.backends.gpu.kernels import Kernels, Splits, Tiles
from cce.backends.gpu.library import finite
from cce.backends.gpu.operands import Call, Windows
from cce.backends.gpu.sizes import busiest_splits, cdiv, windows
from cce.backends.gpu.used_rows import ask
from cce.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.rows import used_rows
from cce.spec import Spec

_MOST_SPLITS = 64
_SPLIT_BYTES = 2**20  # of all splits' maxima and sums


def forward(
    kernels: Kernels, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]
) -> Outputs[Tensor]:
    """Outputs of all rows in use; 0 (-1 for the prediction) of the others. Fills ``maps``."""
    if problem.needs_grad and spec.filter == "none":
        ask(inputs.targets)
    call, in_use = Call.of(kernels, inputs, problem, spec), used_rows(inputs)
    target_logits = call.empty(*inputs.targets.shape)
    kernels.target_logits(call.own_e, call.c, inputs.targets.contiguous(), call.formula, target_logits)
    capped_weights = "weighted_logit" in problem.outputs and problem.softcap is not None
    splits, tiles = _statistics(call, call.weights(inputs.logit_weight) if capped_weights else None, maps)
    lse = kernels.joined_lse(splits, target_logits, inputs.targets, in_use)
    if tiles is not None:
        _fill(call, lse, in_use, tiles, maps)
    weighted = None if splits.weighted is None else torch.where(in_use, splits.weighted.sum(0), 0)
    if "weighted_logit" in problem.outputs and not capped_weights:
        weighted = closed_form(call, inputs.logit_weight, in_use)
    return Outputs(
        lse,
        target_logits,
        None if splits.gap is None else _entropy(splits, splits.gap, in_use),
        weighted,
        None if splits.best is None else _prediction(call, splits.max, splits.best, in_use),
    )


def closed_form(call: Call, logit_weight: Tensor | None, in_use: Tensor) -> Tensor:
    """(N,) sum_v u_v z_iv without a softcap: scale (e_i . sum_v u_v c_v + sum_v u_v bias_v)."""
    mean = weighted_rows(call, logit_weight)[None]  # (1, D)
    bias = call.formula.bias
    if bias is not None:
        bias = (call.weights(logit_weight) * bias).sum()[None]
    formula = replace(call.formula, bias=bias, softcap=None)
    found = call.empty(call.problem.n, 1)
    # The logit of an entry 0 that is the mean; of none where the row does not count.
    call.kernels.target_logits(call.own_e, mean, in_use.to(torch.int64).sub_(1)[:, None], formula, found)
    return found[:, 0]


def weighted_rows(call: Call, logit_weight: Tensor | None) -> Tensor:
    """(D,) sum_v u_v c_v, float32, in pieces that fit into the scratch memory."""
    v, d = call.problem.v, call.problem.d
    total = torch.zeros(d, dtype=torch.float32, device=call.e.device)
    step = max(1, call.spec.scratch_bytes // (8 * d))
    for c, u in zip(call.c.split(step), call.weights(logit_weight).split(step), strict=True):
        # Without weights nothing needs to be widened in memory.
        total += c.sum(0, dtype=torch.float32) / v if logit_weight is None else u @ c.to(torch.float32)
    return total


def _statistics(call: Call, weight: Tensor | None, maps: Maps[Tensor]) -> tuple[Splits, Tiles | None]:
    """Of all windows of the vocabulary; its order matters to maps and to the prediction only."""
    problem, columns, mapped = call.problem, call.sizes.forward_columns, maps.tile_mass is not None
    rows_of_c = Windows(call, ordered=mapped or "prediction" in problem.outputs)
    places, ahead = [(0, problem.v)], rows_of_c.gathered and call.kernels.gathers_ahead(problem)
    if rows_of_c.copied:
        places = windows(problem.v, columns, (1 + ahead) * rows_of_c.row_bytes, call.spec.scratch_bytes)
    splits = _splits(call, cdiv(places[0][1], columns), weight is not None)
    tiles = _tiles(call, maps) if mapped else None
    for nth, (v0, v1) in enumerate(places):
        c, formula = rows_of_c.at(v0, v1)
        arguments = problem, call.spec, call.e, c, formula, rows_of_c.of(weight, v0, v1), v0, splits, tiles
        if ahead and nth + 1 < len(places):
            call.kernels.statistics_ahead(*arguments, rows_of_c.ahead(*places[nth + 1]))
        else:
            call.kernels.statistics(*arguments)
    return splits, tiles


def _splits(call: Call, tiles: int, weighted: bool) -> Splits:
    n, outputs = call.problem.n, call.problem.outputs
    most = max(1, min(_MOST_SPLITS, _SPLIT_BYTES // (8 * n)))
    s = busiest_splits(cdiv(n, call.sizes.forward_rows), tiles, call.sizes.programs, most)
    return Splits(
        call.empty(s, n),
        call.empty(s, n),
        call.empty(s, n) if "entropy" in outputs else None,
        call.empty(s, n) if weighted else None,
        call.empty(s, n, dtype=torch.int32) if "prediction" in outputs else None,
    )


def _tiles(call: Call, maps: Maps[Tensor]) -> Tiles:
    columns, n = call.sizes.forward_columns, call.problem.n
    high = cdiv(call.problem.v, columns) * (columns // call.block_v)  # whole tiles store whole rows
    return Tiles(
        call.empty(high, n),
        call.empty(high, n) if call.spec.filter == "element" else None,
        call.empty(high, n) if maps.tile_entropy is not None else None,
    )


def _entropy(splits: Splits, gap: Tensor, in_use: Tensor) -> Tensor:
    """(N,) by the chain rule: H = sum_k w_k (H_k - log w_k); w_k = exp(lse_k - lse), H_k = log s_k + gap_k / s_k."""
    some = splits.sum > 0
    log_s = torch.where(some, splits.sum, 1).log()
    lse_k = torch.where(some, splits.max + log_s, -torch.inf)
    log_w = torch.where(some, lse_k - finite(lse_k.logsumexp(0)), 0)
    terms = log_w.exp() * (log_s + gap / torch.where(some, splits.sum, 1) - log_w)
    return torch.where(in_use, torch.where(some, terms, 0).sum(0).clamp(min=0), 0)


def _prediction(call: Call, split_max: Tensor, best: Tensor, in_use: Tensor) -> Tensor:
    """(N,) the entry at the first place of the largest logit; a row of NaN has none, and gets the last place."""
    v = call.problem.v
    place = torch.where(split_max == split_max.amax(0), best, v - 1).amin(0).clamp_(0, v - 1).to(torch.int64)
    entry = place if call.order is None else call.order.index_select(0, place)
    return torch.where(in_use, entry, -1)


def _fill(call: Call, lse: Tensor, in_use: Tensor, tiles: Tiles, maps: Maps[Tensor]) -> None:
    """The map the backward reads: exp(tile_lse - lse), negated where the filter's quantity exceeds the threshold."""
    if call.kernels.fill_maps(call.problem, call.spec, lse, in_use, tiles, maps):
        return
    assert maps.tile_mass is not None and call.spec.threshold is not None
    least, shift = lse + math.log(call.spec.threshold), finite(lse)
    step = max(1, call.spec.scratch_bytes // (32 * call.problem.n))
    for t0 in range(0, call.tiles, step):
        part = slice(t0, min(call.tiles, t0 + step))
        hit = (tiles.lse if tiles.max is None else tiles.max)[part] > least
        mass = tiles.lse[part].sub_(shift).exp_()
        mass = torch.where(hit, mass.clamp(min=LEAST_HIT).neg_(), mass)
        maps.tile_mass[part] = mass.masked_fill_(~in_use, 0)
        if maps.tile_entropy is not None and tiles.entropy is not None:
            maps.tile_entropy[part] = tiles.entropy[part].masked_fill_(~in_use, 0)
