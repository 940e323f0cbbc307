"""The forward: statistics of the vocabulary's splits by a kernel, joined in ascending order; the maps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Splits, Tiles, Window
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.operands import Call, Windows
from cce.backends.gpu.sizes import busiest_splits, cdiv, windows
from cce.backends.gpu.used_rows import ask
from cce.backends.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.backends.shared.rows import used_rows
from cce.backends.shared.weighted_logit import weighted_logit
from cce.spec import Spec

_MOST_SPLITS = 64
_SPLIT_BYTES = 2**20  # all splits' maxima and sums


def forward(
    kernels: Kernels, inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]
) -> Outputs[Tensor]:
    """Compute the outputs of all rows in use, and 0 (-1 for the prediction) for the others; fill ``maps``."""
    if problem.needs_grad and spec.filter == "none":
        ask(inputs.targets)
    call, in_use = Call.of(kernels, inputs, problem, spec), used_rows(inputs)
    target_logits = call.empty(*inputs.targets.shape)
    kernels.target_logits(call.own_e, call.c, inputs.targets, call.formula, target_logits)
    is_weighted, is_capped = "weighted_logit" in problem.outputs, problem.softcap is not None
    weight = call.weights(inputs.logit_weight) if is_weighted and is_capped else None
    splits, tiles = _statistics(call, in_use, weight, maps)
    outputs = kernels.outputs(problem, splits, target_logits, inputs.targets, in_use, call.order)
    if tiles is not None:
        assert outputs.lse_low is not None
        _fill(call, outputs.lse, outputs.lse_low, in_use, tiles, maps)
    if is_weighted and not is_capped:
        weighted = weighted_logit(inputs, problem, spec)
        outputs = replace(outputs, weighted_logit=torch.where(in_use, weighted, 0))
    return outputs


def _statistics(call: Call, in_use: Tensor, weight: Tensor | None, maps: Maps[Tensor]) -> tuple[Splits, Tiles | None]:
    """Statistics of all windows of the vocabulary; its order matters only to maps and the prediction."""
    problem, columns, mapped = call.problem, call.sizes.forward_columns, maps.tile_mass is not None
    rows_of_c = Windows(call, ordered=mapped or "prediction" in problem.outputs)
    places, ahead = [(0, problem.v)], rows_of_c.gathered and call.kernels.gathers_ahead(problem)
    if rows_of_c.copied:
        places = windows(problem.v, columns, (1 + ahead) * rows_of_c.row_bytes, call.spec.scratch_bytes)
    splits = _splits(call, cdiv(places[0][1], columns), weight is not None)
    tiles = _tiles(call, maps) if mapped else None
    for nth, (v0, v1) in enumerate(places):
        c, formula = rows_of_c.at(v0, v1)
        window = Window(call.e, c, formula, rows_of_c.of(weight, v0, v1), v0, splits, tiles, in_use)
        if ahead and nth + 1 < len(places):
            call.kernels.statistics_ahead(problem, call.spec, window, rows_of_c.ahead(*places[nth + 1]))
        else:
            call.kernels.statistics(problem, call.spec, window)
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
        call.empty(high, n), call.empty(high, n), call.empty(high, n) if maps.tile_entropy is not None else None
    )


def _fill(call: Call, lse: Tensor, lse_low: Tensor, in_use: Tensor, tiles: Tiles, maps: Maps[Tensor]) -> None:
    """Fill the backward's map: the blocks' mass, negated unless the filter's quantity is at most the threshold."""
    if call.kernels.fill_maps(call.problem, call.spec, lse, lse_low, in_use, tiles, maps):
        return
    assert maps.tile_mass is not None and call.spec.threshold is not None
    most = math.log(call.spec.threshold)
    step = max(1, call.spec.scratch_bytes // (32 * call.problem.n))
    for t0 in range(0, call.tiles, step):
        part = slice(t0, min(call.tiles, t0 + step))
        largest = tiles.max[part].sub_(lse)
        mass = tiles.log_sum[part].sub_(lse_low).add_(largest)
        is_dead = (largest.sub_(lse_low) if call.spec.filter == "element" else mass) <= most
        mass.exp_()
        mass = torch.where(is_dead, mass, mass.clamp(min=LEAST_HIT).neg_())
        maps.tile_mass[part] = mass.masked_fill_(~in_use, 0)
        if maps.tile_entropy is not None and tiles.entropy is not None:
            maps.tile_entropy[part] = tiles.entropy[part].masked_fill_(~in_use, 0)
