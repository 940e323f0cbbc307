"""Launches: one struct of arguments, handed to the driver by address, on torch's current stream."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from cce.backends.cupy.module import Variant, function


class Launch:
    """A kernel with its arguments, to be launched any number of times on the device that is current now.

    Fields of ``arguments`` may change between launches: the driver copies them at each. The tensors whose addresses they
    hold live as long as this; what runs behind the host is safe, since torch gives their memory to the same stream only.
    """

    def __init__(
        self, variant: Variant, grid: int, threads: int, arguments: ctypes.Structure, *tensors: Tensor | None
    ) -> None:
        from cupy.cuda import driver

        self.arguments, self._tensors, self._launch = arguments, tensors, driver.launchKernel
        self._shape = (function(variant), grid, 1, 1, threads, 1, 1, variant.shared)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._address = ctypes.addressof(self._pointers)

    def __call__(self) -> None:
        self._launch(*self._shape, torch.cuda.current_stream().cuda_stream, self._address, 0)


def address(x: Tensor | None) -> int | None:
    """Of a tensor's first element, as a field of ``arguments`` takes it."""
    return None if x is None else x.data_ptr()


class Arguments(ctypes.Structure):
    """The struct of one kernel's arguments; fields are given by name, and tensors stand for their addresses."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{name: address(x) if isinstance(x, Tensor) else x for name, x in fields.items()})
