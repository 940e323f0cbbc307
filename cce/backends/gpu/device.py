"""The current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cce.torch_private import current_device

_HERE: AbstractContextManager[Any] = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which the device of ``x`` is current, for kernel launches. Most often it is already."""
    if not x.is_cuda or x.get_device() == current_device():
        return _HERE
    return torch.cuda.device_of(x)
