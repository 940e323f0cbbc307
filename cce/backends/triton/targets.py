"""Targets as the backends take them, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.triton.kernels.targets import mean_targets_kernel, targets_kernel, weights_kernel
from cce.backends.triton.repeat import Repeated

# Triton leaves assertions out of what is not compiled for debugging.
_prepare = Repeated(targets_kernel, (64,), {"BLOCK": 1024}, debug=True)
_prepare_mean = Repeated(mean_targets_kernel, (1,), {"BLOCK": 1024}, debug=True)
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


def prepare_mean(targets: Tensor, v: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N, 1) each: what :func:`prepare` and :func:`weigh` give, in one kernel."""
    targets = targets.contiguous()
    count = targets.numel()
    found = targets.new_empty((count, 1), dtype=torch.int64)
    weights = targets.new_empty((count, 1), dtype=torch.float32)
    _prepare_mean(targets=targets, out=found, weights=weights, v=v, ignore_index=ignore_index, size=count)
    return found, weights
