"""The current device, what a GPU is, and streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager[Any]]:
    """A second stream on the device of ``x``, from what is in the current one so far to the end of this context.

    What it gives is entered for the launches that are to run there. They use memory allocated before: what follows in
    the current stream waits for them at the end.
    """
    if not x.is_cuda:
        yield nullcontext()
        return
    here, side = torch.cuda.current_stream(x.device), _side(x.device)
    side.wait_stream(here)
    try:
        yield torch.cuda.stream(side)
    finally:
        here.wait_stream(side)


@lru_cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
