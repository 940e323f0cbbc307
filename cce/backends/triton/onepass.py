"""Loss and gradients in one pass, where all logits fit into the scratch memory: three products instead of four.

Such problems are small and their kernels short, so host time counts. Anything common to all calls with such arguments
is made once (:class:`_Steps`), and anything a kernel can do is not a separate operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.products import scaled_product
from cce.backends.gpu.sizes import cdiv, pitch, power_of_two
from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.backends.shared.scaling import norm_of, scaled
from cce.backends.triton.call import Call, multiprocessors
from cce.backends.triton.kernels.forward import target_kernel
from cce.backends.triton.kernels.onepass import (
    join_kernel,
    multiply_kernel,
    scale_kernel,
    store_kernel,
    value_kernel,
)
from cce.backends.triton.operands import matrix, tma_ready
from cce.backends.triton.repeat import Repeated
from cce.spec import Spec

_MOST_STEPS = 64  # number kept; a call needs one


def loss_and_gradients(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, weights: Tensor
) -> tuple[Outputs[Tensor], Gradients[Tensor]]:
    """Compute the outputs, and the gradients of ``sum_ik weights_ik nll_ik``."""
    call = Call.of(inputs, problem, spec)
    steps = _steps(call)
    a = weights.view(-1) if problem.k == 1 else weights.sum(1)
    norm = norm_of(Upstream(a, weights), problem.dtype, problem.logit_scale)
    upstream = scaled(Upstream(a, weights), problem.logit_scale, norm)
    targets = inputs.targets
    target_logits, e = steps.target_logits(call, targets)
    # exp(z - m) lies in [0, 1], where float16 is finer than bfloat16; the gradient replaces it in place.
    dz = call.empty(problem.n, pitch(problem.v), dtype=problem.dtype)
    q = dz if problem.dtype == torch.float32 else dz.view(torch.float16)
    tile_max, outputs = steps.logits(call, q, target_logits, targets)
    steps.scale(
        q=q, dz=dz, tile_max=tile_max, lse=outputs.lse, lse_low=outputs.lse_low, nll=outputs.nll, targets=targets,
        a=upstream.a, g=upstream.g,
    )  # fmt: skip
    return outputs, _products(call, dz[:, : problem.v], e, norm)


class _Steps:
    """The launches of a call: everything that stays the same while sizes, dtypes and strides do."""

    def __init__(self, call: Call) -> None:
        problem, launch, tile = call.problem, call.launch, call.launch.dense
        self._n, self._k, self._tile = problem.n, problem.k, tile
        n, v, k, t = problem.n, problem.v, problem.k, cdiv(problem.v, tile.columns)
        # A row without a target may hold NaN: the product for dC reads zeros there.
        self._copies = problem.grad_c and k == 1
        self._target = Repeated(target_kernel, (n, k), self._of_target(call))
        operands = call.operands(tile, call.e)
        self._e_tma, self._c_tma, self._q_tma = operands["E_TMA"], operands["C_TMA"], launch.tma
        for name in ("e", "c", "bias"):  # passed at each call
            del operands[name]
        blocks = cdiv(n, tile.rows)
        self._store = Repeated(store_kernel, (min(launch.programs, blocks * t),), {
            **operands, "N": n, "V": v, "stride_q": pitch(v), "Q_TMA": launch.tma, "MASK": v % tile.columns != 0,
            "BLOCK_N": tile.rows, "TILE_V": tile.columns, "BLOCK_D": tile.depth, "GROUP_N": launch.group_n,
            "FLATTEN": tile.flatten,
        }, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
        self._tiles = t
        join = {"N": n, "K": k, "T": t, "BLOCK_N": 16, "BLOCK_T": 128}
        self._join = Repeated(join_kernel, (cdiv(n, 16),), join)
        scale = {"N": n, "V": v, "K": k, "stride_q": pitch(v), "TILE_V": tile.columns, "BLOCK_N": 16}
        self.scale = Repeated(scale_kernel, (t, cdiv(n, 16)), scale)

    def _of_target(self, call: Call) -> dict[str, Any]:
        problem = call.problem
        return {
            "D": problem.d, "K": problem.k, "stride_en": call.e.stride(0), "stride_ed": call.e.stride(1),
            "stride_cv": call.c.stride(0), "stride_cd": call.c.stride(1), "scale": problem.logit_scale,
            "softcap": call.softcap, **call.formula(), "COPY": self._copies,
            "BLOCK_D": min(1024, power_of_two(problem.d)),
        }  # fmt: skip

    def target_logits(self, call: Call, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets' logits z[i, targets[i, k]], (N, K), 0 for target -1; and ``e`` with zeros in rows without one."""
        found = call.empty(self._n, self._k)
        used = call.empty(self._n, call.problem.d, dtype=call.e.dtype) if self._copies else None
        self._target(e=call.e, c=call.c, bias=call.bias, targets=targets, target_logits=found, used_e=used)
        if used is None:
            used = call.e
            if call.problem.grad_c:
                used = used.masked_fill(_without_target(targets), 0)
        return found, used

    def logits(self, call: Call, q: Tensor, target_logits: Tensor, targets: Tensor) -> tuple[Tensor, Outputs[Tensor]]:
        """Fill q (N, V); return the maxima (T, N) it is relative to, and the outputs."""
        tile, n = self._tile, self._n
        tile_max, tile_sum = call.empty(self._tiles, n), call.empty(self._tiles, n)
        lse, lse_low, nll = call.empty(n), call.empty(n), call.empty(n, self._k)
        self._store(
            e=matrix(call.e, tile.rows, tile.depth, self._e_tma), bias=call.bias,
            c=matrix(call.c, tile.columns, tile.depth, self._c_tma),
            q=matrix(q, tile.rows, tile.columns, self._q_tma), tile_max=tile_max, tile_sum=tile_sum,
        )  # fmt: skip
        self._join(
            tile_max=tile_max, tile_sum=tile_sum, target_logits=target_logits, targets=targets, lse=lse,
            lse_low=lse_low, nll=nll,
        )  # fmt: skip
        return tile_max, Outputs(lse, nll, lse_low)


