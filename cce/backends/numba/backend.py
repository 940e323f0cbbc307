"""The `numba` backend as the registry sees it; Numba itself is imported when a kernel is first compiled."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.refusals import missing_gpu
from cce.backends.numba.launch import simulated


class NumbaBackend(KernelBackend):
    """Backend for every option in bfloat16, float16 and float32, on CUDA GPUs of compute capability 8.0 and above.

    With NUMBA_ENABLE_CUDASIM=1 in the environment, its kernels run in Numba's simulator, on CPU tensors.
    """

    name = "numba"

    def unavailable(self, device: str) -> list[str]:
        reasons = [
            f"package {package!r} is not installed: pip install 'cce-kernels[numba]'"
            for package, module in (("numba", "numba"), ("numba-cuda", "numba_cuda"))
            if find_spec(module) is None
        ]
        if simulated():
            return [*reasons, *([] if device == "cpu" else ["NUMBA_ENABLE_CUDASIM=1: it runs on the CPU only"])]
        return reasons + missing_gpu(
            device, "its kernels are made of PTX", " (or simulated, with NUMBA_ENABLE_CUDASIM=1)"
        )

    def kernels(self) -> Kernels:
        return _kernels()


@cache
def _kernels() -> Kernels:
    from cce.backends.numba.launches import NumbaKernels

    return NumbaKernels()
