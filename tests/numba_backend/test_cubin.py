"""Kernels are compiled at the same time, each once, and kept; a failure is raised where they were asked for."""

from __future__ import annotations

import gc
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from cce.backends.numba import cubin
from cce.backends.numba.launch import Kernel, compile_all, prepare_all
from cce.backends.numba.options import Means, Targets

CAPABILITY = (9, 0)


def small() -> list[Kernel]:
    """Two kernels that take little to compile, not seen by any other test."""
    targets = Kernel("targets.make_target_logits", Targets("bf16", "bf16"), 128, 0)
    return [targets, Kernel("compensation.make_mean_rows", Means("bf16", 128), 128, 0)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cubin.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled, by name; Numba and the linker do nothing."""
    found: list[str] = []

    def ptx_of(kernel: Kernel, capability: tuple[int, int]) -> cubin.Code:
        found.append(kernel.name)
        return cubin.Code("entry", "q", kernel.name.encode())

    monkeypatch.setattr(cubin, "ptx_of", ptx_of)
    monkeypatch.setattr(cubin, "assemble", lambda ptx, capability: ptx)
    return found


def test_what_is_compiled_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from numba.cuda import dispatcher

    before = list(warnings.filters), dispatcher.get_current_device, gc.isenabled()
    kernels = small()
    compile_all(kernels, CAPABILITY)
    assert (list(warnings.filters), dispatcher.get_current_device, gc.isenabled()) == before
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["mean_rows", "target_logits"]

    def again(kernel: Kernel, capability: tuple[int, int]) -> Any:
        raise AssertionError(f"{kernel.name} is compiled again")

    monkeypatch.setattr(cubin, "ptx_of", again)
    for kernel, other in zip(kernels, small(), strict=True):
        assert other.code(CAPABILITY) == kernel.code(CAPABILITY)
        assert other.code(CAPABILITY).code[:4] == b"\x7fELF"


def test_the_linker_works_on_all_at_once(pretended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    together = Barrier(2, timeout=30)

    def assemble(ptx: bytes, capability: tuple[int, int]) -> bytes:
        together.wait()
        return ptx

    monkeypatch.setattr(cubin, "assemble", assemble)
    kernels = small()
    compile_all(kernels, CAPABILITY)
    assert [kernel.code(CAPABILITY).code for kernel in kernels] == [b"target_logits", b"mean_rows"]


def test_launches_compile_what_is_missing(pretended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(Kernel, "prepare", lambda self, grid, *arguments: (self.name, grid, arguments))
    first, second = small()
    launches = [(first, 2, (1.0, 5)), (second, 3, ())]
    assert prepare_all(launches) == [("target_logits", 2, (1.0, 5)), ("mean_rows", 3, ())]
    assert sorted(pretended) == ["mean_rows", "target_logits"]
    for kernel in first, second:
        kernel._loaded[0] = 0, ""
    monkeypatch.setattr(Kernel, "code", None)  # nobody may ask for it
    assert len(prepare_all(launches)) == 2


def test_threads_that_ask_at_once_compile_once(pretended: list[str], folder: Path) -> None:
    kernel, start = small()[0], Barrier(4, timeout=30)

    def ask(_: int) -> cubin.Code:
        start.wait()
        return kernel.code(CAPABILITY)

    with ThreadPoolExecutor(4) as threads:
        codes = list(threads.map(ask, range(4)))
    assert pretended == ["target_logits"] and all(code is codes[0] for code in codes)
    assert len(list(folder.iterdir())) == 1


def test_a_failure_is_raised_and_not_kept(pretended: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ptx: bytes, capability: tuple[int, int]) -> bytes:
        raise RuntimeError(f"no cubin of {ptx.decode()}")

    kernels = small()
    with monkeypatch.context() as patched:
        patched.setattr(cubin, "assemble", refuse)
        with pytest.raises(RuntimeError, match="no cubin of target_logits"):
            compile_all(kernels, CAPABILITY)
    assert not list(folder.iterdir())
    compile_all(kernels, CAPABILITY)
    assert len(list(folder.iterdir())) == 2


def damage(path: Path, content: bytes | None) -> None:
    """A file of this content in the place of ``path``; a FIFO for None."""
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)


@pytest.mark.usefixtures("nothing_warned_of")
@pytest.mark.parametrize(
    "content",
    [b"", b"entr", b"entry q\n", b"entry q\nsomebody else's code", b"\xff\xfe q\nx", None],
    ids=["empty", "cut in the head", "no code", "unsealed", "no text", "fifo"],
)
def test_what_is_damaged_is_compiled_again(pretended: list[str], folder: Path, content: bytes | None) -> None:
    """With a warning; the file is a good one then."""
    cubin.compiled(small()[0], CAPABILITY)
    (path,) = folder.iterdir()
    damage(path, content)
    with pytest.warns(RuntimeWarning, match=rf"cubin of the numba backend {path} is not used"):
        assert cubin.compiled(small()[0], CAPABILITY).code == b"target_logits"
    assert cubin.compiled(small()[0], CAPABILITY).code == b"target_logits"
    assert pretended == ["target_logits"] * 2


@pytest.mark.usefixtures("nothing_warned_of")
def test_a_cubin_that_anybody_can_write_is_not_run(pretended: list[str], folder: Path) -> None:
    cubin.compiled(small()[0], CAPABILITY)
    (path,) = folder.iterdir()
    path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        cubin.compiled(small()[0], CAPABILITY)
    assert pretended == ["target_logits"] * 2 and path.stat().st_mode & 0o022 == 0


@pytest.mark.usefixtures("nothing_warned_of")
def test_a_folder_that_cannot_be_made(pretended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning for all kernels."""
    monkeypatch.setenv(cubin.VARIABLE, "/proc/none")
    kernels = small()
    with pytest.warns(RuntimeWarning, match="/proc/none/.* is not kept") as warned:
        compile_all(kernels, CAPABILITY)
    assert len(warned) == 1
    assert [kernel.code(CAPABILITY).code for kernel in kernels] == [b"target_logits", b"mean_rows"]
