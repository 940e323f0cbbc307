"""Loss and gradients in one pass, by the kernels of targets.cu and of one_pass.cu and its neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.launch import address
from cce.backends.cupy.module import Variant
from cce.backends.cupy.repeat import Repeated
from cce.backends.cupy.variants import (
    TARGET_THREADS,
    THREADS,
    TILE_N,
    TILE_V,
    multiply_variant,
    one_pass_variant,
    scale_variant,
    store_variant,
    targets_variant,
)
from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.one_pass_kernels import OnePassKernels
from cce.backends.gpu.sizes import cdiv

_WIDE = 1024  # threads of the kernels of one_pass.cu
_ROWS_JOINED, _ROWS_SCALED = 32, 8  # per thread block
#: Layouts of the kernels' arguments: q an address or a count, i an int, f a float; the formula is two floats.
LAYOUTS = {
    "prepare": "6q", "join": "10q", "value": "4q", "scale": "14qf4x", "multiply": "9q", "targets": "9q2f2iq",
    "store": "2qi4x2qi4xqqqqq2f2i",
}  # fmt: skip


class PortableOnePass(OnePassKernels):
    """Kernels of one pass for every GPU."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Repeated] = {}

    def columns(self, dtype: torch.dtype) -> int:
        return TILE_V

    def _launch(self, key: tuple[Any, ...], name: str, variant: Variant, threads: int) -> Repeated:
        """Prepare a kernel that was not launched before; later calls find it under ``key``."""
        found = self._kernels[key] = Repeated(variant, threads, LAYOUTS[name])
        return found

    def prepare(self, targets: Tensor, v: int, ignore_index: int, out: Tensor, weights: Tensor | None) -> None:
        dtype = targets.dtype
        key = ("prepare", dtype, targets.get_device())
        launch = self._kernels.get(key) or self._launch(
            key, "prepare", one_pass_variant(Gpu.current(), "prepare", dtype), _WIDE
        )
        count = targets.numel()
        blocks = 1 if weights is not None else max(1, min(64, cdiv(count, _WIDE)))
        to = address(weights) or 0
        launch(blocks, 1, address(targets), out.data_ptr(), to, count, v, ignore_index)

    def target_logits(
        self, e: Tensor, c: Tensor, targets: Tensor, formula: Formula, out: Tensor, used_e: Tensor | None
    ) -> None:
        n, k = targets.shape
        bias, scale = formula.bias, formula.scale
        kind = (bias is None, scale == 1.0, formula.softcap is None)
        key = ("targets", e.dtype, c.dtype, *kind, used_e is None, e.get_device())
        launch = self._kernels.get(key)
        if launch is None:
            variant = targets_variant(Gpu.current(), e.dtype, c.dtype, formula, used_e is not None)
            launch = self._launch(key, "targets", variant, TARGET_THREADS)
        launch(
            n * k, 1, e.data_ptr(), c.data_ptr(), *e.stride(), *c.stride(), address(bias) or 0,
            address(targets), out.data_ptr(), scale, formula.softcap or 0.0, e.shape[1], k, address(used_e) or 0,
        )  # fmt: skip

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        (n, d), v, bias, size = e.shape, len(c), formula.bias, e.element_size()
        kind = (bias is None, formula.scale == 1.0, formula.softcap is None)
        key = ("store", e.dtype, *kind, formula.ieee, e.get_device())
        launch = self._kernels.get(key) or self._launch(
            key, "store", store_variant(Gpu.current(), e.dtype, formula), THREADS
        )
        launch(
            cdiv(n, TILE_N) * cdiv(v, TILE_V), 1, e.data_ptr(), e.stride(0) * size, d * size, c.data_ptr(),
            c.stride(0) * size, d * size, address(bias) or 0, q.data_ptr(), q.stride(0),
            tile_max.data_ptr(), tile_sum.data_ptr(), formula.scale, formula.softcap or 0.0, n, v,
        )  # fmt: skip

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
        n, k = targets.shape
        key = ("join", targets.get_device())
        launch = self._kernels.get(key) or self._launch(key, "join", one_pass_variant(Gpu.current(), "join"), _WIDE)
        launch(
            cdiv(n, _ROWS_JOINED), 1, tile_max.data_ptr(), tile_sum.data_ptr(), target_logits.data_ptr(),
            address(targets), lse.data_ptr(), lse_low.data_ptr(), nll.data_ptr(), n, k, len(tile_max),
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
        (n, v), dtype, size, capped = q.shape, q.dtype, q.element_size(), softcap is not None
        key = ("scale", dtype, capped, q.get_device())
        launch = self._kernels.get(key) or self._launch(
            key, "scale", scale_variant(Gpu.current(), dtype, capped), THREADS
        )
        launch(
            cdiv(v, THREADS * (16 // size)), cdiv(n, _ROWS_SCALED), q.data_ptr(), tile_max.data_ptr(), lse.data_ptr(),
            lse_low.data_ptr(), nll.data_ptr(), address(targets), a.data_ptr(), address(g), n, v, g.shape[1],
            q.stride(0), self.columns(dtype), a.stride(0), softcap or 0.0,
        )  # fmt: skip

    def value(self, weights: Tensor, nll: Tensor, out: Tensor) -> None:
        key = ("value", weights.get_device())
        launch = self._kernels.get(key) or self._launch(key, "value", one_pass_variant(Gpu.current(), "value"), _WIDE)
        launch(1, 1, address(weights), address(nll), out.data_ptr(), weights.numel())

    def multiply(self, x: Tensor, y: Tensor | None, factor: Tensor, targets: Tensor, is_de: bool) -> None:
        other = x.dtype if y is None else y.dtype
        key = ("multiply", x.dtype, other, x.get_device())
        launch = self._kernels.get(key) or self._launch(
            key, "multiply", multiply_variant(Gpu.current(), x.dtype, other), THREADS
        )
        (n, k), first, (to, second) = targets.shape, x.numel(), (0, 0) if y is None else (address(y), y.numel())
        blocks = max(1, min(1024, cdiv(max(first, second), 8 * THREADS)))
        d = first // n if is_de else 0
        launch(blocks, 1, address(x), to, factor.data_ptr(), address(targets), first, second, n, k, d)
