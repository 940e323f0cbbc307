"""Launching again what was compiled: never for arguments of another kind."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cce.backends.triton import triton_private
from cce.backends.triton.repeat import Repeated


@dataclass
class Param:
    name: str
    do_not_specialize: bool = False


@dataclass
class Kernel:
    """What Triton's has of interest here: each compilation counts, and what it gives tells what it is launched with."""

    names: tuple[str, ...]
    unspecialized: tuple[str, ...] = ()
    compiled: list[dict[str, Any]] = field(default_factory=list)
    launched: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    grids: list[Any] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arg_names(self) -> list[str]:
        return list(self.names)

    @property
    def params(self) -> list[Param]:
        return [Param(name, name in self.unspecialized) for name in self.names]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(**arguments: Any) -> Any:
            self.options.append({name: arguments.pop(name) for name in list(arguments) if name not in self.names})
            self.compiled.append(arguments)
            return Compiled(self, len(self.compiled) - 1)

        return first


@dataclass
class Compiled:
    kernel: Kernel
    version: int

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.kernel.grids.append(grid)
        return lambda *values: self.kernel.launched.append((self.version, values))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(("x", "y", "n", "v0", "FLAG"), unspecialized=("v0",))


def test_second_launch_goes_past_triton(kernel: Kernel) -> None:
    x, y = torch.zeros(4), torch.ones(4)
    launch = Repeated(kernel, (7,), {"n": 3, "FLAG": True}, num_warps=8)
    launch(x=x, y=None, v0=0)
    launch(x=y, y=None, v0=4096)
    assert kernel.compiled == [{"x": x, "y": None, "n": 3, "v0": 0, "FLAG": True}]
    assert kernel.options == [{"num_warps": 8}]
    assert kernel.grids == [(7, 1, 1)]
    ((version, values),) = kernel.launched
    assert version == 0 and values == (y.data_ptr(), None, 3, 4096, True)


WHOLE = torch.zeros(64)
OTHERS = {
    "dtype": {"x": WHOLE.bfloat16()},
    "alignment": {"x": WHOLE[1:]},
    "device": {"x": torch.zeros(64, device="meta")},
    "none": {"x": None},
    "descriptor": {"x": TensorDescriptor(WHOLE.view(8, 8), [8, 8], [8, 1], [4, 4])},
    "integer": {"n": 32},
    "one": {"n": 1},
    "float": {"n": 16.0},
    "bool": {"n": True},
    "64 bits": {"v0": 2**31},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_is_compiled_anew(kernel: Kernel, name: str) -> None:
    launch = Repeated(kernel, (1,), {"FLAG": False})
    usual = {"x": WHOLE, "y": WHOLE, "n": 16, "v0": 5}
    launch(**usual)
    launch(**usual | OTHERS[name])
    assert len(kernel.compiled) == 2
    launch(**usual)
    launch(**usual | OTHERS[name])
    assert len(kernel.compiled) == 2
    assert [version for version, _ in kernel.launched] == [0, 1]


def test_descriptors_by_their_boxes(kernel: Kernel) -> None:
    launch = Repeated(kernel, (1,), {"y": None, "n": 2, "v0": 0, "FLAG": False})
    for box in ([4, 4], [4, 8], [4, 4]):
        launch(x=TensorDescriptor(WHOLE.view(8, 8), [8, 8], [8, 1], box))
    assert len(kernel.compiled) == 2 and [version for version, _ in kernel.launched] == [0]


def test_no_tensor_is_kept(kernel: Kernel) -> None:
    launch = Repeated(kernel, (1,), {"n": 3, "FLAG": True})
    for _ in range(2):
        launch(x=torch.zeros(4), y=torch.zeros(4), v0=1)
    (version,) = launch._versions.values()
    assert version.values == [None, None, 3, None, True]


def test_threads_do_not_mix_arguments(kernel: Kernel) -> None:
    launch = Repeated(kernel, (1,), {"n": 3, "FLAG": True})
    tensors = [torch.zeros(4) for _ in range(4)]
    launch(x=tensors[0], y=tensors[0], v0=0)

    def work(i: int) -> None:
        for _ in range(500):
            launch(x=tensors[i], y=tensors[i], v0=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.launched) == 2000
    assert all(x == y == tensors[v0].data_ptr() for _, (x, y, _, v0, _) in kernel.launched)


@dataclass
class OnDevice:
    """What Triton compiles for a GPU, as far as a launch needs it."""

    function: int = 7
    packed_metadata: tuple[str, ...] = ("metadata",)
    usual: list[tuple[Any, ...]] = field(default_factory=list)
    direct: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.usual.append(values)

    def run(self, *arguments: Any) -> None:
        self.direct.append(arguments)


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_is_told_of_launches(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own launch; without one the hooks' part of a launch is left out."""
    monkeypatch.setattr(triton_private, "current_device", lambda: 0)
    monkeypatch.setattr(triton_private, "raw_stream", lambda device: 5)
    compiled = OnDevice()
    launch = triton_private.launcher(compiled, (2, 1, 1))
    launch("x")
    assert compiled.direct == [(2, 1, 1, 5, 7, ("metadata",), None, None, None, "x")] and not compiled.usual
    hook = getattr(triton.knobs.runtime, which)
    hook.add(print)
    try:
        launch("y")
    finally:
        hook.remove(print)
    assert compiled.usual == [("y",)] and len(compiled.direct) == 1


def test_interpreter_compiles_nothing(kernel: Kernel) -> None:
    """What the interpreter returns is not launched again."""

    class Interpreted(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: self.compiled.append(arguments)

    interpreted = Interpreted(kernel.names)
    launch = Repeated(interpreted, (1,), {"n": 3, "FLAG": True})
    for v0 in (1, 2):
        launch(x=WHOLE, y=WHOLE, v0=v0)
    assert [arguments["v0"] for arguments in interpreted.compiled] == [1, 2]
