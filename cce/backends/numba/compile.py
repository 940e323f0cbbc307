"""Kernel objects, one for each set of options."""

from __future__ import annotations

from functools import lru_cache

from cce.backends.numba.launch import Kernel, simulated
from cce.backends.numba.options import Gradient, Mass, Means, Product, Statistics, Sums, Targets


@lru_cache(maxsize=256)
def statistics_kernel(options: Statistics) -> Kernel:
    """Kernel for statistics of the logits."""
    tile = options.tile
    return Kernel("statistics.make_statistics", options, tile.threads, tile.stages * tile.stage_bytes, tile.resident)


@lru_cache(maxsize=256)
def gradient_kernel(options: Gradient) -> Kernel:
    """Kernel for dx of a window."""
    return Kernel("gradient.make_gradient", options, options.tile.threads, options.shared, options.tile.resident)


@lru_cache(maxsize=256)
def live_kernel(options: Gradient) -> Kernel:
    """Kernel for dx of live tiles."""
    return Kernel("live.make_live", options, options.tile.threads, options.shared, options.tile.resident)


@lru_cache(maxsize=256)
def products_kernel(options: Sums) -> Kernel:
    """Kernel for dE and dC of live tiles."""
    return Kernel("products.make_products", options, options.tile.threads, options.shared, options.resident)


@lru_cache(maxsize=256)
def dbias_kernel(options: Product) -> Kernel:
    """Kernel for dbias from live tiles' column sums."""
    return Kernel("products.make_dbias", options, 32 if simulated() else 128, 0)


@lru_cache(maxsize=256)
def target_logits_kernel(options: Targets) -> Kernel:
    """Kernel for the targets' logits."""
    return Kernel("targets.make_target_logits", options, 32 * options.warps, 0)


@lru_cache(maxsize=256)
def mean_rows_kernel(options: Means) -> Kernel:
    """Kernel for the mean rows of ``c``."""
    return Kernel("compensation.make_mean_rows", options, 32 if simulated() else 128, 0)


@lru_cache(maxsize=256)
def dead_mass_kernel(options: Mass) -> Kernel:
    """Kernel for the mass of dead tiles."""
    return Kernel("compensation.make_dead_mass", options, 32 if simulated() else 256, 0)
