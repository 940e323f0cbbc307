"""Compiles the kernels without a GPU, with NVRTC from its wheel, and looks at what came out with Triton's tools."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


def stand_in(variants: dict[str, dict[str, Variant]], gpu: str, name: str, own: Collection[str]) -> Variant:
    """Variant that is compiled in a kernel's place: for names not in ``own``, the same one for sm_90.

    No source asks for the architecture, and all that are here have the instructions of sm_80. What differs are
    registers: each architecture compiles the variants that take the most.
    """
    variant, of_90 = variants[gpu][name], variants["sm_90"][name]
    return of_90 if name not in own and variant.macros == of_90.macros else variant


def cubin(variant: Variant) -> bytes:
    """Of the module the kernel is in; compiled with the options the backend uses."""
    return _cubin(variant.file, variant.options)


@cache
def _cubin(file: str, options: tuple[str, ...]) -> bytes:
    program = _compile(file, source(file), options)
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    binary = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


def check_lines(variant: Variant, lines: list[str]) -> None:
    """Hold the compiler's front end to ``lines``, static assertions behind the kernel's source."""
    text = "\n".join([source(variant.file), *lines])
    nvrtc.nvrtcDestroyProgram(_compile(variant.file, text, (*variant.options, "--fdevice-syntax-only")))


def _compile(file: str, text: str, options: tuple[str, ...]) -> Any:
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), file.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    given = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)  # of one byte, bytes would be the interpreter's own b" ", for everybody
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{file} {options}\n{log.decode()}"
    return program


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
