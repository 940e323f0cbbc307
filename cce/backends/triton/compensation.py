"""Launches for the compensation of dead tiles: each vocabulary block's mean row, and the dead tiles' mass."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import DeadMass
from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Problem
from cce.backends.triton.kernels.compensation import dead_mass_kernel, mean_rows_kernel
from cce.spec import Spec


def mean_rows(spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.mean_rows`, of a matrix with any strides."""
    assert spec.block_v is not None
    tiles, d = out.shape
    mean_rows_kernel[(tiles, cdiv(d, 256))](
        c, order, out, len(c), d, c.stride(0), c.stride(1), ORDER=order is not None, ROWS=spec.block_v,
        STEP=min(32, spec.block_v), BLOCK_D=256,
    )  # fmt: skip


def dead_mass(problem: Problem, spec: Spec, mass: DeadMass) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.dead_mass`."""
    rows, maps, (tiles, n) = mass.rows, mass.maps, mass.out.shape
    assert maps.tile_mass is not None
    dead_mass_kernel[(tiles, cdiv(n, 1024))](
        maps.tile_mass, maps.tile_entropy, mass.live.view(torch.int8), mass.row_order, rows.lse, rows.entropy, rows.a,
        rows.h, mass.out, n, problem.v, mass.live.shape[1], maps.tile_mass.stride(0), problem.softcap or 1.0,
        mass.first, ENTROPY=rows.h is not None, SOFTCAP=problem.softcap is not None, BLOCK_N=spec.block_n,
        BLOCK_V=spec.block_v, BLOCK=1024,
    )  # fmt: skip
