"""The logit tile and its gradient, as formulas on a (rows, columns) piece."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.problem import Outputs, Problem, Upstream
from cce.backends.torch.arithmetic import Arithmetic


def logits_(problem: Problem, arithmetic: Arithmetic, e: Tensor, c: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write out = z = softcap tanh(logit_scale (e c^T + bias) / softcap), (rows, columns)."""
    z = arithmetic.product(e, c.T, out)
    if bias is not None:
        z += bias
    # One pass for both factors: the argument of tanh is logit_scale / softcap times the sum.
    factor = problem.logit_scale / (problem.softcap or 1.0)
    if factor != 1.0:
        z *= factor
    if problem.softcap is not None:
        z.tanh_().mul_(problem.softcap)
        if bias is not None:
            z.masked_fill_(bias == -torch.inf, -torch.inf)
    return z


def softmax_gradient_(
    problem: Problem, z: Tensor, outputs: Outputs[Tensor], upstream: Upstream[Tensor], u: Tensor | float
) -> Tensor:
    """Replace z by p (a + h (lse - H - z)) + s u, all of dz but its targets, (rows, columns).

    ``outputs`` and ``upstream`` hold the rows of this piece; ``u`` its logit weights, used only under a softcap.
    """
    log_p = z.sub_(outputs.lse[:, None])
    if outputs.lse_low is not None:
        log_p.sub_(outputs.lse_low[:, None])
    if upstream.h is None:
        log_p.exp_().mul_(upstream.a[:, None])
    else:
        assert outputs.entropy is not None
        p = log_p.exp()
        # p is 0 long before log p = -1e4; without a bound, masked logits (-inf) would give 0 * inf = NaN.
        log_p.clamp_(min=-1e4).neg_().sub_(outputs.entropy[:, None])
        log_p.mul_(upstream.h[:, None]).add_(upstream.a[:, None]).mul_(p)
    if upstream.s is not None and problem.softcap is not None:
        z += upstream.s[:, None] * u
    return z


def softcap_derivative(problem: Problem, z: Tensor) -> Tensor | None:
    """Derivative of the capped logit, 1 - (z / softcap)^2; None without a softcap."""
    if problem.softcap is None:
        return None
    return torch.mul(z, 1 / problem.softcap).clamp_(min=-1.0).square_().neg_().add_(1.0)  # 0 for a masked entry


def add_at_(x: Tensor, index: Tensor, values: Tensor) -> None:
    """Compute x[index] += values for 1-D x, adding repeated indices in a fixed order.

    On a CPU, ``index_add_`` runs through the indices in order; on a GPU it would use atomics, so ``index_put_``, which
    sorts, is used instead.
    """
    if x.device.type == "cpu":
        x.index_add_(0, index, values)
    else:
        x.index_put_((index,), values, accumulate=True)
