"""Shared parts of the exact and the filtered backward: the arguments of the gradient's formula, and the sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Inputs, Outputs, Upstream
from cce.backends.shared.scaling import norm_of, scaled
from cce.backends.shared.weighted_logit import weighted_rows
from cce.backends.shared.worklist import target_positions
from cce.backends.triton.call import Call
from cce.backends.triton.forward import weights_of
from cce.backends.triton.kernels.products import finish_kernel, rank_one_kernel


@dataclass(frozen=True)
class Formula:
    """Values of each row of the problem that make up the gradient of a logit.

    Attributes:
        upstream: gradients of the outputs, times the logit scale, divided by ``norm``.
        norm: power of two (a tensor with one element), or None.
        target_place: (N, K) int32, places of the targets in the vocabulary order, -1 for none.
    """

    outputs: Outputs[Tensor]
    upstream: Upstream[Tensor]
    norm: Tensor | None
    target_place: Tensor

    @classmethod
    def of(cls, call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]) -> Formula:
        norm = norm_of(upstream, call.problem.dtype, call.problem.logit_scale)
        place = target_positions(inputs).to(torch.int32)
        if outputs.lse_low is None:
            outputs = replace(outputs, lse_low=torch.zeros_like(outputs.lse))
        return cls(outputs, scaled(upstream, call.problem.logit_scale, norm), norm, place)

    def arguments(self) -> dict[str, Any]:
        """The values in the form of kernel arguments."""
        upstream = self.upstream
        return {
            "lse": self.outputs.lse,
            "lse_low": self.outputs.lse_low,
            "entropy": self.outputs.entropy,
            "a": upstream.a,
            "g": upstream.g,
            "h": upstream.h,
            "targets": self.target_place,
            "K": self.target_place.shape[1],
            "ENTROPY": upstream.h is not None,
            "ONE_TARGET": self.target_place.shape[1] == 1,
        }


def finish_de(
    call: Call,
    total: Tensor,
    norm: Tensor | None,
    row_order: Tensor | None = None,
    keep: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Round dE (N, D) to its dtype, in ``out`` if given; ``total`` holds its rows in ``row_order``.

    Rows with ``keep`` (N,) False get 0, whatever the sums hold: zeros times a ``c`` with NaN are NaN.
    """
    problem = call.problem
    de = call.empty(problem.n, problem.d, dtype=problem.de_dtype) if out is None else out
    finish_kernel[(problem.n, cdiv(problem.d, 1024))](
        total, row_order, keep, norm, de, problem.n, problem.d, de.stride(0), SORTED=row_order is not None,
        NORM=norm is not None, BLOCK_D=1024,
    )  # fmt: skip
    return de


def add_rank_one_de(call: Call, inputs: Inputs[Tensor], s: Tensor, total: Tensor) -> None:
    """Add dE of sum_v u_v z_v without a softcap: total_i += s_i sum_v u_v c_v; ``s`` (N,) includes the logit scale."""
    problem, wide = call.problem, torch.float32
    step = max(1, call.spec.scratch_bytes // (4 * problem.d * wide.itemsize))
    total.addr_(s, weighted_rows(inputs, problem, wide, step))


def add_rank_one_dc(call: Call, weights: Tensor | None, s: Tensor, dc: Tensor | None, dbias: Tensor | None) -> None:
    """Add the same to dC and dbias: dC_v += u_v sum_i s_i e_i, dbias_v += u_v sum_i s_i."""
    problem, u = call.problem, weights_of(call, weights)
    if dc is not None:
        e = torch.where((s != 0)[:, None], call.e, 0)  # a row that does not count may be NaN
        total = torch.mv(e.to(torch.float32).T, s)
        rank_one_kernel[(problem.v, cdiv(problem.d, 1024))](dc, u, total, problem.d, dc.stride(0), BLOCK_D=1024)
    if dbias is not None:
        dbias.add_(u * s.sum())
