"""Loss and gradients in one pass, where all logits fit into the scratch memory: three products instead of four."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cce.backends.gpu.sizes import cdiv, pitch
from cce.backends.scaling import norm_of, scaled
from cce.backends.triton.call import Call, multiprocessors
from cce.backends.triton.forward import target_logits_of
from cce.backends.triton.kernels.onepass import join_kernel, multiply_kernel, scale_kernel, store_kernel
from cce.backends.triton.operands import matrix
from cce.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.spec import Spec


def loss_and_gradients(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Outputs, and the gradients of ``sum_ik weights_ik (lse_i - z[i, targets_ik])``."""
    call = Call.of(inputs, problem, spec)
    n, width = problem.n, pitch(problem.v)
    a = weights[:, 0] if problem.k == 1 else weights.sum(1)
    norm = norm_of(Upstream(a, weights), problem.dtype)
    upstream = scaled(Upstream(a, weights), problem.logit_scale, norm)
    a, g = upstream.a, upstream.g
    # exp(z - m) lies in [0, 1], where float16 is finer than bfloat16; the gradient takes its place.
    dz = call.empty(n, width, dtype=problem.dtype)
    q = dz if problem.dtype == torch.float32 else dz.view(torch.float16)
    target_logits = target_logits_of(call, inputs.targets)
    tile_max, lse = _store(call, inputs, q, target_logits)
    tile, k = call.launch.dense, inputs.targets.shape[1]
    rows = 16
    scale_kernel[(len(tile_max), cdiv(n, rows))](
        q, dz, tile_max, lse, target_logits, inputs.targets, a, g, n, problem.v, k, width,
        TILE_V=tile.columns, BLOCK_N=rows,
    )  # fmt: skip
    ignored = inputs.targets < 0 if problem.k == 1 else (inputs.targets < 0).all(1, keepdim=True)
    return Outputs(lse, target_logits), _products(call, dz[:, : problem.v], ignored, norm)


def _store(call: Call, inputs: Inputs[Tensor], q: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Fills q (N, V); the maxima (T, N) it is relative to, and lse (N,)."""
    problem, launch, tile = call.problem, call.launch, call.launch.dense
    n, k = inputs.targets.shape
    t, blocks = cdiv(problem.v, tile.columns), cdiv(n, tile.rows)
    tile_max, tile_sum, lse = call.empty(t, n), call.empty(t, n), call.empty(n)
    store_kernel[(min(launch.programs, blocks * t),)](
        **call.operands(tile, call.e), q=matrix(q, tile.rows, tile.columns, launch.tma), tile_max=tile_max,
        tile_sum=tile_sum, N=n, V=problem.v, stride_q=q.stride(0), Q_TMA=launch.tma,
        MASK=problem.v % tile.columns != 0, BLOCK_N=tile.rows, TILE_V=tile.columns, BLOCK_D=tile.depth,
        GROUP_N=launch.group_n, FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    join_kernel[(cdiv(n, 16),)](
        tile_max, tile_sum, target_logits, inputs.targets, lse, n, k, t, BLOCK_N=16, BLOCK_T=128
    )
    return tile_max, lse


def _products(call: Call, dz: Tensor, ignored: Tensor, norm: Tensor | None) -> Gradients[Tensor]:
    """dE = dz c, dC = dz^T e and dbias, the column sums, by the library."""
    problem = call.problem
    c = call.c.to(problem.dtype)
    de = torch.mm(dz, c).to(problem.e_dtype) if problem.grad_e else None
    dc = None
    if problem.grad_c:
        e = call.e.masked_fill(ignored, 0)  # such a row may hold NaN
        dc = torch.mm(dz.T, e).to(problem.c_dtype)
    dbias = dz.sum(0, dtype=torch.float32) if problem.grad_bias else None
    if norm is not None:
        for x in (de, dc, dbias):
            if x is not None:
                x.mul_(norm)
    return Gradients(de, dc, dbias)


def multiply(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies each in place by ``factor``; nothing is read or written where that is 1."""
    found = [x for x in gradients if x.numel()]
    for first, second in zip(found[::2], [*found[1::2], None], strict=False):
        programs, block = 8 * multiprocessors(factor.device), 4096
        size = first.numel() + (0 if second is None else second.numel())
        multiply_kernel[(min(programs, cdiv(size, block)),)](
            first, second, factor, first.numel(), 0 if second is None else second.numel(), SECOND=second is not None,
            BLOCK=block,
        )  # fmt: skip
