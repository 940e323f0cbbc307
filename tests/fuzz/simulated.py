"""Kernels interpreted or simulated without what that repeats (``tests/triton``, ``tests/numba_backend``).

By the environment, as the frameworks themselves have it: ``TRITON_INTERPRET=1``, ``NUMBA_ENABLE_CUDASIM=1``.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

FASTER = {
    "TRITON_INTERPRET": ("triton", "fast_interpreter", "hasten"),
    "NUMBA_ENABLE_CUDASIM": ("numba_backend", "fast_simulator", "hasten"),
}

for variable, (folder, module, function) in FASTER.items():
    if os.environ.get(variable) == "1":
        sys.path.append(str(Path(__file__).parents[1] / folder))
        getattr(import_module(module), function)()
