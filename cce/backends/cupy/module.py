"""Compilation and loading of kernels: NVRTC, CuPy's cache folder, the driver.

CuPy compiles for the architecture of the GPU and has no option for sm_90a, the only one with ``wgmma``. So NVRTC is
called here, its result kept in CuPy's own folder, and CuPy's modules load it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cce.backends.cupy.sources import source
from cce.files import Cache

_lock = threading.Lock()
_loaded: dict[tuple[int, Variant], int] = {}
_modules: dict[tuple[int, str, tuple[str, ...]], Any] = {}
_CACHE = Cache("cubin of the cupy backend")


@dataclass(frozen=True)
class Variant:
    """Specialisation of a kernel.

    Attributes:
        file: source file, in ``cuda/``.
        name: name of the kernel.
        macros: names and values.
        architecture: "sm_80", "sm_90a", ...
        shared: bytes of shared memory a thread block takes.
    """

    file: str
    name: str
    macros: tuple[tuple[str, int], ...]
    architecture: str
    shared: int

    @property
    def options(self) -> tuple[str, ...]:
        """Options for NVRTC."""
        return (
            f"--gpu-architecture={self.architecture}", "--std=c++17", "--device-as-default-execution-space",
            "--extra-device-vectorization", *(f"-D{name}={value}" for name, value in self.macros),
        )  # fmt: skip


def function(variant: Variant) -> int:
    """Handle of the kernel on the current device; compiled and loaded once."""
    key = (torch.cuda.current_device(), variant)
    found = _loaded.get(key)
    if found is None:
        with _lock:  # autograd's threads may call at the same time
            found = _loaded.get(key) or _load(variant)
            _loaded[key] = found
    return found


def _load(variant: Variant) -> int:
    from cupy.cuda import driver

    kernel = _module(variant).get_function(variant.name)
    if variant.shared > 0:
        driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared)
    return int(kernel.ptr)


def _module(variant: Variant) -> Any:
    """Module with the kernel, on the current device; kept, since its kernels live no longer than it does."""
    from cupy.cuda.function import Module

    key = (torch.cuda.current_device(), variant.file, variant.options)
    if key not in _modules:
        module = Module()
        # Load from memory: the driver would open the file again, which may have changed by then, or never been written.
        module.load(_cubin(variant))
        _modules[key] = module
    return _modules[key]


def _cubin(variant: Variant) -> bytes:
    """Compiled module, from the cache or newly made."""
    from cupy.cuda import nvrtc

    text = source(variant.file)
    key = repr((nvrtc.getVersion(), variant.options, text))
    folder = _folder()
    path = None if folder is None else folder / f"cce_{hashlib.sha256(key.encode()).hexdigest()}.sealed.cubin"
    found = None if path is None else _CACHE.get(path)
    if found is None:
        found = compile_source(text, variant)
        if path is not None:
            _CACHE.put(path, found)
    return found


def _folder() -> Path | None:
    """CuPy's own cache folder; None for a user without a home."""
    try:
        return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    except RuntimeError:
        return None


def compile_source(text: str, variant: Variant) -> bytes:
    """Compile the source to a cubin.

    Raises:
        RuntimeError: NVRTC refuses the source; the message has its log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, variant.file, (), ())
    try:
        nvrtc.compileProgram(program, variant.options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC cannot compile {variant}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
