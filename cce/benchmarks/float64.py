"""The mean loss and its gradients in float64, in pieces of the vocabulary, and errors relative to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_COLUMNS = 8192


def pieces(c: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield pieces of ``c``: the first row's number, and the rows in float64."""
    for v0 in range(0, len(c), _COLUMNS):
        yield v0, c[v0 : v0 + _COLUMNS].double()


def row_lse(e: Tensor, c: Tensor) -> Tensor:
    """Log-sum-exp of every row's logits, (N,) float64."""
    wide = e.double()
    return torch.logsumexp(torch.stack([torch.logsumexp(wide @ piece.T, 1) for _, piece in pieces(c)]), 0)


def reference(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dE (N, D) and dC (V, D) of ``F.cross_entropy(F.linear(e, c), targets)``, float64."""
    lse, wide = row_lse(e, c), e.double()
    de, dc = torch.zeros_like(wide), torch.empty(c.shape, dtype=torch.float64, device=c.device)
    for v0, piece in pieces(c):
        dz = torch.exp(wide @ piece.T - lse[:, None])
        inside = ((targets >= v0) & (targets < v0 + len(piece))).nonzero()[:, 0]
        dz[inside, targets[inside] - v0] -= 1
        dz /= len(e)
        de += dz @ piece
        dc[v0 : v0 + _COLUMNS] = dz.T @ wide
    return de, dc


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Relative error ``|found - exact| / |exact|``, without a float64 copy of ``found``."""
    gap = sum(float((f.double() - x).square().sum()) for f, x in zip(found.split(4096), exact.split(4096), strict=True))
    return float((gap / exact.square().sum()) ** 0.5)
