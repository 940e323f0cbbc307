"""Compilation of a kernel in Python to machine code, a cubin, which is kept on disk.

Numba compiles a kernel to PTX, and the toolkit's linker turns that into a cubin. Both take seconds, so cubins are kept
in a folder: a process that finds all it needs there never imports Numba.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

from cce.backends.gpu.folders import folder_of
from cce.backends.numba.source import Source
from cce.files import Cache

VARIABLE = "CCE_NUMBA_CACHE"
_CACHE = Cache("cubin of the numba backend")
#: Memory formats of arguments, each in 8 bytes.
_FORMATS = {"int32": "i4x", "int64": "q", "float32": "f4x"}
_SOURCES = ("cubin.py", "device.py", "intrinsics.py", "matrix.py", "wgmma.py", "tile.py", "options.py", "kernels/*.py")
#: Lock: Numba compiles one kernel at a time, and the setup for it (warnings, the device) affects the whole process.
_COMPILER = Lock()


@dataclass(frozen=True)
class Code:
    """A kernel for a kind of GPU: the name of its entry, the memory formats of its arguments, and its PTX or cubin."""

    entry: str
    format: str
    code: bytes


def compiled(kernel: Source, capability: tuple[int, int]) -> Code:
    """Code of a kernel, from the folder of cubins or newly compiled."""
    path = _path(kernel, capability)
    kept = None if path is None else _CACHE.get(path)
    if kept is not None:
        head, cubin = kept.split(b"\n", 1)
        entry, layout = head.decode().split(" ")
        return Code(entry, layout, cubin)
    ptx = ptx_of(kernel, capability)
    found = replace(ptx, code=assemble(ptx.code, capability))
    if path is not None:
        _CACHE.put(path, f"{found.entry} {found.format}\n".encode() + found.code)
    return found


def ptx_of(kernel: Source, capability: tuple[int, int]) -> Code:
    """Compile a kernel with Numba, to PTX."""
    with _COMPILER, _no_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by NumPy 2.5 in numba-cuda 0.30
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
    return Code(entry, "".join(_FORMATS[str(x)] for x in parameters), text.encode())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Context without garbage collection: Numba keeps most objects, and scanning them took a tenth of the time.

    It switches off the collector of the whole process, for seconds.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_device_needed(capability: tuple[int, int]) -> Iterator[None]:
    """Context that tells Numba the capability, for which it would ask the driver when compiling device functions."""
    from unittest.mock import patch  # slow to import, and needed only when compiling

    from numba.cuda import dispatcher

    with patch.object(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=capability)):
        yield


def assemble(ptx: bytes, capability: tuple[int, int]) -> bytes:
    """Assemble PTX into a cubin."""
    from cuda import core

    arch = f"sm_{capability[0]}{capability[1]}{'a' if capability[0] >= 9 else ''}"
    return bytes(core.Program(ptx.decode(), "ptx", core.ProgramOptions(arch=arch)).compile("cubin").code)


def folder() -> Path | None:
    """Folder from ``CCE_NUMBA_CACHE``, else ``cce/numba`` in the user's cache folder; None if the variable is "off"."""
    return folder_of(VARIABLE, "numba")


def _path(kernel: Source, capability: tuple[int, int]) -> Path | None:
    place = folder()
    if place is None:
        return None
    names = (kernel.make, repr(kernel.options), kernel.threads, kernel.resident, capability)
    text = repr((names, _sources(), version("numba-cuda"), version("numba")))
    return place / f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


@cache
def _sources() -> str:
    """Digest of everything kernels are made from."""
    here = Path(__file__).parent
    texts = [path.read_bytes() for pattern in _SOURCES for path in sorted(here.glob(pattern))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()
