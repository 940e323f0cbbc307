"""Compiled modules are kept where that can be done, and loaded from memory; CuPy itself is a stub here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cce.backends.cupy import module
from cce.backends.cupy.module import Variant

pytestmark = pytest.mark.usefixtures("nothing_warned_of")

CODE = b"\x7fELF" + bytes(1000)


class Modules:
    """What CuPy and NVRTC were asked for.

    Attributes:
        compiled: files.
        loaded: cubins.
        attributes: of kernels: handle, attribute, value.
    """

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[bytes] = []
        self.attributes: list[tuple[int, int, int]] = []

    def compile(self, text: str, variant: Variant) -> bytes:
        self.compiled.append(variant.file)
        return CODE

    def new_module(self) -> Any:
        number = len(self.loaded)
        return SimpleNamespace(
            load=self.loaded.append, get_function=lambda name: SimpleNamespace(ptr=1000 * number + len(name))
        )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Modules:
    found = Modules()
    names: dict[str, dict[str, Any]] = {
        "cupy": {},
        "cupy.cuda": {},
        "cupy.cuda.nvrtc": {"getVersion": lambda: (12, 8)},
        "cupy.cuda.driver": {
            "funcSetAttribute": lambda *arguments: found.attributes.append(arguments),
            "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": 8,
        },
        "cupy.cuda.function": {"Module": found.new_module},
    }
    for name, fields in names.items():
        stub = ModuleType(name)
        vars(stub).update(fields)
        monkeypatch.setitem(sys.modules, name, stub)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stub)
    monkeypatch.setattr(module, "compile_source", found.compile)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    forget(monkeypatch)
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(module, "_modules", {})


def variant(name: str = "kernel", shared: int = 0, **macros: int) -> Variant:
    return Variant("rows.cu", name, tuple(macros.items()), "sm_80", shared)


def test_what_is_compiled_is_kept(made: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module has several kernels; another process finds it; other macros make another."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    assert module.function(variant()) == 6
    assert module.function(variant("other", shared=50_000)) == 5
    assert made.attributes == [(5, 8, 50_000)]
    assert made.loaded == [CODE] and made.compiled == ["rows.cu"]
    forget(monkeypatch)
    module.function(variant())
    assert made.loaded == [CODE, CODE] and made.compiled == ["rows.cu"]
    module.function(variant(A=1))
    assert made.compiled == ["rows.cu"] * 2
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert modes == {0o644}, "other users of a shared cache cannot read it, or may write to it"


def test_each_device_loads_its_own(made: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    for device, handle in ((0, 6), (1, 1006), (0, 6)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert module.function(variant()) == handle


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", CODE], ids=["empty", "cut", "unsealed"])
def test_damaged(made: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    module.function(variant())
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"cubin of the cupy backend {path} is not used .*digest"):
        module.function(variant())
    forget(monkeypatch)
    module.function(variant())
    assert made.loaded == [CODE] * 3 and made.compiled == ["rows.cu"] * 2


def test_a_folder_that_cannot_be_made(made: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; the kernels run."""
    monkeypatch.setenv("CUPY_CACHE_DIR", "/proc/none")
    with pytest.warns(RuntimeWarning, match="/proc/none/.* is not kept") as warned:
        handles = [module.function(variant(A=i)) for i in range(3)]
    assert len(warned) == 1 and handles == [6, 1006, 2006]


def test_no_home(made: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert module.function(variant()) == 6
