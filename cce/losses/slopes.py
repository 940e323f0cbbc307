"""Functions of a negative log-likelihood with an explicit derivative.

With p = exp(-nll), automatic differentiation of powers of p and 1 - p meets 0 * inf at p = 0 and p = 1, and loses 1 - p
to rounding. A recipe therefore gives the value and the derivative, each as a formula that is safe there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def with_slope(f: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *constants: float) -> Tensor:
    """Return ``value`` of ``value, slope = f(x, *constants)``, with derivative ``slope``; elementwise, for x >= 0."""
    value, slope = f(x.detach(), *constants)
    beyond = value.isinf() | slope.isinf()
    # Add 0 with that derivative, by operations that torch.compile supports. Where x is infinite, inf - inf would be
    # NaN; a value that is finite there has no slope. Where an infinite value is right, any line with the slope leads to
    # it.
    finite = x.masked_fill(x.isinf(), 0)
    near = value + slope.masked_fill(beyond, 0) * (finite - finite.detach())
    return torch.where(beyond, value + slope * x, near)


def probabilities(nll: Tensor) -> tuple[Tensor, Tensor]:
    """p and 1 - p, each to full relative precision."""
    return torch.exp(-nll), -torch.expm1(-nll)


def least_rest(dtype: torch.dtype) -> float:
    """Lower bound of 1 - p under a logarithm, 1.5e-5 in float32.

    ``nll`` and the p of the backward are known to epsilon times the size of the logits. The derivative 1 / (1 - p)
    multiplies that error: with a smaller bound, noise would outweigh the gradient, which is at most 1.
    """
    return 2**7 * torch.finfo(dtype).eps


def log_rest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - mass) of a probability mass, and its derivative, bounded by ``least_rest``."""
    rest = (1 - mass).clamp(min=least_rest(mass.dtype))
    return rest.log(), -1 / rest


def log_complement(nll: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - exp(-nll)) and its derivative in ``nll``, bounded by ``least_rest``."""
    p, rest = probabilities(nll)
    rest = rest.clamp(min=least_rest(nll.dtype))
    # log1p is exact where 1 - p rounds to 1, log where p rounds to 1.
    return torch.where(p < 0.5, torch.log1p(-p), rest.log()), p / rest
