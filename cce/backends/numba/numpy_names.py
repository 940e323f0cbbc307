"""Lets numba-cuda 0.30 be imported beside NumPy 2.5, which no longer has a name that it mentions."""

from __future__ import annotations

import numpy as np


def _import_arrays() -> None:
    """Imports the one module that says ``np.row_stack``, with that name there while it runs."""
    missing = not hasattr(np, "row_stack")
    if missing:
        np.vstack = np.vstack  # type: ignore[attr-defined]
    try:
        import numba.cuda.np.arrayobj  # noqa: F401
    finally:
        if missing:
            del np.vstack  # type: ignore[attr-defined]


_import_arrays()
