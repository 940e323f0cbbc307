"""Functions of a negative log-likelihood with a derivative of their own.

With p = exp(-nll), automatic differentiation of powers of p and 1 - p meets 0 * inf at p = 0 and p = 1, and loses what
1 - p holds in rounding. A recipe therefore gives the value and the derivative, each as a formula that is safe there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_slope(f: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *constants: float) -> Tensor:
    """``value`` of ``value, slope = f(x, *constants)``, with ``slope`` as its derivative; elementwise."""
    with torch.no_grad():
        value, slope = f(x, *constants)
    found: Tensor = _Sloped.apply(x, value, slope)  # type: ignore[no-untyped-call]
    return found


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None


def probabilities(nll: Tensor) -> tuple[Tensor, Tensor]:
    """p and 1 - p, each to full relative precision."""
    return torch.exp(-nll), -torch.expm1(-nll)


def log_rest(mass: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - mass) of a probability mass, and its derivative; 1 - mass counts as at least the dtype's epsilon.

    A mass that comes from a log-sum-exp is known no better.
    """
    rest = (1 - mass).clamp(min=torch.finfo(mass.dtype).eps)
    return rest.log(), -1 / rest


def log_complement(nll: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - exp(-nll)) and its derivative in ``nll``; 1 - p counts as at least the dtype's epsilon."""
    p, rest = probabilities(nll)
    rest = rest.clamp(min=torch.finfo(nll.dtype).eps)
    # log1p is exact where 1 - p rounds to 1, log where p rounds to 1.
    return torch.where(p < 0.5, torch.log1p(-p), rest.log()), p / rest
