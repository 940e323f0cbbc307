"""Every kernel that a call launches, compiled for an architecture without a GPU of it.

The launch code itself runs, on small CPU tensors, so that arguments, constants, warps and stages are those of a real
launch. Two things are replaced: what tells Triton which GPU there is, and the launch, of which only the compilation
is left. Results are never computed: what the kernels would fill stays as it was allocated.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cce.backends.problem import Maps
from cce.backends.resolve import resolve
from cce.backends.triton import TritonBackend, choice, launches, live, one_pass, operands
from cce.testing import Case
from cce.testing.data import make_inputs, make_problem, make_upstream


@dataclass(frozen=True)
class Architecture:
    """A target of the compiler.

    Attributes:
        capability: compute capability.
        ptx: its name in PTX; with an "a" that of the instructions no later architecture has.
        product: the instruction of its matrix unit.
        shared: bytes of shared memory a block can have.
    """

    capability: tuple[int, int]
    ptx: str
    product: str
    shared: int

    def __str__(self) -> str:
        return f"sm_{self.number}"

    @property
    def number(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    # What Triton asks a driver. Its caches go by device: one an architecture, none that a GPU has.
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


ARCHITECTURES = (
    Architecture((8, 0), "sm_80", "mma.sync", 163 * 1024),
    Architecture((9, 0), "sm_90a", "wgmma", 227 * 1024),
    Architecture((10, 0), "sm_100a", "tcgen05.mma", 227 * 1024),
)


@dataclass(frozen=True)
class Setting:
    """A call to compile the kernels of.

    Attributes:
        case: the problem.
        programs: multiprocessors of the GPU: with one, a problem of 256 rows is large.
        wide: offsets need 64 bits.
        precision: of float32 products, as torch.set_float32_matmul_precision takes it.
    """

    case: Case
    programs: int = 1
    wide: bool = False
    precision: str = "highest"


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled."""

    name: str
    result: Any

    @property
    def ptx(self) -> str:
        return str(self.result.asm["ptx"])

    @property
    def shared(self) -> int:
        return int(self.result.metadata.shared)

    @property
    def multiplies(self) -> bool:
        """It has a product of matrices."""
        return "tt.dot" in self.result.asm["ttir"]

    @property
    def boxes(self) -> list[str]:
        """Arguments that are tensor maps."""
        return [name for name, kind in self.result.src.signature.items() if str(kind).startswith("tensordesc")]

    @cached_property
    def stack(self) -> int:
        """Bytes a thread: what the compiler spilled, as it keeps nothing else there."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.result.asm["cubin"])
            tool = triton.knobs.nvidia.cuobjdump.path
            told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
        assert found, f"{self.name}: cuobjdump says {told!r}"
        return int(found[1]) + int(found[2])


def compile_launches(setting: Setting, architecture: Architecture) -> list[Compiled]:
    """The kernels that forward, backward and, where it applies, one pass would launch, each once."""
    found: dict[str, Compiled] = {}
    original = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        try:
            result = original(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise AssertionError(f"{name} does not compile for {architecture}: {error}") from error
        found.setdefault(result.hash, Compiled(name, result))

    with _launching(setting, architecture, compile_only):
        _call(setting.case)
    return list(found.values())


def launched_names(setting: Setting, architecture: Architecture) -> set[str]:
    """Names of the kernels of :func:`compile_launches`; nothing is compiled."""
    found: set[str] = set()

    def name_only(kernel: Any, *args: Any, **options: Any) -> None:
        found.add(kernel.fn.__name__)

    with _launching(setting, architecture, name_only):
        _call(setting.case)
    return found


@contextmanager
def _launching(setting: Setting, architecture: Architecture, run: Callable[..., None]) -> Iterator[None]:
    """Launches are ``run``, on a GPU of the architecture."""
    with pytest.MonkeyPatch.context() as patch, _target(architecture), _precision(setting.precision):
        patch.setattr(JITFunction, "run", run)
        patch.setattr(choice, "capability", lambda device: architecture.capability)
        for module in (choice, one_pass):
            patch.setattr(module, "multiprocessors", lambda device: setting.programs)
        for module in (operands, launches, live) if setting.wide else ():
            patch.setattr(module, "needs_wide", lambda x: True)
        yield


@contextmanager
def cache_folder_of(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's cache is the test run's: what an earlier run compiled is not looked at, what another process did is."""
    base = factory.getbasetemp()
    run = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(run / "triton"))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where this is not said
        yield


def _call(case: Case) -> None:
    problem = make_problem(case, "cpu")
    spec = resolve(case.make_spec(), problem)
    inputs, upstream = make_inputs(case, "cpu"), make_upstream(case, "cpu", torch.float32)
    shape, dtype = (spec.tiles(problem.v), problem.n), problem.map_dtype(spec)
    maps = Maps(**{name: torch.zeros(shape, dtype=dtype) for name in problem.maps(spec)})
    backend = TritonBackend()
    backend.prepare(inputs.targets, problem.v, -100, None)
    outputs = backend.forward(inputs, problem, spec, maps)
    backend.backward(inputs, problem, spec, outputs, maps, upstream)
    if backend.one_pass(problem, spec):
        outputs, gradients = backend.loss_and_gradients(inputs, problem, spec, upstream.g)
        backend.prepare(inputs.targets, problem.v, -100, torch.float32)
        backend.value(outputs, upstream.g)
        backend.scale(gradients, torch.ones(()), inputs.targets)


@contextmanager
def _target(architecture: Architecture) -> Iterator[None]:
    """Triton compiles for the architecture."""
    drivers = triton.runtime.driver
    before = drivers._active  # there need not be one
    drivers.set_active(architecture)
    try:
        yield
    finally:
        drivers._active = before


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
