"""The log-sum-exp of a row as a pair of numbers, the second of which is the rounding error of the first.

Only differences of logits count. Where all logits of a row share a large offset, a float32 log-sum-exp holds few digits
of them; a pair holds them all (Dekker, *A floating-point technique for extending the available precision*, 1971).
"""

from __future__ import annotations

import torch
from torch import Tensor


def finite(m: Tensor) -> Tensor:
    """Replace -inf, the maximum of masked entries, by 0, so that it can be subtracted: -inf + inf would be NaN."""
    return torch.where(m == -torch.inf, 0, m)


def joined(m: Tensor, log_s: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum M and ``log sum_k exp(m_k - M + log_s_k)`` along ``dim``; their sum is the log-sum-exp.

    Args:
        m: maxima, -inf where a part has no entry left. log_s: log of the part's sum relative to m; ignored where m is
            -inf.
    """
    largest = m.amax(dim, keepdim=True)
    relative = torch.where(m == -torch.inf, m, (m - finite(largest)) + log_s)
    return largest.squeeze(dim), relative.exp().sum(dim).log()


def pair(m: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``m + log_s`` rounded, and the error of that rounding, which is NaN where the sum is not finite.

    A maximum of inf is the log-sum-exp, although the sum of its row is NaN.
    """
    high = torch.where(m.isinf(), m, m + log_s)
    # The two-sum of Knuth: exact whichever of the two is the larger.
    part = high - m
    low = (m - (high - part)) + (log_s - part)
    return high, torch.where(high.isfinite(), low, torch.nan)
