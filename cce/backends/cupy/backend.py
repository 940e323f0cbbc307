"""The `cupy` backend as the registry sees it; CuPy itself is imported when a kernel is first launched."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.refusals import capability_of, missing_gpu


class CupyBackend(KernelBackend):
    """Backend for every option in bfloat16, float16 and float32, on CUDA GPUs of compute capability 8.0 and above.

    Args:
        portable: run the kernels for any GPU, even where the current one has faster kernels.
    """

    name = "cupy"

    def __init__(self, portable: bool = False) -> None:
        self._portable = portable

    def unavailable(self, device: str) -> list[str]:
        reasons = []
        if find_spec("cupy") is None:
            reasons.append("package 'cupy' is not installed: pip install 'cce-kernels[cupy]'")
        return reasons + missing_gpu(device, "its kernels are made of NVIDIA's instructions")

    def kernels(self) -> Kernels:
        """Kernels for the current device."""
        # A process that already uses the GPU need not ask whether there is one.
        there = torch.cuda.is_initialized() or torch.cuda.is_available()
        fast = not self._portable and there and capability_of(torch.cuda.current_device()) == (9, 0)
        return _kernels(fast)


@cache
def _kernels(sm90: bool) -> Kernels:
    from cce.backends.cupy.portable import PortableKernels
    from cce.backends.cupy.sm90 import Sm90Kernels

    return Sm90Kernels() if sm90 else PortableKernels()
