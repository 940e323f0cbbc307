"""The `numba` backend's face to the registry; Numba itself is imported when a kernel is first compiled."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.backends.numba.launch import simulated


class NumbaBackend(KernelBackend):
    """Every option in bfloat16, float16 and float32, on CUDA GPUs of compute capability 8.0 and above.

    With NUMBA_ENABLE_CUDASIM=1 in the environment its kernels run in Numba's simulator, on tensors of the CPU.
    """

    name = "numba"

    def unavailable(self, device: str) -> list[str]:
        reasons = [
            f"package {package!r} is not installed: pip install 'cce[numba]'"
            for package, module in (("numba", "numba"), ("numba-cuda", "numba_cuda"))
            if find_spec(module) is None
        ]
        if simulated():
            return [*reasons, *([] if device == "cpu" else ["NUMBA_ENABLE_CUDASIM=1: it runs on the CPU only"])]
        if device != "cuda":
            return [*reasons, f"runs on CUDA devices (or simulated, with NUMBA_ENABLE_CUDASIM=1), not on {device!r}"]
        if torch.version.hip is not None:
            return [*reasons, "ROCm: its kernels are made of PTX"]
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            reasons.append(f"compute capability {major}.{minor}: 8.0 is the least whose matrix units it uses")
        return reasons

    def kernels(self) -> Kernels:
        return _kernels()


@cache
def _kernels() -> Kernels:
    from cce.backends.numba.run import NumbaKernels

    return NumbaKernels()
