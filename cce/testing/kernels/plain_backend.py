"""The host code of the GPU backends around the plain kernels."""

from __future__ import annotations

from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.testing.kernels.plain import PlainKernels


class PlainBackend(KernelBackend):
    """Every option, slowly, on any device."""

    name = "plain"
    device = "cpu"

    def kernels(self) -> Kernels:
        return PlainKernels()
