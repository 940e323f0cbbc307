"""Access to numba-cuda 0.30's array module, which uses a name that NumPy 2.5 no longer has."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from unittest.mock import patch

import numpy as np


def _arrays() -> ModuleType:
    """The module, imported while ``np.row_stack`` exists; Numba itself imports it with the first kernel."""
    there = hasattr(np, "row_stack")
    with nullcontext() if there else patch.object(np, "row_stack", np.vstack, create=True):
        from numba.cuda.np import arrayobj
    return arrayobj


populate_array = _arrays().populate_array
