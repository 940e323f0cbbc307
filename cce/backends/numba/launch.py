"""Kernels and their launches: compiled once, called through the driver.

In the simulator kernels run as they are. Elsewhere Numba's own launch takes about 50 microseconds for so many
arguments, so the driver is called directly, which takes less.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cce.backends.numba.cubin import Code, compiled
from cce.backends.numba.source import Source


def simulated() -> bool:
    """Whether kernels run in Numba's simulator in this process."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


class Kernel(Source):
    """A kernel to be called with numbers and tensors.

    Args:
        make, options, threads, resident: as for :class:`Source`.
        shared: bytes of shared memory of a thread block.
    """

    def __init__(self, make: str, options: Any, threads: int, shared: int, resident: int = 1) -> None:
        super().__init__(make, options, threads, resident)
        self.shared = shared
        self._codes: dict[tuple[int, int], Code] = {}
        self._loaded: dict[int, tuple[int, str]] = {}
        self._lock = Lock()

    def __call__(self, grid: int, *arguments: Any) -> None:
        """Launch ``grid`` thread blocks on torch's current stream."""
        if simulated():
            _simulate(self, grid, arguments)
        else:
            self.prepare(grid, *arguments)()

    def prepare(self, grid: int, *arguments: Any) -> Callable[..., None]:
        """Prepare a launch to be repeated on the current stream; the last argument may differ each time."""
        if simulated():
            return lambda *last: _simulate(self, grid, [*arguments[: len(arguments) - len(last)], *last])
        return Launch(self, grid, arguments)

    def code(self, capability: tuple[int, int]) -> Code:
        """Compiled code; the first thread that asks compiles it, and the others wait."""
        with self._lock:
            if capability not in self._codes:
                self._codes[capability] = compiled(self, capability)
            return self._codes[capability]

    def loaded(self, device: int) -> bool:
        """Whether the kernel is ready to be launched on a device."""
        return device in self._loaded

    def function(self, device: int) -> tuple[int, str]:
        """Handle from the driver, and the memory formats of the arguments."""
        if device not in self._loaded:
            code = self.code(torch.cuda.get_device_capability(device))
            self._loaded[device] = _load(code, self.shared), code.format
        return self._loaded[device]


class Launch:
    """A kernel with its arguments packed."""

    def __init__(self, kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
        device = torch.cuda.current_device()
        function, self._format = kernel.function(device)
        self._keep = [x for x in arguments if isinstance(x, Tensor)]
        numbers = [_number(x) for x in arguments]
        self._memory = bytearray(8 * len(numbers))
        struct.pack_into("<" + self._format, self._memory, 0, *numbers)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._places = (ctypes.c_void_p * len(numbers))(*[base + 8 * i for i in range(len(numbers))])
        stream = torch.cuda.current_stream(device).cuda_stream
        self._call = (
            function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, ctypes.addressof(self._places), 0
        )  # fmt: skip
        self._grid, self._last = grid, self._format.removesuffix("4x")[-1]

    def __call__(self, *last: int) -> None:
        if last:
            struct.pack_into("<" + self._last, self._memory, len(self._memory) - 8, *last)
        if self._grid:
            _check(_driver().cuLaunchKernel(*self._call))


def prepare_all(launches: Sequence[tuple[Kernel, int, Sequence[Any]]]) -> list[Callable[..., None]]:
    """Prepare several kernels with given grids and arguments, compiling them at the same time.

    Numba's part holds Python's lock, the linker's does not. The last kernel is compiled first, since that of the
    products takes the linker longest.
    """
    if not simulated():
        device = torch.cuda.current_device()
        missing = [kernel for kernel, _, _ in launches if not kernel.loaded(device)]
        if missing:
            compile_all(missing[::-1], torch.cuda.get_device_capability(device))
    return [kernel.prepare(grid, *arguments) for kernel, grid, arguments in launches]


def compile_all(kernels: Sequence[Kernel], capability: tuple[int, int]) -> None:
    """Compile each kernel in a thread of its own; an exception in one of them is raised here."""
    with ThreadPoolExecutor(len(kernels)) as threads:
        list(threads.map(lambda kernel: kernel.code(capability), kernels))


def _number(x: Any) -> Any:
    if x is None:
        return 0
    return x.data_ptr() if isinstance(x, Tensor) else x


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: Any) -> Any:
    """Return the result of a driver call without its error code, which is checked."""
    if result[0].value:
        raise RuntimeError(f"cce: the CUDA driver returned {result[0]!r} for a kernel of the numba backend")
    return result[1] if len(result) > 1 else None


def _load(code: Code, shared: int) -> int:
    driver = _driver()
    module = _check(driver.cuModuleLoadData(code.code))
    function = _check(driver.cuModuleGetFunction(module, code.entry.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared))
    return function


def _simulate(kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
    """Run a kernel in Numba's simulator, on CPU tensors."""
    if grid:
        from cce.backends.numba.twins import EXCHANGE, run

        run(kernel.build(), grid, kernel.threads, kernel.shared + EXCHANGE * kernel.threads, arguments)
