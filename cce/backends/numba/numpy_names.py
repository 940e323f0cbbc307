"""What needs numba-cuda 0.30's array module, which mentions a name that NumPy 2.5 no longer has."""

from __future__ import annotations

from types import ModuleType

import numpy as np


def _arrays() -> ModuleType:
    """The module, imported with ``np.row_stack`` there; Numba itself imports it with the first kernel."""
    missing = not hasattr(np, "row_stack")
    if missing:
        np.row_stack = np.vstack  # noqa: NPY201
    try:
        from numba.cuda.np import arrayobj
    finally:
        if missing:
            del np.row_stack  # noqa: NPY201
    return arrayobj


populate_array = _arrays().populate_array
