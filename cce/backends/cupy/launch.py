"""Launches: one struct of arguments, passed to the driver by address, on torch's current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce.backends.cupy.module import Variant, function
from cce.torch_private import raw_stream


class Launch:
    """A kernel with its arguments, to be launched any number of times on the device current at construction.

    Fields of ``arguments``, and ``grid``, may change between launches: the driver copies them at each. The tensors
    whose addresses they hold live as long as this object; kernels still running after that are safe, since torch reuses
    the memory on the same stream only.

    Args:
        variant: the kernel.
        grid, threads: number of thread blocks, and of threads in a block.
        arguments: the kernel's arguments, in order.
        tensors: tensors to keep alive.
        cooperative: whether all blocks must run at the same time; if they cannot, the launch fails.
    """

    def __init__(
        self,
        variant: Variant,
        grid: int | tuple[int, int],
        threads: int,
        arguments: ctypes.Structure | Sequence[ctypes.Structure],
        tensors: Sequence[Tensor | None] = (),
        cooperative: bool = False,
    ) -> None:
        from cupy.cuda import driver

        given = (arguments,) if isinstance(arguments, ctypes.Structure) else tuple(arguments)
        self.arguments, self._tensors = given[-1], (given, tuple(tensors))
        self.grid, self._function = grid if isinstance(grid, tuple) else (grid, 1), function(variant)
        self._shape, self._device = (1, threads, 1, 1, variant.shared), torch.cuda.current_device()
        self._pointers = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
        self._address = ctypes.addressof(self._pointers)
        self._launch = driver.launchCooperativeKernel if cooperative else driver.launchKernel
        self._rest = (self._address,) if cooperative else (self._address, 0)

    def __call__(self) -> None:
        stream = raw_stream(self._device)
        self._launch(self._function, *self.grid, *self._shape, stream, *self._rest)


def address(x: Tensor | None) -> int | None:
    """Address of a tensor's first element, for a field of ``arguments``; the kernel reads the others contiguously.

    Raises:
        ValueError: the tensor is not contiguous; the kernel would read other elements, and beyond its end.
    """
    if x is None:
        return None
    if not x.is_contiguous():
        raise ValueError(f"a kernel's argument: got shape {tuple(x.shape)}, strides {x.stride()}, expected contiguous")
    return x.data_ptr()


def strided(x: Tensor | None) -> int | None:
    """Address of a tensor whose strides are passed to the kernel in other fields."""
    return None if x is None else x.data_ptr()


class Arguments(ctypes.Structure):
    """Struct of one kernel's arguments; fields are given by name, contiguous tensors stand for their addresses."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{name: address(x) if isinstance(x, Tensor) else x for name, x in fields.items()})
