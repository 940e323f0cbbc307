"""Upstream gradients as the products take them: multiplied by the logit scale, and within the range of float16."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.problem import Upstream


def norm_of(
    upstream: Upstream[Tensor], operand: torch.dtype, logit_scale: float, largest: float = 1.0
) -> Tensor | None:
    """Divisor of the upstream gradients that keeps dz from underflowing in float16; None for other dtypes.

    It is a power of two, so that dividing and multiplying by it are exact: the one that brings the largest finite
    gradient, times the logit scale, between half of ``largest`` and ``largest``. dz is then at most some tens of
    times as large (the entropy's term, a target named several times). A product of dz may still leave float16's range,
    as it grows with e, c and their number of rows: its sums are multiplied by the norm before they are rounded.
    """
    if operand != torch.float16:
        return None
    parts = [part for part in (upstream.a, upstream.g, upstream.h, upstream.s) if part is not None]
    found = torch.stack([part.nan_to_num(0, 0, 0).abs().amax() for part in parts]).amax() * logit_scale
    return torch.where(found > 0, torch.exp2(torch.ceil(torch.log2(found))) / largest, 1.0)


def scaled(upstream: Upstream[Tensor], logit_scale: float, norm: Tensor | None) -> Upstream[Tensor]:
    """The upstream gradients times logit_scale, since dx = logit_scale dz is what both products need."""
    if norm is None and logit_scale == 1.0:
        return upstream
    factor = logit_scale if norm is None else logit_scale / norm
    return Upstream(**{name: None if x is None else x * factor for name, x in vars(upstream).items()})
