"""Loss and gradients in one pass, where all logits fit into the scratch memory: three products instead of four.

The steps are those of docs/decisions/0003, with kernels for what would be a separate torch operation
(one_pass_kernels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.operands import aligned, formula_of, is_aligned, taken
from cce.backends.gpu.products import scaled_product
from cce.backends.gpu.sizes import cdiv, logits_bytes, padded, pitch, windows
from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.backends.shared.scaling import norm_of, scaled
from cce.spec import Spec


def serves(problem: Problem, spec: Spec) -> bool:
    """Whether a problem has such a pass and gains from it; from metadata alone."""
    plain = spec.filter == "none" and problem.softcap is None and not problem.outputs
    # torch's products need factors of one dtype; a c of the narrower dtype would have to be copied.
    return plain and problem.c_dtype == problem.dtype and logits_bytes(problem) <= spec.scratch_bytes


def loss_and_gradients(
    kernels: OnePassKernels, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Outputs, and gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``, for all rows of ``e``."""
    n, v, k, dtype = problem.n, problem.v, problem.k, problem.dtype
    kernels, formula = kernels.of_problem(problem, spec), formula_of(inputs.bias, problem)
    e, c, targets = taken(kernels.any_layout, inputs.e, dtype, inputs.rows), inputs.c, inputs.targets
    tiles = cdiv(v, kernels.columns(dtype))

    a, g, norm = _factors(problem, weights)
    target_logits = e.new_empty((n, k), dtype=torch.float32)
    # A row without a target may hold NaN: the product for dC reads zeros there.
    used = e.new_empty((n, problem.d)) if problem.grad_c else None
    kernels.target_logits(e if e is inputs.e else e[:, : problem.d], c, targets, formula, target_logits, used)
    tile_max, tile_sum = e.new_empty((2, tiles, n), dtype=torch.float32).unbind()
    lse, lse_low = e.new_empty((2, n), dtype=torch.float32).unbind()
    nll, dz = torch.empty_like(target_logits), e.new_empty((n, pitch(v)))
    dz = dz if dz.shape[1] == v else dz[:, :v]
    _store(kernels, problem, spec, e, c, formula, dz, tile_max, tile_sum)
    kernels.join(tile_max, tile_sum, target_logits, targets, lse, lse_low, nll)
    kernels.scale(dz, tile_max, lse, lse_low, nll, targets, a, g)
    return Outputs(lse, nll, lse_low), _products(problem, dz, c, used, norm)


def _factors(problem: Problem, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """a (N,) and g (N, K), times the logit scale, and the divisor applied to them."""
    a = weights[:, 0] if problem.k == 1 else weights.sum(1)
    if problem.dtype != torch.float16 and problem.logit_scale == 1.0:
        return a, weights, None
    upstream = Upstream(a, weights)
    norm = norm_of(upstream, problem.dtype, problem.logit_scale)
    upstream = scaled(upstream, problem.logit_scale, norm)
    return upstream.a, upstream.g, norm


def _store(
    kernels: OnePassKernels,
    problem: Problem,
    spec: Spec,
    e: Tensor,
    c: Tensor,
    formula: Formula,
    q: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
) -> None:
    """Store q of the whole vocabulary: at once, or in windows of aligned copies of the rows of ``c``."""
    if kernels.any_layout or is_aligned(c, problem.dtype):
        kernels.store(e, c, formula, q, tile_max, tile_sum)
        return
    columns, row_bytes = kernels.columns(problem.dtype), padded(problem.d, problem.dtype) * problem.dtype.itemsize
    for v0, v1 in windows(problem.v, columns, row_bytes, max(1, spec.scratch_bytes - logits_bytes(problem))):
        bias = None if formula.bias is None else formula.bias[v0:v1]
        rows, part = aligned(c[v0:v1], problem.dtype), slice(v0 // columns, cdiv(v1, columns))
        kernels.store(e, rows, replace(formula, bias=bias), q[:, v0:v1], tile_max[part], tile_sum[part])


def _products(problem: Problem, dz: Tensor, c: Tensor, e: Tensor | None, norm: Tensor | None) -> Gradients[Tensor]:
    """dE = dz c, dC = dz^T e and dbias, the column sums of dz, by torch."""
    de = scaled_product(dz, c, norm).to(problem.e_dtype) if problem.grad_e else None
    dc = None if e is None else scaled_product(dz.T, e, norm)
    dbias = dz.sum(0, dtype=torch.float32) if problem.grad_bias else None
    return Gradients(de, dc, dbias if dbias is None or norm is None else dbias.mul_(norm))


def prepared(
    kernels: OnePassKernels, targets: Tensor, v: int, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Targets (N, K) as backends take them, and their weights in a mean, (N, 1), if these are wanted."""
    out = targets.new_empty(targets.shape, dtype=torch.int64)
    weights = targets.new_empty(targets.shape, dtype=torch.float32) if mean else None
    kernels.prepare(targets, v, ignore_index, out, weights)
    return out, weights


def value(kernels: OnePassKernels, outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
    """Return ``sum_ik weights_ik nll_ik``, float32."""
    found = outputs.nll.new_empty(())
    kernels.value(weights, outputs.nll, found)
    return found


def multiply(kernels: OnePassKernels, gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient in place by ``factor``; if that is 1, nothing is read or written."""
    found = [x for x in gradients if x.numel()]
    for first, second in zip(found[::2], [*found[1::2], None], strict=False):
        kernels.multiply(first, second, factor)
