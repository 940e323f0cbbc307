"""The forward's launches: statistics of the tiles, their reduction, the maps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.sizes import busiest_splits, cdiv, power_of_two, windows
from cce.backends.triton.call import Call
from cce.backends.triton.kernels.compensation import mean_rows_kernel
from cce.backends.triton.kernels.forward import forward_kernel, mass_kernel, reduce_kernel, target_kernel
from cce.backends.triton.operands import gather
from cce.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.rows import used_rows
from cce.spec import Spec

_MOST_SPLITS = 64  # reduce_kernel holds all splits of some rows at once
_SPLIT_BYTES = 2**20  # of all splits' maxima and sums
_SPLITS = ("split_max", "split_sum", "split_gap", "split_weighted", "split_best")
_TILES = ("tile_lse", "tile_max", "tile_entropy")


def forward(inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
    """Outputs of all rows in use; 0 (-1 for the prediction) of the others. Fills ``maps``."""
    call = Call.of(inputs, problem, spec)
    in_use = used_rows(inputs)
    target_logits = target_logits_of(call, inputs.targets)
    capped = problem.softcap is not None
    weight = None
    if "weighted_logit" in problem.outputs and capped:
        weight = weights_of(call, inputs.logit_weight)
    splits, tiles = _statistics(call, in_use, weight, maps)
    outputs = _reduce(call, inputs.targets, in_use, target_logits, splits)
    if maps.tile_mass is not None:
        _fill(call, outputs.lse, in_use, tiles, maps)
    if "weighted_logit" in problem.outputs and not capped:
        weighted = closed_form(call, inputs.logit_weight, in_use)
        return Outputs(outputs.lse, target_logits, outputs.entropy, weighted, outputs.prediction)
    return outputs


def target_logits_of(call: Call, targets: Tensor) -> Tensor:
    """(N, K) z[i, targets[i, k]], 0 where the target is -1."""
    found = call.empty(*targets.shape)
    _target_kernel(call, call.c, call.bias, targets, found)
    return found


def closed_form(call: Call, logit_weight: Tensor | None, in_use: Tensor) -> Tensor:
    """(N,) sum_v u_v z_iv without a softcap: scale (e_i . sum_v u_v c_v + sum_v u_v bias_v)."""
    u = weights_of(call, logit_weight)
    mean = weighted_rows(call, u)[None]  # (1, D)
    bias = None if call.bias is None else (u * call.bias).sum()[None]
    found = call.empty(call.problem.n, 1)
    _target_kernel(call, mean, bias, in_use.to(torch.int64).sub_(1)[:, None], found)  # target 0, or none
    return found[:, 0]


def weights_of(call: Call, logit_weight: Tensor | None) -> Tensor:
    """(V,) float32 weights u; 1 / V each if none are given."""
    if logit_weight is None:
        return torch.full((call.problem.v,), 1 / call.problem.v, device=call.e.device)
    return logit_weight.to(torch.float32)


def weighted_rows(call: Call, u: Tensor) -> Tensor:
    """(D,) sum_v u_v c_v, float32."""
    rows, step = 1024, 64
    parts = call.empty(cdiv(call.problem.v, rows), call.problem.d)
    mean_rows_kernel[(len(parts), cdiv(call.problem.d, 128))](
        call.c, None, u, parts, call.problem.v, call.problem.d, call.c.stride(0), call.c.stride(1),
        ORDER=False, WEIGHTED=True, ROWS=rows, STEP=step, BLOCK_D=128,
    )  # fmt: skip
    return parts.sum(0)


def _target_kernel(call: Call, c: Tensor, bias: Tensor | None, targets: Tensor, found: Tensor) -> None:
    n, k = targets.shape
    formula = {**call.formula(), "BIAS": bias is not None}
    block = min(1024, power_of_two(call.problem.d))
    target_kernel[(n, k)](
        call.e, c, bias, targets.contiguous(), found, call.problem.d, k, call.e.stride(0), call.e.stride(1),
        c.stride(0), c.stride(1), call.problem.logit_scale, call.softcap, **formula, BLOCK_D=block,
    )  # fmt: skip


def _windows(call: Call, ordered: bool) -> list[tuple[int, int]]:
    """Places of the vocabulary: all, or where it has an order pieces whose rows of ``c`` fit into the scratch."""
    if not ordered:
        return [(0, call.problem.v)]
    row_bytes = call.problem.d * call.c.element_size()
    return windows(call.problem.v, call.launch.forward.columns, row_bytes, call.spec.scratch_bytes)


def _splits(call: Call, tiles: int) -> int:
    """The number of splits: a program walks all tiles of its split."""
    most = max(1, min(_MOST_SPLITS, _SPLIT_BYTES // (8 * call.problem.n)))
    return busiest_splits(cdiv(call.problem.n, call.launch.forward.rows), tiles, call.launch.programs, most)


def _statistics(
    call: Call, in_use: Tensor, weight: Tensor | None, maps: Maps[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per row: what each split found, [splits, N], and the tiles' statistics, [T, N], if there are maps."""
    problem, spec, tile = call.problem, call.spec, call.launch.forward
    n = problem.n
    entropy, prediction = "entropy" in problem.outputs, "prediction" in problem.outputs
    ordered = call.order is not None and (maps.tile_mass is not None or prediction)  # else no order shows
    windows = _windows(call, ordered)
    splits = _splits(call, cdiv(windows[0][1], tile.columns))
    found = {name: call.empty(splits, n) for name in ("split_max", "split_sum")}
    if entropy:
        found["split_gap"] = call.empty(splits, n)
    if weight is not None:
        found["split_weighted"] = call.empty(splits, n)
    if prediction:
        found["split_best"] = call.empty(splits, n, dtype=torch.int32)
    tiles = {}
    if maps.tile_mass is not None:
        names = ["tile_lse", *(["tile_max"] if spec.filter == "element" else [])]
        names += ["tile_entropy"] if maps.tile_entropy is not None else []
        # Whole tiles of the product store whole rows of the maps.
        height = cdiv(problem.v, tile.columns) * (tile.columns // call.block_v)
        tiles = {name: call.empty(height, n) for name in names}
    buffer = None
    if ordered:
        buffer = call.empty(windows[0][1], problem.d, dtype=call.c.dtype)
    for v0, v1 in windows:
        forward_kernel[(cdiv(n, tile.rows) * splits,)](
            **_operands(call, v0, v1, buffer, weight), in_use=in_use, CARRY=v0 > 0,
            **{name: found.get(name) for name in _SPLITS}, **{name: tiles.get(name) for name in _TILES},
            N=n, V=v1 - v0, stride_t=n, SPLITS=splits, first_tile=v0 // tile.columns,
            ONLINE=spec.lse_accumulation == "online", ENTROPY=entropy, WEIGHTED=weight is not None,
            PREDICTION=prediction, MAPS=bool(tiles),
            TILE_ENTROPY="tile_entropy" in tiles, ELEMENT="tile_max" in tiles, BLOCK_N=tile.rows,
            TILE_V=tile.columns, BLOCK_V=call.block_v if tiles else tile.columns, BLOCK_D=tile.depth,
            GROUP_N=call.launch.group_n, FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return found, tiles


def _operands(call: Call, v0: int, v1: int, buffer: Tensor | None, weight: Tensor | None) -> dict[str, Any]:
    """The operands of a window; what belongs to its entries is gathered where the vocabulary has an order."""
    c, bias = call.c, call.bias
    if buffer is not None:
        assert call.order is not None
        order = call.order[v0:v1]
        c = gather(c, order, buffer)
        bias = None if bias is None else bias.index_select(0, order)
        weight = None if weight is None else weight.index_select(0, order)
    call = replace(call, c=c, bias=bias, order=None)
    return call.operands(call.launch.forward, call.e) | {"weight": weight}


def _reduce(
    call: Call, targets: Tensor, in_use: Tensor, target_logits: Tensor, found: dict[str, Tensor]
) -> Outputs[Tensor]:
    problem = call.problem
    n, splits = problem.n, len(found["split_max"])
    extra = {
        name: call.empty(n)
        for name, part in (("entropy", "split_gap"), ("weighted_logit", "split_weighted"))
        if part in found
    }
    if "split_best" in found:
        extra["prediction"] = call.empty(n, dtype=torch.int64)
    lse = call.empty(n)
    block = 32
    reduce_kernel[(cdiv(n, block),)](
        **{name: found.get(name) for name in _SPLITS},
        target_logits=target_logits, targets=targets.contiguous(), in_use=in_use, order=call.order, lse=lse,
        **{name: extra.get(name) for name in ("entropy", "weighted_logit", "prediction")},
        N=n, K=targets.shape[1], SPLITS=splits, ORDER=call.order is not None, ENTROPY="split_gap" in found,
        WEIGHTED="split_weighted" in found, PREDICTION="split_best" in found,
        BLOCK_N=block, BLOCK_S=power_of_two(splits),
    )  # fmt: skip
    return Outputs(lse, target_logits, **extra)


def _fill(call: Call, lse: Tensor, in_use: Tensor, tiles: dict[str, Tensor], maps: Maps[Tensor]) -> None:
    """The maps the backward reads."""
    assert maps.tile_mass is not None and call.spec.threshold is not None
    n, t = call.problem.n, call.tiles
    block_n, block_t = 256, 8
    mass_kernel[(cdiv(t, block_t), cdiv(n, block_n))](
        tiles["tile_lse"], tiles.get("tile_max", tiles["tile_lse"]), lse, in_use, maps.tile_mass,
        tiles.get("tile_entropy"), maps.tile_entropy, n, t, n, maps.tile_mass.stride(0),
        math.log(call.spec.threshold), LEAST_HIT=LEAST_HIT, TILE_ENTROPY=maps.tile_entropy is not None,
        BLOCK_N=block_n, BLOCK_T=block_t,
    )  # fmt: skip
