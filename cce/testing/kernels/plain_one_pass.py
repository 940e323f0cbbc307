"""``OnePassKernels`` in a few lines of float64 each, for any device: the oracle of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.testing.kernels.plain_math import finite, joined, largest, logits, logits_of_targets


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
        if not out.is_cuda:  # where the question would wait for the GPU
            assert bool(((wide >= 0) & (wide < v) | ignored).all())
        out.copy_(wide.masked_fill(ignored, -1).view_as(out))
        if weights is not None:
            counts = (out >= 0).double()
            weights.copy_(counts / counts.sum())

    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        out.copy_(logits_of_targets(e, c, targets, formula))
        if used_e is not None:
            used_e.copy_(torch.where((targets >= 0).any(1)[:, None], e, 0))

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        z = logits(e, c, formula)
        for t, part in enumerate(z.split(self._columns, 1)):
            m = largest(part)
            p = torch.exp(part - finite(m)[:, None])
            tile_max[t], tile_sum[t] = m, p.sum(1)
            bits_of_q(q)[:, t * self._columns : t * self._columns + part.shape[1]] = p

    def join(
        self,
        tile_max: Tensor,
        tile_sum: Tensor,
        target_logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
    ) -> None:
        found = joined(tile_max, tile_sum, target_logits, targets, (targets >= 0).any(1))
        for out, x in zip((lse, lse_low, nll), found, strict=True):
            out.copy_(x)

    def scale(
        self,
        q: Tensor,
        tile_max: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
        targets: Tensor,
        a: Tensor,
        g: Tensor,
        softcap: float | None,
    ) -> None:
        tile = torch.arange(q.shape[1], device=q.device) // self._columns
        log_factor = (tile_max.double() - lse.double()) - lse_low.double()  # (T, N)
        p = torch.where((tile_max == -torch.inf)[tile].T & lse.isfinite()[:, None], 0.0, bits_of_q(q).double())
        z = tile_max.double()[tile].T + bits_of_q(q).double().log()
        p = p * log_factor.exp()[tile].T
        place = torch.arange(q.shape[1], device=q.device)
        here = [place == targets[:, k, None] for k in range(targets.shape[1])]
        for k, column in enumerate(here):
            p = torch.where(column, torch.exp(-nll[:, k, None].double()), p)
            z = torch.where(column, (lse.double() - nll[:, k].double())[:, None], z)
        x = p * a.double()[:, None]
        for k, column in enumerate(here):
            x = x - torch.where(column, g[:, k, None].double(), 0.0)
        if softcap is not None:
            x = x * (1 - (z / softcap).clamp(-1, 1).square()).where(x.isfinite(), 1)
        counts = (targets >= 0).any(1) & ((a != 0) | (g != 0).any(1) | ~lse.isfinite())
        q.copy_(torch.where(counts[:, None], x, 0.0))

    def value(self, weights: Tensor, nll: Tensor, out: Tensor) -> None:
        out.copy_((weights.double() * nll.double()).sum())

    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor, targets: Tensor, is_de: bool) -> None:
        ignored = (targets < 0).all(1)
        for each in (x, y):
            if each is not None and factor != 1:
                each.copy_(each.double() * factor.double())
            if each is not None and ignored.all() and not factor.isfinite():
                each.zero_()
        if is_de:
            x[ignored] = 0
