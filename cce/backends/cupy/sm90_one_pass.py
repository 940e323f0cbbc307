"""Loss and gradients in one pass on sm_90: logits of 16-bit factors by a kernel of its own, the rest as elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.cupy.launch import address
from cce.backends.cupy.one_pass import PortableOnePass
from cce.backends.cupy.repeat import Repeated
from cce.backends.cupy.sm90_tiles import THREADS, TILE_N, TILE_V, cluster_of, grid_of, is_served, variant_of
from cce.backends.cupy.tensor_maps import box_bytes
from cce.backends.gpu.arrays import Formula
from cce.backends.gpu.sizes import cdiv

#: Layout of the arguments of sm90/one_pass_store.cu: two tensor maps, addresses and a pitch, the formula, sizes.
STORE_LAYOUT = "128s128s5q2f3i"


class Sm90OnePass(PortableOnePass):
    """Kernels of one pass with tiles of 128 x 256, whose thread blocks work in pairs that share loads of ``c``."""

    def columns(self, dtype: torch.dtype) -> int:
        return TILE_V if is_served(dtype) else super().columns(dtype)

    def store(self, e: Tensor, c: Tensor, formula: Formula, q: Tensor, tile_max: Tensor, tile_sum: Tensor) -> None:
        if not is_served(e.dtype):
            super().store(e, c, formula, q, tile_max, tile_sum)
            return
        (n, d), v, bias = e.shape, len(c), formula.bias
        cluster = cluster_of(n)
        key = ("store", e.dtype, cluster, bias is None, formula.scale == 1.0, formula.softcap is None, e.get_device())
        launch = self._kernels.get(key)
        if launch is None:
            variant = variant_of("one_pass_store", cluster, e.dtype, formula, {}, 0)
            launch = self._kernels[key] = Repeated(variant, THREADS, STORE_LAYOUT)
        launch(
            grid_of(cdiv(n, cluster * TILE_N) * cdiv(v, TILE_V), cluster), 1, box_bytes(e, TILE_N),
            box_bytes(c, TILE_V // cluster), address(bias) or 0, q.data_ptr(), q.stride(0),
            tile_max.data_ptr(), tile_sum.data_ptr(), formula.scale, formula.softcap or 0.0, n, v, d,
        )  # fmt: skip
