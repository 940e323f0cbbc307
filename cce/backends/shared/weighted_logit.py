"""The mean logit of a row, for label smoothing: without a softcap, two products with a vector and no logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Problem
from cce.spec import Spec


def finest_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which a mean logit is subtracted from a log-sum-exp: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def weighted_logit(inputs: Inputs[Tensor], problem: Problem, spec: Spec) -> Tensor:
    """Weighted logit ``sum_v u_v z_iv = logit_scale (e_i . sum_v u_v c_v + sum_v u_v bias_v)``, without a softcap.

    The result is (N,) in :func:`finest_dtype`: a smoothed loss is its difference from the log-sum-exp, and both may be
    large. Copies of pieces of ``c`` and ``e`` stay within the scratch memory. A weight of 0 on a bias of -inf gives
    NaN, as in PyTorch.
    """
    wide = finest_dtype(inputs.e.device)
    step = max(1, spec.scratch_bytes // (4 * problem.d * wide.itemsize))
    mean = weighted_rows(inputs, problem, wide, step)
    n = len(inputs.targets)
    pieces = []
    for n0 in range(0, n, step):
        rows = slice(n0, n0 + step) if inputs.rows is None else inputs.rows[n0 : n0 + step]
        pieces.append(inputs.e[rows].to(wide) @ mean)
    found = torch.cat(pieces)
    if inputs.bias is not None:
        bias = inputs.bias.to(wide)
        found += bias.mean() if inputs.logit_weight is None else inputs.logit_weight.to(wide) @ bias
    return found.mul_(problem.logit_scale)


def weighted_rows(inputs: Inputs[Tensor], problem: Problem, wide: torch.dtype, step: int) -> Tensor:
    """Sum ``sum_v u_v c_v``, (D,) in dtype ``wide``, computed in pieces of ``step`` rows of ``c``."""
    total = inputs.c.new_zeros(problem.d, dtype=wide)
    for v0 in range(0, problem.v, step):
        piece = inputs.c[v0 : v0 + step].to(wide)
        if inputs.logit_weight is None:
            total += piece.sum(0) / problem.v
        else:
            total += inputs.logit_weight[v0 : v0 + step].to(wide) @ piece
    return total
