"""Repeated launches of kernels that take a few microseconds: their common part is made once.

Their argument is one struct of numbers, laid out by a format string of the module ``struct``.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch

from cce.backends.cupy.module import Variant, function
from cce.torch_private import raw_stream

# A thread that has not called CUDA before, such as autograd's, has no context yet, and the driver makes none.
_thread = threading.local()


class Repeated:
    """A kernel on the device current at construction, to be launched with any arguments.

    Args:
        variant: the kernel.
        threads: number of threads in a block.
        layout: layout of its argument, a format for ``struct.Struct`` with all fields in order and all padding.
    """

    def __init__(self, variant: Variant, threads: int, layout: str) -> None:
        from cupy.cuda import driver, runtime

        packer = struct.Struct("<" + layout)
        # The driver copies as many bytes as the kernel declares; a struct with tensor maps is a multiple of 64.
        self._memory = bytearray(-(-packer.size // 64) * 64)
        self._pack, self._lock = packer.pack_into, threading.Lock()
        self._view = ctypes.c_char.from_buffer(self._memory)
        self._places = (ctypes.c_void_p * 1)(ctypes.addressof(self._view))
        self._address, self._launch = ctypes.addressof(self._places), driver.launchKernel
        self._function, self._threads, self._shared = function(variant), threads, variant.shared
        self._device, self._set_device = torch.cuda.current_device(), runtime.setDevice

    def __call__(self, x: int, y: int, *values: Any) -> None:
        """Launch x times y blocks on torch's current stream."""
        if getattr(_thread, "device", None) != self._device:
            self._set_device(self._device)
            _thread.device = self._device
        stream = raw_stream(self._device)
        with self._lock:  # autograd's threads may call at the same time
            self._pack(self._memory, 0, *values)
            self._launch(self._function, x, y, 1, self._threads, 1, 1, self._shared, stream, self._address, 0)
