"""Gradients of the mean loss in float64 on a GPU, in pieces of the vocabulary, and the error of others."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 8192


def reference(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """dE (N, D) and dC (V, D) of ``F.cross_entropy(F.linear(e, c), targets)``, float64."""
    n, v = len(e), len(c)
    wide = e.double()
    parts = [torch.logsumexp(wide @ c[v0 : v0 + _COLUMNS].double().T, 1) for v0 in range(0, v, _COLUMNS)]
    lse = torch.logsumexp(torch.stack(parts), 0)
    de, dc = torch.zeros_like(wide), torch.empty(c.shape, dtype=torch.float64, device=c.device)
    for v0 in range(0, v, _COLUMNS):
        piece = c[v0 : v0 + _COLUMNS].double()
        dz = torch.exp(wide @ piece.T - lse[:, None])
        inside = ((targets >= v0) & (targets < v0 + len(piece))).nonzero()[:, 0]
        dz[inside, targets[inside] - v0] -= 1
        dz /= n
        de += dz @ piece
        dc[v0 : v0 + _COLUMNS] = dz.T @ wide
    return de, dc


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|``, without a float64 copy of ``found``."""
    gap = sum(float((f.double() - x).square().sum()) for f, x in zip(found.split(4096), exact.split(4096), strict=True))
    return float((gap / exact.square().sum()) ** 0.5)