_kept: dict[tuple[Any, ...], _Steps] = {}


def _steps(call: Call) -> _Steps:
    """Steps kept from an earlier call like this one, else new ones."""
    e, c = call.e, call.c
    key = (
        call.problem, call.launch, call.precision, e.device, e.stride(), c.stride(), tma_ready(e), tma_ready(c),
    )  # fmt: skip
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= _MOST_STEPS:
            _kept.clear()
        found = _kept[key] = _Steps(call)
    return found


def _products(call: Call, dz: Tensor, e: Tensor, norm: Tensor | None) -> Gradients[Tensor]:
    """dE = dz c, dC = dz^T e and dbias, the column sums of dz, by torch.

    In rows without a target, dE is 0 times an entry that may be NaN; the front end sets it to 0.
    """
    problem = call.problem
    c = call.c.to(problem.dtype)
    de = scaled_product(dz, c, norm).to(problem.e_dtype) if problem.grad_e else None
    dc = scaled_product(dz.T, e, norm).to(problem.c_dtype) if problem.grad_c else None
    dbias = dz.sum(0, dtype=torch.float32) if problem.grad_bias else None
    return Gradients(de, dc, dbias if dbias is None or norm is None else dbias.mul_(norm))


def _without_target(targets: Tensor) -> Tensor:
    """Mask of the rows without a target, (N, 1) bool, from targets (N, K)."""
    none = targets < 0
    return none if targets.shape[1] == 1 else none.all(1, keepdim=True)


_value = Repeated(value_kernel, (1,), {"BLOCK": 1024}, num_warps=8)


def value(outputs: Outputs[Tensor], weights: Tensor) -> Tensor:
    """Return ``sum_ik weights_ik nll_ik``, float32."""
    found = weights.new_empty(())
    _value(weights=weights, nll=outputs.nll, value=found, size=weights.numel())
    return found


_multiply: dict[tuple[Any, ...], Repeated] = {}


def multiply(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each gradient in place by ``factor``; if that is 1, nothing is read or written."""
    found = [x for x in gradients if x.numel()]
    for first, second in zip(found[::2], [*found[1::2], None], strict=False):
        sizes = (first.numel(), 0 if second is None else second.numel())
        key = (*sizes, factor.device)
        launch = _multiply.get(key)
        if launch is None:
            if len(_multiply) >= _MOST_STEPS:
                _multiply.clear()
            launch = _multiply[key] = _multiplication(*sizes, multiprocessors(factor.device))
        launch(x=first, y=second, factor=factor)


def _multiplication(first: int, second: int, programs: int) -> Repeated:
    block = 4096
    grid = (min(8 * programs, cdiv(first + second, block)),)
    return Repeated(multiply_kernel, grid, {"x_size": first, "y_size": second, "SECOND": second > 0, "BLOCK": block})
