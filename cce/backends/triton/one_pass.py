"""Launches of a pass that computes gradients along with the loss, as ``gpu/one_pass_kernels.py`` requires them.

Its problems are small and its kernels short, so host time counts: anything common to all calls with such arguments is
made once and kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.sizes import cdiv
from cce.backends.problem import Problem
from cce.backends.triton.choice import launch_of, multiprocessors
from cce.backends.triton.kernels.one_pass import (
    join_kernel,
    multiply_kernel,
    prepare_kernel,
    prepare_mean_kernel,
    scale_kernel,
    store_kernel,
    value_kernel,
)
from cce.backends.triton.kernels.targets import target_logits_kernel
from cce.backends.triton.launch import Launch, Tile
from cce.backends.triton.operands import Operands, matrix, targets_arguments, tma_ready
from cce.backends.triton.repeat import Repeated
from cce.spec import Spec

_MOST_STEPS = 256  # number kept of each configuration; a call needs five
_MOST_CONFIGURED = 64
_configured: dict[int, TritonOnePass] = {}

# Triton leaves assertions out of kernels not compiled for debugging.
_prepare = Repeated(prepare_kernel, (64,), {"BLOCK": 1024}, debug=True)
_prepare_mean = Repeated(prepare_mean_kernel, (1,), {"BLOCK": 1024}, debug=True)
_value = Repeated(value_kernel, (1,), {"BLOCK": 1024}, num_warps=8)


class TritonOnePass(OnePassKernels):
    """Kernels of one pass under a launch configuration.

    Args:
        launch: configuration of the problem; without it, only the methods without tiles may be called.
    """

    any_layout = True

    def __init__(self, launch: Launch | None = None) -> None:
        self._launch = launch
        self._kept: dict[tuple[Any, ...], Any] = {}

    def of_problem(self, problem: Problem, spec: Spec) -> OnePassKernels:
        launch = launch_of(problem, spec)
        found = _configured.get(id(launch))  # equal ones are one object most often, and hashing them takes longer
        if found is None:
            if len(_configured) >= _MOST_CONFIGURED:
                _configured.clear()
            found = _configured[id(launch)] = TritonOnePass(launch)  # which keeps the id its own
        return found

    def _keep(self, key: tuple[Any, ...], step: Any) -> Any:
        """Keep a step, which holds no tensors, for later calls."""
        if len(self._kept) >= _MOST_STEPS:
            self._kept.clear()
        self._kept[key] = step
        return step

    @property
    def _tile(self) -> Tile:
        assert self._launch is not None
        return self._launch.dense

    def columns(self, dtype: torch.dtype) -> int:
        return self._tile.columns

    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        given = {"targets": targets, "out": out}
        if weights is None:
            _prepare(**given, v=v, ignore_index=ignore_index, size=targets.numel())
        else:
            _prepare_mean(**given, weights=weights, v=v, ignore_index=ignore_index, size=targets.numel())

    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        copies = used_e is not None and targets.shape[1] == 1
        if used_e is not None and not copies:
            used_e.copy_(e).masked_fill_((targets < 0).all(1, keepdim=True), 0)
        sizes = (targets.shape, e.shape, e.stride(), c.stride())
        key = (target_logits_kernel, *sizes, copies, formula.scale, formula.softcap, formula.bias is None)
        step: Repeated | None = self._kept.get(key)
        if step is None:
            arguments = targets_arguments(e, c, targets.shape[1], formula, copies)
            step = self._keep(key, Repeated(target_logits_kernel, tuple(targets.shape), arguments))
        step(e=e, c=c, bias=formula.bias, targets=targets, target_logits=out, used_e=used_e if copies else None)

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        launch, tile = self._launch, self._tile
        assert launch is not None
        key = (
            store_kernel, e.shape, c.shape, e.stride(), c.stride(), q.stride(0), e.dtype, c.dtype,
            tma_ready(e), tma_ready(c), formula.scale, formula.softcap, formula.bias is None, formula.ieee,
        )  # fmt: skip
        step: _Store | None = self._kept.get(key)
        if step is None:
            step = self._keep(key, _Store(launch, e, c, formula, q.stride(0)))
        q = q if q.dtype == torch.float32 else q.view(torch.float16)
        step(e, c, formula.bias, matrix(q, tile.rows, tile.columns, launch.tma), tile_max, tile_sum)

    def join(
        self,
        tile_max: Tensor,
        tile_sum: Tensor,
        target_logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
    ) -> None:
        key = (join_kernel, tile_max.shape, targets.shape)
        step: Repeated | None = self._kept.get(key)
        if step is None:
            (t, n), k = tile_max.shape, targets.shape[1]
            arguments = {"N": n, "K": k, "T": t, "BLOCK_N": 16, "BLOCK_T": 128}
            step = self._keep(key, Repeated(join_kernel, (cdiv(n, 16),), arguments))
        step(
            tile_max=tile_max, tile_sum=tile_sum, target_logits=target_logits, targets=targets, lse=lse,
            lse_low=lse_low, nll=nll,
        )  # fmt: skip

    def scale(
        self,
        q: Tensor,
        tile_max: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        nll: Tensor,
        targets: Tensor,
        a: Tensor,
        g: Tensor,
        softcap: float | None,
    ) -> None:
        key = (scale_kernel, q.shape, q.stride(0), targets.shape[1], self._tile.columns, a.stride(0), softcap)
        step: Repeated | None = self._kept.get(key)
        if step is None:
            (n, v), k, columns = q.shape, targets.shape[1], self._tile.columns
            arguments = {
                "N": n, "V": v, "K": k, "stride_q": q.stride(0), "stride_a": a.stride(0), "TILE_V": columns,
                "softcap": softcap or 1.0, "SOFTCAP": softcap is not None, "BLOCK_N": 16,
            }  # fmt: skip
            step = self._keep(key, Repeated(scale_kernel, (cdiv(v, columns), cdiv(n, 16)), arguments))
        bits = q if q.dtype == torch.float32 else q.view(torch.float16)
        step(q=bits, dz=q, tile_max=tile_max, lse=lse, lse_low=lse_low, nll=nll, targets=targets, a=a, g=g)

    def value(self, weights: Tensor, nll: Tensor, out: Tensor) -> None:
        _value(weights=weights, nll=nll, value=out, size=weights.numel())

    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor, targets: Tensor, is_de: bool) -> None:
        sizes = (x.numel(), 0 if y is None else y.numel(), targets.shape)
        key = (multiply_kernel, *sizes, is_de, factor.device)
        step: Repeated | None = self._kept.get(key)
        if step is None:
            step = self._keep(key, _multiplication(*sizes, is_de, multiprocessors(factor.device)))
        step(x=x, y=y, factor=factor, targets=targets)


class _Store:
    """Launch of ``store_kernel``, with all that stays the same while sizes, dtypes and strides do."""

    def __init__(self, launch: Launch, e: Tensor, c: Tensor, formula: Formula, stride_q: int) -> None:
        tile, n, v = launch.dense, len(e), len(c)
        factors = Operands.of(launch, tile, e, c)
        self._tile, self._e_tma, self._c_tma = tile, factors.e_tma, factors.c_tma
        programs = min(launch.programs, cdiv(n, tile.rows) * cdiv(v, tile.columns))
        self._step = Repeated(store_kernel, (programs,), {
            **factors.arguments(formula), "N": n, "V": v, "stride_q": stride_q, "Q_TMA": launch.tma,
            "MASK": v % tile.columns != 0, "BLOCK_N": tile.rows, "TILE_V": tile.columns, "BLOCK_D": tile.depth,
            "GROUP_N": launch.group_n, "FLATTEN": tile.flatten,
        }, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip

    def __call__(self, e: Tensor, c: Tensor, bias: Tensor | None, q: Any, tile_max: Tensor, tile_sum: Tensor) -> None:
        tile = self._tile
        self._step(
            e=matrix(e, tile.rows, tile.depth, self._e_tma), c=matrix(c, tile.columns, tile.depth, self._c_tma),
            bias=bias, q=q, tile_max=tile_max, tile_sum=tile_sum,
        )  # fmt: skip


def _multiplication(first: int, second: int, targets: torch.Size, is_de: bool, programs: int) -> Repeated:
    block, (n, k) = 4096, targets
    grid = (min(8 * programs, cdiv(first + second, block)),)
    return Repeated(multiply_kernel, grid, {
        "x_size": first, "y_size": second, "N": n, "K": k, "D": first // n if is_de else 0,
        "SECOND": second > 0, "ROWS": is_de, "BLOCK": block,
    })  # fmt: skip
