"""Targets as the backends take them, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.triton.kernels.targets import targets_kernel, weights_kernel
from cce.backends.triton.repeat import Repeated

# Triton leaves assertions out of what is not compiled for debugging.
_prepare = Repeated(targets_kernel, (64,), {"BLOCK": 1024}, debug=True)
_weigh = Repeated(weights_kernel, (1,), {"BLOCK": 1024})


def prepare(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """int64, -1 for ``ignore_index``; another outside [0, v) is a device-side assertion."""
    targets = targets.contiguous()
    found = torch.empty_like(targets, dtype=torch.int64)
    _prepare(targets=targets, out=found, v=v, ignore_index=ignore_index, size=targets.numel())
    return found


def weigh(targets: Tensor) -> Tensor:
    """Float32 weights of a mean: 1 / their number for each that is not -1, else 0; NaN where there are none."""
    targets = targets.contiguous()
    found = torch.empty_like(targets, dtype=torch.float32)
    _weigh(targets=targets, out=found, size=targets.numel())
    return found
