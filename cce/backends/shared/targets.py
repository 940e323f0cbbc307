"""Preparation of targets for the backends, by operations of torch."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def checked_on_host(targets: Tensor) -> bool:
    """Whether a bad target raises a ValueError: always on a CPU, elsewhere if CCE_CHECK_TARGETS=1 is set."""
    return targets.device.type == "cpu" or os.environ.get("CCE_CHECK_TARGETS") == "1"


def prepare(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """Return ``targets`` as int64 with -1 for ``ignore_index``; any other value outside [0, v) is an error.

    On a CPU the error is a ValueError. On a GPU it is a device-side assertion, so that nothing waits; with
    CCE_CHECK_TARGETS=1 in the environment it is a ValueError there too, at the price of a synchronisation.
    """
    # Few operations: at a small N their launches take longer than the kernels.
    targets = targets.to(torch.int64)
    inside = targets.clamp(0, v - 1) == targets
    good = inside | (targets == ignore_index)
    if checked_on_host(targets):
        if not bool(good.all()):
            where = (~good).nonzero()[0].tolist()
            raise ValueError(
                f"targets: got {int(targets[tuple(where)])} at index {tuple(where)}, "
                f"expected values in [0, {v}) or ignore_index={ignore_index}"
            )
    else:
        torch._assert_async(good.all())
    found = torch.where(inside, targets, -1)
    return found.masked_fill_(targets == ignore_index, -1) if 0 <= ignore_index < v else found


def mean_weights(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of prepared targets in a mean: 1 / (number of targets), 0 for -1; NaN if there are no targets."""
    in_use = targets >= 0
    return in_use / in_use.sum(dtype=dtype)
