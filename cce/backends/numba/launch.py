"""From a kernel in Python to a launch: compiled once, kept on disk, called through the driver.

In the simulator kernels run as they are. Elsewhere Numba makes PTX of them and the toolkit's linker a cubin; both take
seconds, so cubins are kept in a folder: a process that finds all it needs there never imports Numba. Numba's own launch
takes some 50 microseconds for so many arguments, the driver's less.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VARIABLE = "CCE_NUMBA_CACHE"
#: How an argument lies in memory, each in 8 bytes.
_FORMATS = {"int32": "i4x", "int64": "q", "float32": "f4x"}
_SOURCES = ("device.py", "intrinsics.py", "matrix.py", "wgmma.py", "tile.py", "options.py", "kernels/*.py")


def simulated() -> bool:
    """Kernels run in Numba's simulator, in this process."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@dataclass(frozen=True)
class Code:
    """A kernel for a kind of GPU: the name of its entry, how its arguments lie in memory, and the cubin."""

    entry: str
    format: str
    cubin: bytes


class Kernel:
    """A kernel to be called with numbers and tensors.

    Args:
        make: module of the folder ``kernels``, and the function there that makes the Python function of its options;
            the parameters of that are annotated with their types.
        options: a frozen dataclass, whose repr says all.
        threads: of a block. shared: bytes of shared memory of a block. resident: blocks on a multiprocessor.
    """

    def __init__(self, make: str, options: Any, threads: int, shared: int, resident: int = 1) -> None:
        self.make, self.options = make, options
        self.threads, self.shared, self.resident = threads, shared, resident
        self._loaded: dict[int, tuple[int, str]] = {}

    @property
    def name(self) -> str:
        return self.make.split(".")[1].removeprefix("make_")

    def build(self) -> Callable[..., None]:
        """The Python function; this imports Numba."""
        module, name = self.make.split(".")
        return getattr(import_module(f"cce.backends.numba.kernels.{module}"), name)(self.options)

    def __call__(self, grid: int, *arguments: Any) -> None:
        """Launches so many blocks on torch's current stream."""
        if simulated():
            _simulate(self, grid, arguments)
        else:
            self.prepare(grid, *arguments)()

    def prepare(self, grid: int, *arguments: Any) -> Callable[..., None]:
        """A launch to be repeated on the stream that is the current one now; the last argument may be another."""
        if simulated():
            return lambda *last: _simulate(self, grid, [*arguments[: len(arguments) - len(last)], *last])
        return Launch(self, grid, arguments)

    def function(self, device: int) -> tuple[int, str]:
        """The driver's handle, and how its arguments lie in memory."""
        if device not in self._loaded:
            code = compiled(self, torch.cuda.get_device_capability(device))
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


def _number(x: Any) -> Any:
    if x is None:
        return 0
    return x.data_ptr() if isinstance(x, Tensor) else x


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: Any) -> Any:
    """What a call of the driver returned, but for its error code."""
    if result[0].value:
        raise RuntimeError(f"cce: the CUDA driver returned {result[0]!r} for a kernel of the numba backend")
    return result[1] if len(result) > 1 else None


def _load(code: Code, shared: int) -> int:
    driver = _driver()
    module = _check(driver.cuModuleLoadData(code.cubin))
    function = _check(driver.cuModuleGetFunction(module, code.entry.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared))
    return function


def compiled(kernel: Kernel, capability: tuple[int, int]) -> Code:
    """From the folder of cubins, or newly compiled."""
    path = _path(kernel, capability)
    if path is not None and path.exists():
        head, cubin = path.read_bytes().split(b"\n", 1)
        entry, layout = head.decode().split(" ")
        return Code(entry, layout, cubin)
    program = ptx_of(kernel, capability)
    code = Code(program.entry, program.format, assemble(program.text, capability))
    if path is not None:
        _write(path, f"{code.entry} {code.format}\n".encode() + code.cubin)
    return code


@dataclass(frozen=True)
class Program:
    """What Numba makes of a kernel: PTX, the name of its entry, how arguments lie in memory."""

    entry: str
    format: str
    text: str


def ptx_of(kernel: Kernel, capability: tuple[int, int]) -> Program:
    """Compiles a kernel as far as Numba does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2.5, about numba-cuda 0.30
        from numba import cuda, types

        function = kernel.build()
        parameters = function.__annotations__.values()
        signature = types.void(*parameters)
        cc = (*capability, "a") if capability[0] >= 9 else capability
        bounds = (kernel.threads, kernel.resident)
        with _no_device_needed(capability):
            found, _ = cuda.compile(
                function, signature, cc=cc, device=False, abi="numba", output="ptx", launch_bounds=bounds
            )
    text = found if isinstance(found, str) else found.decode()
    entry = text.split(".entry ", 1)[1].split("(", 1)[0].strip()
    return Program(entry, "".join(_FORMATS[str(x)] for x in parameters), text)


@contextmanager
def _no_device_needed(capability: tuple[int, int]) -> Iterator[None]:
    """Functions that a kernel calls are compiled for a device that Numba asks the driver for: here it is told."""
    from unittest.mock import patch  # takes long to import, and is needed by what compiles only

    from numba.cuda import dispatcher

    with patch.object(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=capability)):
        yield


def assemble(ptx: str, capability: tuple[int, int]) -> bytes:
    """The cubin of a program."""
    from cuda import core

    arch = f"sm_{capability[0]}{capability[1]}{'a' if capability[0] >= 9 else ''}"
    return bytes(core.Program(ptx, "ptx", core.ProgramOptions(arch=arch)).compile("cubin").code)


def folder() -> Path | None:
    """``CCE_NUMBA_CACHE``, else ``$XDG_CACHE_HOME/cce/numba`` or ``~/.cache/cce/numba``; None if it says "off"."""
    given, home = os.environ.get(VARIABLE, ""), os.environ.get("XDG_CACHE_HOME", "")
    if given.lower() == "off":
        return None
    try:
        if given:
            return Path(given).expanduser()
        return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "cce" / "numba"
    except RuntimeError:  # a user without a home
        return None


def _path(kernel: Kernel, capability: tuple[int, int]) -> Path | None:
    place = folder()
    if place is None:
        return None
    names = (kernel.make, repr(kernel.options), kernel.threads, kernel.resident, capability)
    text = repr((names, _sources(), version("numba-cuda"), version("numba")))
    return place / f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


@cache
def _sources() -> str:
    """A digest of all that kernels are made from."""
    here = Path(__file__).parent
    texts = [path.read_bytes() for pattern in _SOURCES for path in sorted(here.glob(pattern))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Under another name first, so that nobody reads half a file; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        other = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        other.write_bytes(content)
        other.replace(path)
    except OSError:
        return


def _simulate(kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
    """Runs a kernel in Numba's simulator, on tensors of the CPU."""
    if grid:
        from cce.backends.numba.twins import EXCHANGE, run

        run(kernel.build(), grid, kernel.threads, kernel.shared + EXCHANGE * kernel.threads, arguments)
