"""Compiles the kernels without a GPU, with NVRTC from its wheel, and looks at what came out with Triton's tools."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from cuda.bindings import nvrtc

from cce.backends.cupy.gpu import Gpu
from cce.backends.cupy.module import Variant
from cce.backends.cupy.sources import source

GPUS = {
    "sm_80": Gpu((8, 0), 108, 166912, 167936),
    "sm_89": Gpu((8, 9), 128, 101376, 102400),
    "sm_90": Gpu((9, 0), 132, 232448, 233472),
    "sm_100": Gpu((10, 0), 148, 232448, 233472),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel of a module: registers of a thread, bytes spilled, bytes of static shared memory, its instructions."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: str


@cache
def cubin(variant: Variant) -> bytes:
    """Of the module the kernel is in; compiled with the options the backend uses."""
    error, program = nvrtc.nvrtcCreateProgram(source(variant.file).encode(), variant.file.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [option.encode() for option in variant.options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)  # of one byte, bytes would be the interpreter's own b" ", for everybody
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{variant}\n{log.decode()}"
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    binary = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


@cache
def compiled(variant: Variant, disassemble: bool = False) -> Compiled:
    """The kernel of a variant."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin(variant))
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(rf"Function {variant.name}:\s*(.*)", usage)
        assert found is not None, usage
        numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found[1])}
        text = _run("cuobjdump", "--dump-sass", "--function", variant.name, file.name) if disassemble else ""
    return Compiled(numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"], text)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout
