"""Tiles of the kernels for sm_90, their variants, and how many blocks of threads a launch has."""

from __future__ import annotations

import torch

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant
from cce.backends.cupy.variants import dtype_macros, formula_macros
from cce.backends.gpu.arrays import Formula

THREADS = 384
TILE_N, TILE_V = 128, 256
STAGES = 4
_STAGE = 48 * 1024
_COLUMNS = 8 * TILE_V * 4  # an array of a tile's columns, one copy for each multiplying warp
_SMALL = 128 + 1024  # barriers, and what aligns the stages
GROUP = 16  # row blocks at work side by side, which share what they read of c


def is_served(dtype: torch.dtype) -> bool:
    """Factors of 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def cluster_of(rows: int) -> int:
    """Blocks of threads that share what they load of ``c``: as many as have rows."""
    return 2 if rows > TILE_N else 1


def variant_of(
    name: str, cluster: int, dtype: torch.dtype, formula: Formula, macros: dict[str, int], columns: int
) -> Variant:
    """``columns``: arrays of a tile's columns in shared memory beside the bias."""
    macros = macros | formula_macros(formula) | dtype_macros(dtype, formula)
    given = tuple(sorted((key, int(value)) for key, value in macros.items() if value))
    sizes = (("STAGES", STAGES), ("CLUSTER", cluster), ("GROUP", GROUP // cluster))
    shared = STAGES * _STAGE + _SMALL + (columns + (formula.bias is not None)) * _COLUMNS
    return Variant(f"sm90/{name}.cu", f"{name}_sm90", given + sizes, "sm_90a", shared)


def grid_of(units: int, cluster: int) -> int:
    """Blocks of threads of a launch whose clusters take units in turn."""
    return min(Gpu.current().processors // cluster, units) * cluster
