"""Targets as the backends take them, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.triton.kernels.targets import targets_kernel
from cce.backends.triton.repeat import Repeated

# Triton leaves assertions out of what is not compiled for debugging.
_launch = Repeated(targets_kernel, (64,), {"BLOCK": 1024}, debug=True)


def prepare(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """int64, -1 for ``ignore_index``; another outside [0, v) is a device-side assertion."""
    targets = targets.contiguous()
    found = torch.empty_like(targets, dtype=torch.int64)
    _launch(targets=targets, out=found, v=v, ignore_index=ignore_index, size=targets.numel())
    return found
