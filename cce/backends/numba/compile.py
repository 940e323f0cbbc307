"""One kernel object for each set of options."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cce.backends.numba.launch import Kernel, simulated


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


@lru_cache(maxsize=256)
def de_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.sums import make_de

    tile = options.tile
    return Kernel(make_de, options, tile.threads, tile.stages * options.stage, tile.resident)


@lru_cache(maxsize=256)
def dc_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.sums import make_dc

    tile = options.tile
    return Kernel(make_dc, options, tile.threads, tile.stages * options.stage_transposed, tile.resident)


@lru_cache(maxsize=256)
def dbias_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.sums import make_dbias

    return Kernel(make_dbias, options, 32 if simulated() else 128, 0)


@lru_cache(maxsize=256)
def targets_kernel(options: Any) -> Kernel:
    from cce.backends.numba.kernels.targets import make_targets

    return Kernel(make_targets, options, 32 * options.warps, 0)
