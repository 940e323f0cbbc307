"""Launches of the kernels around the products: joins of a row's statistics, the maps, copies of rows, sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Splits, Tiles
from cce.backends.gpu.sizes import cdiv, power_of_two
from cce.backends.problem import LEAST_HIT, Maps, Outputs, Problem
from cce.backends.triton.kernels.rows import (
    add_rank_one_kernel,
    fill_maps_kernel,
    gather_rows_kernel,
    outputs_kernel,
    scatter_rows_kernel,
)
from cce.spec import Spec


def outputs(
    problem: Problem, splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor, order: Tensor | None
) -> Outputs[Tensor]:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.outputs`, with one kernel."""
    (number, n), k = splits.max.shape, targets.shape[1]
    new = splits.max.new_empty
    entropy = None if splits.gap is None else new(n)
    weighted = None if splits.weighted is None else new(n)
    prediction = None if splits.best is None else new(n, dtype=torch.int64)
    lse, lse_low, nll = new(n), new(n), new(n, k)
    block = 32
    outputs_kernel[(cdiv(n, block),)](
        splits.max, splits.sum, splits.gap, splits.weighted, splits.best, target_logits, targets, in_use, order, lse,
        lse_low, nll, entropy, weighted, prediction, n, k, number, ORDER=order is not None,
        ENTROPY=entropy is not None, WEIGHTED=weighted is not None, PREDICTION=prediction is not None,
        BLOCK_N=block, BLOCK_S=power_of_two(number),
    )  # fmt: skip
    return Outputs(lse, nll, lse_low, entropy, weighted, prediction)


def fill_maps(spec: Spec, lse: Tensor, lse_low: Tensor, in_use: Tensor, tiles: Tiles, maps: Maps[Tensor]) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.fill_maps`."""
    assert maps.tile_mass is not None and spec.threshold is not None
    t, n = maps.tile_mass.shape
    block_n, block_t = 256, 8
    fill_maps_kernel[(cdiv(t, block_t), cdiv(n, block_n))](
        tiles.max, tiles.log_sum, lse, lse_low, in_use, maps.tile_mass, tiles.entropy, maps.tile_entropy, n, t, n,
        maps.tile_mass.stride(0), math.log(spec.threshold), LEAST_HIT=LEAST_HIT, ELEMENT=spec.filter == "element",
        TILE_ENTROPY=maps.tile_entropy is not None, BLOCK_N=block_n, BLOCK_T=block_t,
    )  # fmt: skip


def gather_rows(x: Tensor, row_order: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.gather_rows`, of a matrix with any strides."""
    rows, d = len(row_order), x.shape[1]
    block_r, block_d = 16, min(512, power_of_two(d))
    gather_rows_kernel[(cdiv(rows, block_r), cdiv(d, block_d))](
        x, row_order, keep, out, rows, d, x.stride(0), x.stride(1), KEEP=keep is not None, EVEN_D=d % block_d == 0,
        BLOCK_R=block_r, BLOCK_D=block_d,
    )  # fmt: skip


def scatter_rows(total: Tensor, norm: Tensor | None, row_order: Tensor, keep: Tensor, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.scatter_rows`."""
    n, d = out.shape
    block_d = 1024
    scatter_rows_kernel[(n, cdiv(d, block_d))](
        total, row_order, keep, norm, out, d, total.stride(0), out.stride(0), NORM=norm is not None, BLOCK_D=block_d
    )


def add_rank_one(out: Tensor, u: Tensor, total: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.add_rank_one`."""
    v, d = out.shape
    add_rank_one_kernel[(v, cdiv(d, 1024))](out, u, total, d, out.stride(0), BLOCK_D=1024)
