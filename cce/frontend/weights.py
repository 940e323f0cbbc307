"""The weights of a loss: of its tokens, of their targets, and of the entries of a smoothed target."""

from __future__ import annotations

from torch import Tensor

from cce.backends.shared.weighted_logit import finest_dtype
from cce.frontend import reduction
from cce.frontend.flatten import Flat, shifted


def in_use(flat: Flat) -> Tensor:
    """(M,) bool, the rows with a target."""
    return flat.targets[:, 0] >= 0 if flat.coefficients is None else (flat.targets >= 0).any(1)


def token_weights(flat: Flat, token_weight: Tensor) -> Tensor:
    """(M,) one weight a row; 0 where there is no target, whatever was given there."""
    of_rows = shifted(token_weight, flat.shift, token_weight.ndim, 0).reshape(-1).to(flat.wide)
    return of_rows.masked_fill(~in_use(flat), 0)


def total(flat: Flat, of_target: Tensor | None, of_tokens: Tensor | None) -> Tensor:
    """Divisor of "mean"."""
    weights = of_tokens
    if of_target is not None:
        weights = of_target[:, 0] if of_tokens is None else of_target[:, 0] * of_tokens
    return reduction.total(in_use(flat), weights, flat.wide)


def smoothing(flat: Flat, weight: Tensor | None) -> Tensor | None:
    """(V,) weights of the smoothed target's logits, of this process's entries; None stands for 1 / V each.

    As fine as the mean logit they make, or their sum would not be that which the log-sum-exp is multiplied by.
    """
    fine = finest_dtype(flat.c.device)
    if weight is not None:
        u = weight.to(fine) / flat.v
        return u if flat.part is None else u.narrow(0, flat.part.first, flat.c.shape[0])
    return None if flat.part is None else flat.c.new_full((flat.c.shape[0],), 1 / flat.v, dtype=fine)


def class_weighted(flat: Flat, weight: Tensor | None) -> Tensor | None:
    """(M, K) target weights times class weights, 0 where ignored; None if both are 1."""
    if weight is None:
        return flat.coefficients
    of_target = weight.to(flat.wide)[flat.targets.clamp(min=0)].masked_fill(flat.targets < 0, 0)
    return of_target if flat.coefficients is None else of_target * flat.coefficients
