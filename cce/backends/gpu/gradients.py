"""Shared parts of both backwards: each row's values of the formula, and the gradient of a mean logit."""

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
        rows: each row's values in the formula of dx.
        norm: power of two (a tensor with one element) by which they have been divided, or None.
        s: (N,) gradient of the weighted logit where it is not part of dx, that is, without a softcap; or None.
    """

    rows: Rows
    norm: Tensor | None
    s: Tensor | None

    @classmethod
    def of(cls, call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]) -> Scaled:
        norm = norm_of(upstream, call.problem.dtype, call.problem.logit_scale)
        factors = scaled(upstream, call.problem.logit_scale, norm)
        is_capped, lse = call.problem.softcap is not None, outputs.lse
        s = None if factors.s is None else factors.s.to(torch.float32)  # like the mean logit, it may be float64
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
    """Add dE of sum_v u_v z_v without a softcap: total_i += s_i sum_v u_v c_v; ``total`` (N, D) may be padded."""
    step = max(1, call.spec.scratch_bytes // (8 * call.problem.d))
    total[:, : call.problem.d].addr_(s, weighted_rows(inputs, call.problem, torch.float32, step))


def add_mean_logit_to_entries(
    call: Call, logit_weight: Tensor | None, s: Tensor, norm: Tensor | None, dc: Tensor | None, dbias: Tensor | None
) -> None:
    """Add the same to dC and dbias, in float32, rounded once: dC_v += u_v sum_i s_i e_i, dbias_v += u_v sum_i s_i."""
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
    call.kernels.add_rank_one(call.spec, dc, u, total)


def rounded_de(call: Call, total: Tensor, norm: Tensor | None) -> Tensor:
    """Round dE (N, D) to its dtype from the float32 sum, which may be overwritten."""
    total = total[:, : call.problem.d]
    return (total if norm is None else total.mul_(norm)).to(call.problem.de_dtype)
