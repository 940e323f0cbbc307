"""The current device, and what a GPU is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: that of ``x``, in this context. Most often it is already."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


@lru_cache
def capability_of(index: int) -> tuple[int, int]:
    """Compute capability of a GPU; a call of torch's own takes ten times as long."""
    return torch.cuda.get_device_capability(index)
