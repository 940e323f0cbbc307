"""The ``numba`` backend: the kernels in Python, tensor cores and all; see docs/numba-kernel.md."""

from cce.backends.numba.backend import NumbaBackend

__all__ = ["NumbaBackend"]
