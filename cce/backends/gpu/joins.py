"""Joins of the splits' statistics in torch: totals of a row, its entropy, and its prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Splits
from cce.backends.shared.pair import finite, pair


def totals(splits: Splits, target_logits: Tensor, targets: Tensor, in_use: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :meth:`cce.backends.gpu.kernels.Kernels.joined`."""
    m = splits.max.amax(0)
    log_sum = ((splits.max - finite(m)).exp_() * splits.sum).sum(0).log_()  # NaN where m is inf
    m = torch.where(m > -torch.inf, m, log_sum)  # NaN where a maximum left it out
    named = targets >= 0
    nll = log_sum[:, None] + (m[:, None] - target_logits)
    lse, lse_low = pair(m, log_sum)
    nll = torch.where(lse.isfinite()[:, None], nll.clamp(min=0), torch.nan)
    nll = torch.where(named & in_use[:, None], nll, 0)
    return torch.where(in_use, lse, 0), torch.where(in_use, lse_low, 0), nll


def entropy(splits: Splits, gap: Tensor, lse: Tensor, lse_low: Tensor, in_use: Tensor) -> Tensor:
    """Entropy by the chain rule: H = sum_k w_k (H_k - log w_k), w_k = exp(lse_k - lse), H_k = log s_k + gap_k / s_k.

    NaN where the log-sum-exp is not finite, as lse_low is.
    """
    empty = splits.sum == 0
    s = torch.where(empty, 1, splits.sum)
    log_s = s.log()
    log_w = torch.where(empty, 0, (splits.max - lse) + (log_s - lse_low))
    terms = log_w.exp() * (log_s + gap / s - log_w)
    entropy = torch.where(empty, 0, terms).sum(0).clamp_(min=0)
    return torch.where(in_use, torch.where(lse.isfinite(), entropy, torch.nan), 0)


def prediction(split_max: Tensor, best: Tensor, in_use: Tensor, v: int, order: Tensor | None) -> Tensor:
    """Entry at the first place of the largest logit, (N,); a row of NaN has none and gets the last place."""
    place = torch.where(split_max == split_max.amax(0), best, v - 1).amin(0).clamp_(0, v - 1).to(torch.int64)
    return torch.where(in_use, place if order is None else order.index_select(0, place), -1)
