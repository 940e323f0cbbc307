"""The `triton` backend as the registry sees it; Triton itself is imported when a kernel is first needed."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from cce.backends.base import OnePass
from cce.backends.gpu import one_pass
from cce.backends.gpu.backend import KernelBackend
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.refusals import common_refusals, missing_gpu
from cce.backends.problem import Problem
from cce.spec import Spec


class TritonBackend(KernelBackend):
    """Backend for every option in bfloat16, float16 and float32, on CUDA GPUs of compute capability 8.0 and above."""

    name = "triton"

    def unavailable(self, device: str) -> list[str]:
        reasons = []
        if find_spec("triton") is None:
            reasons.append("package 'triton' is not installed: pip install 'cce-kernels[triton]'")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return reasons
        return reasons + missing_gpu(device, "not tried yet", " (or interpreted, with TRITON_INTERPRET=1)")

    def unsupported(self, problem: Problem, spec: Spec) -> list[str]:
        return common_refusals(problem, spec)  # its kernels serve all others: Triton need not be imported to say so

    def one_pass(self, problem: Problem, spec: Spec) -> OnePass | None:
        return self if one_pass.serves(problem, spec) else None

    def note(self, problem: Problem, spec: Spec) -> str:
        from cce.backends.triton.choice import launch_of

        launch = launch_of(problem, spec)
        measured = f"shipped, {'' if launch.measured else 'not '}measured on this architecture"
        tiles = f"launch configuration: {'tuned for this problem on this GPU' if launch.tuned else measured}"
        return "\n".join(filter(None, [super().note(problem, spec), tiles]))

    def kernels(self) -> Kernels:
        return _kernels()


@cache
def _kernels() -> Kernels:
    from cce.backends.triton.launches import TritonKernels

    return TritonKernels()
