"""One kernel object for each set of options."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cce.backends.numba.launch import Kernel


@lru_cache(maxsize=256)
def statistics_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.forward import make_statistics

    tile = options.tile
    return Kernel(make_statistics, options, tile.threads, tile.stages * tile.stage_bytes, tile.resident)


@lru_cache(maxsize=256)
def gradient_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.gradient import make_gradient

    return Kernel(make_gradient, options, options.tile.threads, options.shared, options.tile.resident)


@lru_cache(maxsize=256)
def live_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.gradient import make_live

    return Kernel(make_live, options, options.tile.threads, options.shared, options.tile.resident)
