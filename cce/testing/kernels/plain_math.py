"""Logits, statistics and dx as the contract has them, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula, Rows, Splits, Tiles


def capped(x: Tensor, bias: Tensor | None, formula: Formula) -> Tensor:
    """A logit from e c^T and a bias."""
    z = (x if bias is None else x + bias.double()) * formula.scale
    if formula.softcap is None:
        return z
    z = formula.softcap * torch.tanh(z / formula.softcap)
    return z if bias is None else torch.where(bias == -torch.inf, -torch.inf, z)


def logits(e: Tensor, c: Tensor, formula: Formula) -> Tensor:
    """(rows, columns) float64."""
    return capped(e.double() @ c.double().T, formula.bias, formula)


def logits_of_targets(e: Tensor, c: Tensor, targets: Tensor, formula: Formula) -> Tensor:
    """(N, K) float64, 0 for -1."""
    found = torch.zeros(targets.shape, dtype=torch.float64, device=e.device)
    for k in range(targets.shape[1]):
        target = targets[:, k].clamp(min=0)
        bias = None if formula.bias is None else formula.bias[target]
        z = capped((e.double() * c[target].double()).sum(1), bias, formula)
        found[:, k] = torch.where(targets[:, k] < 0, 0.0, z)
    return found


def largest(z: Tensor) -> Tensor:
    """Largest logit of each row, in float32, to which sums are relative."""
    return z.amax(1).float().double()


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
    m1 = largest(z) if z.shape[1] else z.new_full((n,), -torch.inf)
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
        splits.weighted[s] = before + (z * u).sum(1)
    if splits.best is not None:
        before = splits.best[s] if carry else torch.zeros_like(splits.best[s])
        place = first + z.argmax(1) if z.shape[1] else before
        splits.best[s] = torch.where(m1 > m0, place, before).to(torch.int32)


def describe(tiles: Tiles, t: int, z: Tensor) -> None:
    """Vocabulary block t, whose logits are ``z``."""
    m = largest(z)
    s, gap = sums_about(z, m)
    tiles.max[t] = m
    tiles.log_sum[t] = torch.where(m == -torch.inf, 0.0, s.log())
    if tiles.entropy is not None:
        tiles.entropy[t] = torch.where(s > 0, s.log() + gap / s, 0.0)


def dx_of(
    z: Tensor, rows: Rows, index: Tensor, place: Tensor, softcap: float | None, weight: Tensor | None = None
) -> Tensor:
    """(rows, columns) float64: dx of the rows ``index`` and the columns at ``place``; all as :class:`Rows` has it."""

    def of(x: Tensor) -> Tensor:
        return x[index].double()[:, None]

    masked = (z == -torch.inf) & of(rows.lse).isfinite()
    p = torch.exp((z - of(rows.lse)) - of(rows.lse_low))  # 0 where masked; NaN in a row without a softmax
    dx = p * of(rows.a)
    if rows.h is not None:
        assert rows.entropy is not None
        gap = (of(rows.lse) - z) + (of(rows.lse_low) - of(rows.entropy))
        dx = dx + torch.where(masked, 0.0, p * of(rows.h) * gap)
    for k in range(rows.targets.shape[1]):
        dx = dx - torch.where(place == rows.targets[index, k][:, None], of(rows.g[:, k]), 0.0)
    if rows.s is not None and weight is not None:
        dx = dx + of(rows.s) * weight
    if softcap is not None:
        dx = dx * torch.where(z == -torch.inf, 0.0, 1 - (z / softcap).square())
    return dx


def joined(
    m: Tensor, s: Tensor, target_logits: Tensor, targets: Tensor, in_use: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, lse_low (N,) and nll (N, K) float64, from maxima and sums (S, N); the first two add up to float64's."""
    m, s, named = m.double(), s.double(), targets >= 0
    largest = m.amax(0)
    log_sum = (s * torch.exp(m - finite(largest))).sum(0).log()
    lse = torch.where(largest == torch.inf, largest, largest + log_sum)
    nll = torch.where(lse.isfinite()[:, None], (lse[:, None] - target_logits.double()).clamp(min=0), torch.nan)
    high = lse.float().double()
    low = torch.where(lse.isfinite(), lse - high, torch.nan)
    nll = torch.where(named & in_use[:, None], nll, 0.0)
    return torch.where(in_use, high, 0.0), torch.where(in_use, low, 0.0), nll
