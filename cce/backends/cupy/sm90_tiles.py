"""Tiles of the kernels for sm_90, their variants, and the number of thread blocks of a launch."""

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
_COLUMNS = 8 * TILE_V * 4  # bytes of an array of a tile's columns, one copy for each multiplying warp
_SMALL = 128 + 1024  # barriers, and padding that aligns the stages
GROUP = 16  # row blocks at work side by side, which share reads of c


def is_served(dtype: torch.dtype) -> bool:
    """Whether the kernels serve factors of this dtype: those of 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def cluster_of(rows: int) -> int:
    """Number of thread blocks that share loads of ``c``: no more than have rows."""
    return 2 if rows > TILE_N else 1


def variant_of(
    name: str, cluster: int, dtype: torch.dtype, formula: Formula, macros: dict[str, int], columns: int
) -> Variant:
    """Variant of a kernel; ``columns``: number of arrays of a tile's columns in shared memory besides the bias."""
    macros = macros | formula_macros(formula) | dtype_macros(dtype, formula)
    given = tuple(sorted((key, int(value)) for key, value in macros.items() if value))
    sizes = (("STAGES", STAGES), ("CLUSTER", cluster), ("GROUP", GROUP // cluster))
    shared = STAGES * _STAGE + _SMALL + (columns + (formula.bias is not None)) * _COLUMNS
    return Variant(f"sm90/{name}.cu", f"{name.removeprefix('one_pass_')}_kernel", given + sizes, "sm_90a", shared)


def grid_of(units: int, cluster: int) -> int:
    """Number of thread blocks of a launch whose clusters take units in turn."""
    return min(Gpu.current().processors // cluster, units) * cluster
