"""What the GPU backends refuse, for whatever kernels."""

from __future__ import annotations

import torch

from cce.backends.gpu.sizes import BLOCKS_N, BLOCKS_V, least_scratch
from cce.problem import Problem
from cce.spec import Spec


def common_refusals(problem: Problem, spec: Spec) -> list[str]:
    """What no kernel with float32 sums and matrix tiles can do."""
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
