"""Preparation of targets for the backends, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.triton.kernels.targets import mean_targets_kernel, targets_kernel
from cce.backends.triton.repeat import Repeated

# Triton leaves assertions out of kernels not compiled for debugging.
_prepare = Repeated(targets_kernel, (64,), {"BLOCK": 1024}, debug=True)
_prepare_mean = Repeated(mean_targets_kernel, (1,), {"BLOCK": 1024}, debug=True)


def prepare_targets(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """Targets as int64, -1 for ``ignore_index``; any other value outside [0, v) is a device-side assertion."""
    targets = targets.contiguous()
    found = torch.empty_like(targets, dtype=torch.int64)
    _prepare(targets=targets, out=found, v=v, ignore_index=ignore_index, size=targets.numel())
    return found


def prepare_mean(targets: Tensor, v: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets, as from :func:`prepare_targets`, and their float32 weights in a mean, (N, 1) each, in one kernel.

    A weight is 1 / (number of targets) for a target, 0 for -1; NaN if there are no targets.
    """
    targets = targets.contiguous()
    count = targets.numel()
    found = targets.new_empty((count, 1), dtype=torch.int64)
    weights = targets.new_empty((count, 1), dtype=torch.float32)
    _prepare_mean(targets=targets, out=found, weights=weights, v=v, ignore_index=ignore_index, size=count)
    return found, weights
