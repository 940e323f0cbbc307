"""From a source to a kernel that can be launched: NVRTC, CuPy's cache folder, the driver.

CuPy compiles for the architecture of the GPU; ``wgmma`` exists on sm_90a only, which it has no option for. So NVRTC is
called here, with the result in CuPy's own folder, and ``cupy.RawModule`` loads it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cce.backends.cupy.sources import source

_lock = threading.Lock()
_loaded: dict[tuple[int, Variant], int] = {}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is specialised.

    Attributes:
        file: its source, in ``cuda/``.
        name: of the kernel.
        macros: names and values.
        architecture: "sm_80", "sm_90a", ...
        shared: bytes of shared memory a block of threads takes.
    """

    file: str
    name: str
    macros: tuple[tuple[str, int], ...]
    architecture: str
    shared: int

    @property
    def options(self) -> tuple[str, ...]:
        """For NVRTC."""
        return (
            f"--gpu-architecture={self.architecture}", "--std=c++17", "--device-as-default-execution-space",
            "--extra-device-vectorization", *(f"-D{name}={value}" for name, value in self.macros),
        )  # fmt: skip


def function(variant: Variant) -> int:
    """The kernel's handle on the current device; compiled and loaded once."""
    key = (torch.cuda.current_device(), variant)
    found = _loaded.get(key)
    if found is None:
        with _lock:  # autograd's threads may come at the same time
            found = _loaded.get(key) or _load(variant)
            _loaded[key] = found
    return found


@cache
def _raw_module(path: str) -> Any:
    import cupy

    return cupy.RawModule(path=path)


def _load(variant: Variant) -> int:
    kernel = _raw_module(str(_cubin(variant))).get_function(variant.name)
    if variant.shared > 0:
        kernel.max_dynamic_shared_size_bytes = variant.shared
    return int(kernel.kernel.ptr)


def _cubin(variant: Variant) -> Path:
    """The file with the compiled module: found, or made."""
    from cupy.cuda import nvrtc

    text = source(variant.file)
    key = repr((nvrtc.getVersion(), variant.options, text))
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"cce_{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:  # others may be writing the same
            file.write(compile_source(text, variant))
        os.replace(file.name, path)
    return path


def compile_source(text: str, variant: Variant) -> bytes:
    """The module as a cubin.

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
