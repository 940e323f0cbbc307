"""The ``numba`` backend: kernels in Python that use the tensor cores (docs/numba-kernel.md)."""

from cce.backends.numba.backend import NumbaBackend

__all__ = ["NumbaBackend"]
