"""Kernels interpreted or simulated without what that repeats (``tests/triton``, ``tests/numba_backend``).

By the environment, as the frameworks themselves have it: ``TRITON_INTERPRET=1``, ``NUMBA_ENABLE_CUDASIM=1``.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

FASTER = {"TRITON_INTERPRET": "triton/fast_interpreter", "NUMBA_ENABLE_CUDASIM": "numba_backend/fast_simulator"}

for variable, module in FASTER.items():
    if os.environ.get(variable) == "1":
        folder, name = module.split("/")
        sys.path.append(str(Path(__file__).parents[1] / folder))
        import_module(name).hasten()
