"""Logits, statistics and dx as the contract has them, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.kernels import Formula, Rows, Splits, Tiles


def capped(x: Tensor, formula: Formula) -> Tensor:
    """A logit from e c^T + bias."""
    x = x * formula.scale
    return x if formula.softcap is None else formula.softcap * torch.tanh(x / formula.softcap)


def logits(e: Tensor, c: Tensor, formula: Formula) -> Tensor:
    """(rows, columns) float64."""
    x = e.double() @ c.double().T
    return capped(x if formula.bias is None else x + formula.bias.double(), formula)


def finite(m: Tensor) -> Tensor:
    return torch.where(m == -torch.inf, 0.0, m)


def sums_about(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """sum exp(z - m) and sum exp(z - m) (m - z) of each row."""
    p = torch.exp(z - finite(m)[:, None])
    return p.sum(1), torch.where(p > 0, p * (finite(m)[:, None] - z), 0.0).sum(1)


def join(splits: Splits, s: int, z: Tensor, u: Tensor | None, first: int, carry: bool) -> None:
    """Split s takes in some logits, whose first column has the place ``first``."""
    n = len(z)
    m0 = splits.max[s].double() if carry else z.new_full((n,), -torch.inf)
    s0 = splits.sum[s].double() if carry else z.new_zeros(n)
    m1 = z.amax(1) if z.shape[1] else z.new_full((n,), -torch.inf)
    m = torch.maximum(m0, m1)
    s1, gap1 = sums_about(z, m)
    factor = torch.exp(m0 - finite(m))
    splits.max[s] = m
    splits.sum[s] = s1 + s0 * factor
    if splits.gap is not None:
        gap0 = splits.gap[s].double() if carry else z.new_zeros(n)
        splits.gap[s] = gap1 + torch.where(s0 > 0, factor * (gap0 + s0 * (finite(m) - m0)), 0.0)
    if splits.weighted is not None:
        assert u is not None
        before = splits.weighted[s].double() if carry else z.new_zeros(n)
        splits.weighted[s] = before + torch.where(u == 0, 0.0, z * u).sum(1)
    if splits.best is not None:
        before = splits.best[s] if carry else torch.zeros_like(splits.best[s])
        place = first + z.argmax(1) if z.shape[1] else before
        splits.best[s] = torch.where(m1 > m0, place, before).to(torch.int32)


def describe(tiles: Tiles, t: int, z: Tensor) -> None:
    """Vocabulary block t, whose logits are ``z``."""
    m = z.amax(1)
    s, gap = sums_about(z, m)
    tiles.lse[t] = finite(m) + s.log()
    if tiles.max is not None:
        tiles.max[t] = m
    if tiles.entropy is not None:
        tiles.entropy[t] = torch.where(s > 0, s.log() + gap / s, 0.0)


def dx_of(
    z: Tensor, rows: Rows, index: Tensor, place: Tensor, softcap: float | None, weight: Tensor | None = None
) -> Tensor:
    """(rows, columns) float64: dx of the rows ``index`` and the columns at ``place``; all as :class:`Rows` has it."""

    def of(x: Tensor) -> Tensor:
        return x[index].double()[:, None]

    masked = z == -torch.inf
    p = torch.where(masked, 0.0, torch.exp(z - of(rows.lse)))
    dx = p * of(rows.a)
    if rows.h is not None:
        assert rows.entropy is not None
        dx = dx + p * of(rows.h) * (of(rows.lse) - of(rows.entropy) - torch.where(masked, 0.0, z))
    for k in range(rows.targets.shape[1]):
        dx = dx - torch.where(place == rows.targets[index, k][:, None], of(rows.g[:, k]), 0.0)
    if rows.s is not None and weight is not None:
        dx = dx + of(rows.s) * weight
    if softcap is not None:
        dx = dx * (1 - (z / softcap).square())
    return torch.where(masked, 0.0, dx)
