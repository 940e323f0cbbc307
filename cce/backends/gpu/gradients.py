"""What both backwards share: the formula's numbers of each row, and the gradient of a mean logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Rows
from cce.backends.gpu.operands import Call
from cce.backends.problem import Inputs, Outputs, Upstream
from cce.backends.shared.scaling import norm_of, scaled
from cce.backends.shared.weighted_logit import weighted_rows
from cce.backends.shared.worklist import target_positions


@dataclass(frozen=True)
class Scaled:
    """The gradients of the outputs, as the products take them.

    Attributes:
        rows: what dx is made from.
        norm: a power of two (a tensor of one number) that they have been divided by, or None.
        s: (N,) of the weighted logit where it is no part of dx, which is without a softcap; or None.
    """

    rows: Rows
    norm: Tensor | None
    s: Tensor | None

    @classmethod
    def of(cls, call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]) -> Scaled:
        norm = norm_of(upstream, call.problem.dtype, call.problem.logit_scale)
        factors = scaled(upstream, call.problem.logit_scale, norm)
        is_capped, lse = call.problem.softcap is not None, outputs.lse
        s = None if factors.s is None else factors.s.to(torch.float32)  # as the mean logit is, it may be float64
        rows = Rows(
            lse=lse,
            lse_low=lse - lse if outputs.lse_low is None else outputs.lse_low,  # NaN where there is no softmax
            a=factors.a,
            g=factors.g,
            targets=target_positions(inputs).to(torch.int32),
            entropy=None if factors.h is None else outputs.entropy,
            h=factors.h,
            s=s if is_capped else None,
        )
        return cls(rows, norm, None if is_capped else s)


def add_mean_logit_to_de(call: Call, inputs: Inputs[Tensor], s: Tensor, total: Tensor) -> None:
    """dE of sum_v u_v z_v without a softcap: total_i += s_i sum_v u_v c_v; ``total`` (N, D) may be padded."""
    step = max(1, call.spec.scratch_bytes // (8 * call.problem.d))
    total[:, : call.problem.d].addr_(s, weighted_rows(inputs, call.problem, torch.float32, step))


def add_mean_logit_to_entries(
    call: Call, logit_weight: Tensor | None, s: Tensor, norm: Tensor | None, dc: Tensor | None, dbias: Tensor | None
) -> None:
    """The same of dC and dbias: dC_v += u_v sum_i s_i e_i, dbias_v += u_v sum_i s_i; added in float32, rounded once."""
    s, u = s if norm is None else s * norm, call.weights(logit_weight)
    if dbias is not None:
        dbias.add_(u * s.sum())
    if dc is None:
        return
    step = max(1, call.spec.scratch_bytes // (16 * call.problem.d))
    total = torch.zeros(call.problem.d, dtype=torch.float32, device=call.e.device)
    for e, part in zip(call.own_e.split(step), s.split(step), strict=True):
        known = torch.where((part != 0)[:, None], e, 0)  # a row that does not count may be NaN
        total += part @ known.to(torch.float32)
    for rows, part in zip(dc.split(step), u.split(step), strict=True):
        rows.copy_(torch.addcmul(rows.to(torch.float32), part[:, None], total[None]))


def rounded_de(call: Call, total: Tensor, norm: Tensor | None, row_order: Tensor | None = None) -> Tensor:
    """dE (N, D) in its dtype from the float32 sum, whose rows are in ``row_order``; ``total`` may be overwritten."""
    dtype, total = call.problem.de_dtype, total[:, : call.problem.d]
    if row_order is None:
        return (total if norm is None else total.mul_(norm)).to(dtype)
    de = call.empty(*total.shape, dtype=dtype)
    call.kernels.scatter_rows(call.spec, total, norm, row_order, de)
    return de
