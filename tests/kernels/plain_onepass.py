"""``OnePassKernels`` in a few lines of float64 each, for any device: the oracle of all others."""

from __future__ import annotations

import torch
from plain import capped, finite, logits
from torch import Tensor

from cce.backends.gpu.kernels import Formula
from cce.backends.gpu.onepass_kernels import OnePassKernels


def bits_of_q(q: Tensor) -> Tensor:
    """q as the numbers it holds."""
    return q if q.dtype == torch.float32 else q.view(torch.float16)


class PlainOnePass(OnePassKernels):
    """Tiles of ``columns`` columns."""

    def __init__(self, columns: int = 64) -> None:
        self._columns = columns

    def columns(self, dtype: torch.dtype) -> int:
        return self._columns

    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        wide = targets.to(torch.int64)
        ignored = wide == ignore_index
        assert bool(((wide >= 0) & (wide < v) | ignored).all())
        out.copy_(wide.masked_fill(ignored, -1).view_as(out))
        if weights is not None:
            counts = (out >= 0).double()
            weights.copy_(counts / counts.sum())

    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        for k in range(targets.shape[1]):
            target = targets[:, k].clamp(min=0)
            x = (e.double() * c[target].double()).sum(1)
            if formula.bias is not None:
                x = x + formula.bias[target].double()
            out[:, k] = torch.where(targets[:, k] < 0, 0.0, capped(x, formula))
        if used_e is not None:
            used_e.copy_(torch.where((targets >= 0).any(1)[:, None], e, 0))

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        z = logits(e, c, formula)
        for t, part in enumerate(z.split(self._columns, 1)):
            m = part.amax(1)
            p = torch.exp(part - finite(m)[:, None])
            tile_max[t], tile_sum[t] = m, p.sum(1)
            bits_of_q(q)[:, t * self._columns : t * self._columns + part.shape[1]] = p

    def join(self, tile_max: Tensor, tile_sum: Tensor, target_logits: Tensor, targets: Tensor, lse: Tensor) -> None:
        m = finite(tile_max.double().amax(0))
        found = m + (tile_sum.double() * torch.exp(tile_max.double() - m)).sum(0).log()
        own = torch.where(targets >= 0, target_logits.double(), -torch.inf).amax(1)
        lse.copy_(torch.where((targets >= 0).any(1), torch.maximum(found, own), 0.0))

    def scale(
        self, q: Tensor, tile_max: Tensor, lse: Tensor, target_logits: Tensor, targets: Tensor, a: Tensor, g: Tensor
    ) -> None:
        tile = torch.arange(q.shape[1], device=q.device) // self._columns
        factor = torch.exp(finite(tile_max.double())[tile].T - lse.double()[:, None]) * a.double()[:, None]
        x = bits_of_q(q).double() * factor
        own = torch.exp(target_logits.double() - lse.double()[:, None]) * a.double()[:, None]
        place = torch.arange(q.shape[1], device=q.device)
        here = [place == targets[:, k, None] for k in range(targets.shape[1])]
        for k, column in enumerate(here):
            x = torch.where(column, own[:, k, None], x)
        for k, column in enumerate(here):
            masked = target_logits[:, k, None] == -torch.inf
            x = x - torch.where(column & ~masked, g[:, k, None].double(), 0.0)
        counts = (targets >= 0).any(1) & (a != 0)
        q.copy_(torch.where(counts[:, None], x, 0.0))

    def value(self, weights: Tensor, lse: Tensor, target_logits: Tensor, out: Tensor) -> None:
        out.copy_((weights.double() * (lse[:, None].double() - target_logits.double())).sum())

    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor) -> None:
        for each in (x, y):
            if each is not None and factor != 1:
                each.copy_(each.double() * factor.double())
