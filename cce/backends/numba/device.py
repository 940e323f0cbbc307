"""Functions kernels are written with: Numba's and those of ``intrinsics.py``, or their twins in the simulator.

NUMBA_ENABLE_CUDASIM=1 in the environment decides between the two when Numba is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import config, cuda

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from cce.backends.numba.twins import *  # noqa: F403 (every word of either module)

    def function(f: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a function for kernels to call; it does not use ``cuda`` itself."""
        return f
else:
    from cce.backends.numba.intrinsics import *  # noqa: F403 (likewise)

    barrier = cuda.syncthreads

    def function(f: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a function for kernels to call, which is inlined."""
        return cuda.jit(device=True, forceinline=True)(f)


pointer = numba.int64  # to global memory; the type of kernel parameters

# All are float32: a Python number would turn the other operand into a double.
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
LOG2E, LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
NEG_INF = np.float32(-np.inf)
#: Bound of a log-probability that is multiplied: its softmax value is 0 long before, and no product must be 0 * inf.
LEAST_LOG = np.float32(-1e4)
