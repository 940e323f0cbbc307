"""Reasons for which every GPU backend refuses a problem, whatever its kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from cce.backends.gpu.sizes import BLOCKS_N, BLOCKS_V, least_scratch
from cce.backends.problem import Problem
from cce.spec import Spec


def missing_gpu(device: str, rocm: str, otherwise: str = "") -> list[str]:
    """Reasons why no kernel can run on this device type here.

    Args:
        rocm: reason for refusing ROCm. otherwise: how to run on other device types, in brackets.
    """
    if device != "cuda":
        return [f"runs on CUDA devices{otherwise}, not on {device!r}"]
    if torch.version.hip is not None:
        return [f"ROCm: {rocm}"]
    # The first question costs nothing in a process that uses the GPU; the second asks the driver.
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return ["no CUDA GPU is available to torch"]
    major, minor = capability_of(torch.cuda.current_device())
    if major < 8:
        return [f"compute capability {major}.{minor}: 8.0 is the least whose matrix units it uses"]
    return []


@lru_cache
def capability_of(index: int) -> tuple[int, int]:
    """Compute capability of a GPU, cached: torch's own function takes ten times as long."""
    return torch.cuda.get_device_capability(index)


def common_refusals(problem: Problem, spec: Spec) -> list[str]:
    """Reasons that hold for every kernel with float32 sums and matrix tiles."""
    reasons = []
    if problem.dtype == torch.float64:
        reasons.append("float64 inputs: its sums are float32; backend 'torch' has float64")
    elif spec.accumulate == "float64":
        reasons.append("accumulate='float64': its sums are float32; backend 'torch' has float64")
    if spec.filter != "none":
        for field, block, known in (("block_n", spec.block_n, BLOCKS_N), ("block_v", spec.block_v, BLOCKS_V)):
            if block not in known:
                reasons.append(f"{field}={block} with a filter: its matrix tiles need one of {known}")
    needed = least_scratch(problem, spec) if problem.needs_grad and not reasons else 0
    if spec.scratch_bytes < needed:
        reasons.append(f"scratch_bytes={spec.scratch_bytes} is less than the {needed} bytes of its least chunk")
    return reasons
