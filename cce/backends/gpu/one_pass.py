"""Loss and gradients in one pass, where all logits of enough rows fit into the scratch memory.

The steps are those of docs/decisions/0003, with kernels for what would be a separate torch operation
(one_pass_kernels.py): three products instead of four. Rows are divided into chunks (row_chunks.py) where the logits of
all do not fit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.operands import aligned, formula_of, is_aligned, taken
from cce.backends.gpu.products import scaled_product
from cce.backends.gpu.row_chunks import RowsOfChunk, Total, inputs_of, row_chunks
from cce.backends.gpu.sizes import cdiv, logits_bytes, padded, pitch, windows
from cce.backends.gpu.used_rows import ask, is_captured, rows_with_target
from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.backends.shared.rows import rows_of
from cce.backends.shared.scaling import norm_of, scaled
from cce.spec import Spec

#: Of 16-bit factors. A kept logit errs by 2^-12, its derivative by 2^-11 of the cap where the logit is close to it.
_LEAST_SOFTCAP = 8.0


def serves(problem: Problem, spec: Spec) -> bool:
    """Whether a problem has such a pass and gains from it; from metadata alone."""
    plain = spec.filter == "none" and not problem.outputs and _keeps_derivative(problem)
    # torch's products need factors of one dtype; a c of the narrower dtype would have to be copied.
    return plain and problem.c_dtype == problem.dtype and row_chunks(problem, spec) is not None


def _keeps_derivative(problem: Problem) -> bool:
    """Whether a softcap's derivative is as accurate as the products' factors, made of logits that float16 has held."""
    return problem.softcap is None or problem.dtype == torch.float32 or problem.softcap >= _LEAST_SOFTCAP


def described(problem: Problem, spec: Spec) -> str:
    """One line for :func:`cce.explain` on the pass of a problem that :func:`serves`."""
    chunks = row_chunks(problem, spec)
    assert chunks is not None
    rows = "all rows at once" if not chunks.most else f"{chunks.first} rows, then at most {chunks.most} at a time"
    products = 1 + problem.grad_e + problem.grad_c
    return f"a mean or sum: gradients along with the loss, in {products} products; {rows}"


def loss_and_gradients(
    kernels: OnePassKernels, inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Outputs, and gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``, for all rows of ``e``."""
    chunks, (upstream, norm) = row_chunks(problem, spec), _factors(problem, weights)
    assert chunks is not None
    if chunks.first == problem.n:
        return _chunk(kernels, inputs, problem, spec, upstream, norm, None)
    first = chunks.first
    others = inputs.targets[first:]
    ask(others)  # first, so that the answer does not wait for the sort of targets
    total = Total(inputs.e, inputs.targets, problem)

    def add(rows: RowsOfChunk) -> None:
        part = inputs_of(inputs, rows)
        sizes = replace(problem, n=len(part.targets))
        total.add(rows, *_chunk(kernels, part, sizes, spec, rows_of(upstream, rows), norm, total))

    add(slice(0, first))
    rows = None if is_captured(others) else rows_with_target(others, None)[0]
    for n0, n1 in chunks.later(len(others) if rows is None else len(rows)):
        add(slice(first + n0, first + n1) if rows is None else rows[n0:n1] + first)
    return total.outputs, total.gradients


def _factors(problem: Problem, weights: Tensor) -> tuple[Upstream[Tensor], Tensor | None]:
    """Upstream gradients a (N,) and g (N, K), times the logit scale, and the divisor applied to them."""
    upstream = Upstream(weights[:, 0] if problem.k == 1 else weights.sum(1), weights)
    if problem.dtype != torch.float16 and problem.logit_scale == 1.0:
        return upstream, None
    norm = norm_of(upstream, problem.dtype, problem.logit_scale)
    return scaled(upstream, problem.logit_scale, norm), norm


def _chunk(
    kernels: OnePassKernels,
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    upstream: Upstream[Tensor],
    norm: Tensor | None,
    total: Total | None,
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Compute outputs and gradients of rows whose logits are made at once; their dC is added to that of ``total``."""
    n, v, k, dtype = problem.n, problem.v, problem.k, problem.dtype
    kernels, formula = kernels.of_problem(problem, spec), formula_of(inputs.bias, problem)
    e, c, targets = taken(kernels.any_layout, inputs.e, dtype, inputs.rows), inputs.c, inputs.targets
    tiles = cdiv(v, kernels.columns(dtype))

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
    kernels.scale(dz, tile_max, lse, lse_low, nll, targets, upstream.a, upstream.g, formula.softcap)
    return Outputs(lse, nll, lse_low), _products(problem, dz, c, used, norm, total)


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


def _products(
    problem: Problem, dz: Tensor, c: Tensor, e: Tensor | None, norm: Tensor | None, total: Total | None
) -> Gradients[Tensor]:
    """dE = dz c, dC = dz^T e, added to that of ``total`` if given, and dbias, the column sums of dz, by torch."""
    de = scaled_product(dz, c, norm).to(problem.e_dtype) if problem.grad_e else None
    dc = None
    if e is not None and total is not None:
        total.add_dc(dz, e)
    elif e is not None:
        dc = scaled_product(dz.T, e, norm)
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


def multiply(kernels: OnePassKernels, gradients: Gradients[Tensor], factor: Tensor, targets: Tensor) -> None:
    """Multiply the gradients in place by ``factor``, as :meth:`cce.backends.base.OnePass.scale` says."""
    found = [x for x in (gradients.de, gradients.dc, gradients.dbias) if x is not None and x.numel()]
    for first, second in zip(found[::2], [*found[1::2], None], strict=False):
        kernels.multiply(first, second, factor, targets, first is gradients.de)
