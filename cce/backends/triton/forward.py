"""The forward's launches: statistics of the tiles, their reduction, the maps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.sizes import busiest_splits, cdiv, power_of_two, windows
from cce.backends.gpu.used_rows import ask
from cce.backends.problem import LEAST_HIT, Inputs, Maps, Outputs, Problem
from cce.backends.shared.rows import used_rows
from cce.backends.shared.weighted_logit import weighted_logit
from cce.backends.triton.call import Call
from cce.backends.triton.kernels.forward import forward_kernel, mass_kernel, reduce_kernel, target_kernel
from cce.backends.triton.operands import gather
from cce.spec import Spec

_MOST_SPLITS = 64  # reduce_kernel holds all splits of some rows at once
_SPLIT_BYTES = 2**20  # all splits' maxima and sums
_SPLITS = ("split_max", "split_sum", "split_gap", "split_weighted", "split_best")
_TILES = ("tile_max", "tile_log_sum", "tile_entropy")


def forward(inputs: Inputs[Tensor], problem: Problem, spec: Spec, maps: Maps[Tensor]) -> Outputs[Tensor]:
    """Compute the outputs of all rows in use, and 0 (-1 for the prediction) for the others; fill ``maps``."""
    if problem.needs_grad and spec.filter == "none":
        ask(inputs.targets)
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
        _fill(call, outputs, in_use, tiles, maps)
    if "weighted_logit" in problem.outputs and not capped:
        weighted = weighted_logit(inputs, problem, spec)
        return replace(outputs, weighted_logit=torch.where(in_use, weighted, 0))
    return outputs


def target_logits_of(call: Call, targets: Tensor) -> Tensor:
    """Targets' logits z[i, targets[i, k]], (N, K); 0 where the target is -1."""
    n, k = targets.shape
    e, c, d = call.e, call.c, call.problem.d
    found = call.empty(n, k)
    target_kernel[(n, k)](
        e, c, call.bias, targets, found, None, d, k, e.stride(0), e.stride(1), c.stride(0), c.stride(1),
        call.problem.logit_scale, call.softcap, **call.formula(), COPY=False, BLOCK_D=min(1024, power_of_two(d)),
    )  # fmt: skip
    return found


def weights_of(call: Call, logit_weight: Tensor | None) -> Tensor:
    """Weights u, (V,) float32, contiguous; 1 / V each if none are given."""
    if logit_weight is None:
        return torch.full((call.problem.v,), 1 / call.problem.v, dtype=torch.float32, device=call.e.device)
    return logit_weight.to(torch.float32)


def _windows(call: Call, ordered: bool) -> list[tuple[int, int]]:
    """Windows of places: all at once, or, with a vocabulary order, pieces whose rows of ``c`` fit into the scratch."""
    if not ordered:
        return [(0, call.problem.v)]
    row_bytes = call.problem.d * call.c.element_size()
    return windows(call.problem.v, call.launch.forward.columns, row_bytes, call.spec.scratch_bytes)


def _splits(call: Call, tiles: int) -> int:
    """Number of splits; a program walks all tiles of its split."""
    most = max(1, min(_MOST_SPLITS, _SPLIT_BYTES // (8 * call.problem.n)))
    return busiest_splits(cdiv(call.problem.n, call.launch.forward.rows), tiles, call.launch.programs, most)


def _statistics(
    call: Call, in_use: Tensor, weight: Tensor | None, maps: Maps[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics of each split and row, [splits, N], and of the tiles, [T, N], if there are maps."""
    problem, tile = call.problem, call.launch.forward
    n = problem.n
    entropy, prediction = "entropy" in problem.outputs, "prediction" in problem.outputs
    ordered = call.order is not None and (maps.tile_mass is not None or prediction)  # otherwise the order has no effect
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
        names = ["tile_max", "tile_log_sum", *(["tile_entropy"] if maps.tile_entropy is not None else [])]
        # The product's tiles are stored whole, and so are rows of the maps.
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
            ONLINE=call.spec.lse_accumulation == "online", ENTROPY=entropy, WEIGHTED=weight is not None,
            PREDICTION=prediction, MAPS=bool(tiles),
            TILE_ENTROPY="tile_entropy" in tiles, BLOCK_N=tile.rows, TILE_V=tile.columns,
            BLOCK_V=call.block_v if tiles else tile.columns, BLOCK_D=tile.depth, GROUP_N=call.launch.group_n,
            FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return found, tiles


def _operands(call: Call, v0: int, v1: int, buffer: Tensor | None, weight: Tensor | None) -> dict[str, Any]:
    """Operands of a window; with a vocabulary order, the rows and values of its entries are gathered."""
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
    lse, lse_low, nll = call.empty(n), call.empty(n), call.empty(*targets.shape)
    block = 32
    reduce_kernel[(cdiv(n, block),)](
        **{name: found.get(name) for name in _SPLITS},
        target_logits=target_logits, targets=targets, in_use=in_use, order=call.order, lse=lse, lse_low=lse_low,
        nll=nll,
        **{name: extra.get(name) for name in ("entropy", "weighted_logit", "prediction")},
        N=n, K=targets.shape[1], SPLITS=splits, ORDER=call.order is not None, ENTROPY="split_gap" in found,
        WEIGHTED="split_weighted" in found, PREDICTION="split_best" in found,
        BLOCK_N=block, BLOCK_S=power_of_two(splits),
    )  # fmt: skip
    return Outputs(lse, nll, lse_low, **extra)


def _fill(call: Call, outputs: Outputs[Tensor], in_use: Tensor, tiles: dict[str, Tensor], maps: Maps[Tensor]) -> None:
    """Fill the maps for the backward."""
    assert maps.tile_mass is not None and call.spec.threshold is not None
    n, t = call.problem.n, call.tiles
    block_n, block_t = 256, 8
    mass_kernel[(cdiv(t, block_t), cdiv(n, block_n))](
        tiles["tile_max"], tiles["tile_log_sum"], outputs.lse, outputs.lse_low, in_use, maps.tile_mass,
        tiles.get("tile_entropy"), maps.tile_entropy, n, t, n, maps.tile_mass.stride(0),
        math.log(call.spec.threshold), LEAST_HIT=LEAST_HIT, ELEMENT=call.spec.filter == "element",
        TILE_ENTROPY=maps.tile_entropy is not None, BLOCK_N=block_n, BLOCK_T=block_t,
    )  # fmt: skip
