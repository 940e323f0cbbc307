"""Compensation for the dead tiles, by kernels that read memory once."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import DeadMass
from cce.backends.gpu.operands import softcap_of
from cce.backends.gpu.sizes import cdiv
from cce.backends.numba.choice import KINDS
from cce.backends.numba.compile import dead_mass_kernel, mean_rows_kernel
from cce.backends.numba.operands import pieces_of, pitch_of
from cce.backends.numba.options import Mass, Means
from cce.backends.problem import Problem
from cce.spec import Spec

#: Thread blocks for every run of rows, which divide the vocabulary blocks among them.
_STRIPES = 64


def mean_rows(spec: Spec, c: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.mean_rows`."""
    kernel = mean_rows_kernel(Means(KINDS.get(c.dtype, "ieee"), spec.block_v or 0, ordered=order is not None))
    words = 4 * pieces_of(c)
    kernel(len(out) * cdiv(words, kernel.threads), c, order, out, len(c), words, 4 * pitch_of(c))


def dead_mass(problem: Problem, spec: Spec, mass: DeadMass) -> None:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.dead_mass`."""
    rows, maps, out = mass.rows, mass.maps, mass.out
    p, entropy = maps.tile_mass, maps.tile_entropy if rows.h is not None else None
    assert p is not None
    kernel = dead_mass_kernel(
        Mass(
            KINDS.get(out.dtype, "ieee"), spec.block_n or 0, spec.block_v or 0, half=p.dtype == torch.float16,
            entropy=rows.h is not None, softcap=problem.softcap is not None,
        )
    )  # fmt: skip
    kernel(
        cdiv(problem.n, kernel.threads) * min(len(out), _STRIPES), p, entropy, mass.row_order, mass.live, rows.lse,
        rows.entropy, rows.a, rows.h, out, problem.n, problem.v, mass.live.shape[1], mass.first, len(out), p.stride(0),
        0 if entropy is None else entropy.stride(0), softcap_of(problem) or 0.0,
    )  # fmt: skip
