"""How a call runs once it is arranged: by the operator, or by its transformable twin under ``torch.func``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cce.distributed import tokens
from cce.frontend import operators, tracing, transforms
from cce.frontend.flatten import Flat


class Rows(NamedTuple):
    """Results of the operator, per row of the flattened ``e`` (M,)."""

    lse: Tensor
    nll: Tensor  # (M, K)
    lse_low: Tensor
    entropy: Tensor
    weighted_logit: Tensor
    prediction: Tensor


def run(flat: Flat, logit_weight: Tensor | None = None) -> Rows:
    """Log-sum-exp, negative log-likelihoods and the outputs asked for, of every row."""
    if flat.own is not None and flat.part is not None:
        group, own = flat.part.group, flat.own
        every = flat._replace(
            e=tokens.gather_rows(flat.e, group, own), targets=tokens.gather_rows(flat.targets, group, own), own=None
        )
        return Rows(*(tokens.own_rows(x, group, own) if x.numel() else x for x in run(every, logit_weight)))
    # The key of a part of a vocabulary is that of what was asked for: only then was it known how large the whole is.
    decided = flat.call is not None and flat.part is None
    key = flat.call.key if decided and flat.call is not None else flat.request.key
    forward = transforms.forward if tracing.active() else operators.forward
    found = forward(flat.e, flat.c, flat.bias, flat.targets, logit_weight, flat.order, flat.scale, key)
    return Rows(*found[:6])
