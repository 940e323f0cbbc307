"""The reductions "mean", "sum" and "none" of :func:`cce.loss` and of every recipe in ``cce.losses``."""

from __future__ import annotations

import torch
from torch import Tensor


def total(in_use: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Divisor of "mean": the sum of the weights in use; NaN, or 0 as 0 / 0 is NaN, where there are none.

    Args:
        in_use: (...) bool.
        weights: (...), or None for 1 each.
        dtype: of a count.
    """
    if weights is None:
        return in_use.sum(dtype=dtype)
    found = weights.masked_fill(~in_use, 0).sum()  # a product with 0 would keep a NaN
    return torch.where(found == 0, torch.nan, found)


def reduce(values: Tensor, in_use: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """``values`` reduced; those not in use are 0, whatever they were, and get no gradient.

    Args:
        values: (...) one a token, or one a sequence.
        in_use: (...) bool.
        reduction: "none", "sum", "mean" over the weights in use, or "sequence": the mean of each row along the last
            dimension, averaged over the rows that have weights in use.
        weights: (...), or None for 1 each.
    """
    values = values.masked_fill(~in_use, 0)
    if weights is not None:
        weights = weights.to(values.dtype).masked_fill(~in_use, 0)
        values = values * weights
    if reduction == "none":
        return values
    if reduction == "sequence":
        # A row without a weight is left out before the division, as the derivative of 0 / 0 is NaN too; and after it,
        # as its weights have no gradient.
        of_row = (in_use.to(values.dtype) if weights is None else weights).sum(-1)
        empty = of_row == 0
        values = (values.sum(-1) / of_row.masked_fill(empty, 1)).masked_fill(empty, 0)
        return values.sum() / total(~empty, None, values.dtype)
    return values.sum() if reduction == "sum" else values.sum() / total(in_use, weights, values.dtype)
