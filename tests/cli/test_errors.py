"""Every way to call the command line wrongly: one line that names option, value and expectation; exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import cce
from cce.backends.torch import TorchBackend
from cce.cli import errors
from cce.demo import run

Fails = Callable[..., str]


class Unable(TorchBackend):
    name = "unable"

    def unsupported(self, problem, spec):
        return ["needs a quantum\ncomputer"] if problem.e_dtype == torch.bfloat16 else []


@pytest.fixture
def unable() -> Iterator[str]:
    cce.register_backend("unable", Unable)
    yield "unable"
    cce.unregister_backend("unable")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The options are checked before the demo does anything."""

    def demo(*_: object) -> None:
        raise AssertionError("the demo was started")

    monkeypatch.setattr(run, "demo", demo)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ([], ["COMMAND"]),
        (["demonstrate"], ["demonstrate", "info", "demo"]),
        (["info", "--quick"], ["--quick"]),
        (["demo", "--steps", "0"], ["--steps", "'0'", "at least 1"]),
        (["demo", "--steps", "-5"], ["--steps", "'-5'", "at least 1"]),
        (["demo", "--steps", "many"], ["--steps", "'many'", "whole number"]),
        (["demo", "--steps", "1.5"], ["--steps", "'1.5'", "whole number"]),
        (["demo", "--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["demo", "--seed", str(2**32)], ["--seed", str(2**32), "at most"]),
        (["demo", "--exact", "--filtered"], ["--exact", "--filtered"]),
        (["demo", "--device", "abacus"], ["--device", "'abacus'", "cpu"]),
        (["demo", "--device", "cuda:99"], ["--device", "'cuda:99'", "cpu"]),
        (["demo", "--device", "meta"], ["--device", "'meta'", "cpu"]),
        (["demo", "--device", ""], ["--device", "''", "cpu"]),
        (["demo", "--backend", "abacus"], ["--backend", "'abacus'", "auto", "torch"]),
        (["demo", "--out", "picture.gif"], ["--out", "'picture.gif'", ".png"]),
        (["demo", "--out", "absent/picture.png"], ["--out", "'absent/picture.png'", "written"]),
        (["demo", "--out", "folder.png"], ["--out", "'folder.png'", "written"]),
        (["demo", "--save", "states.txt"], ["--save", "'states.txt'", ".pt", ".npz"]),
        (["demo", "--save", "absent/states.pt"], ["--save", "'absent/states.pt'", "written"]),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_option(argv: list[str], fragments: list[str], fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    line = fails(*argv)
    assert all(fragment in line for fragment in fragments), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png"]


@pytest.mark.usefixtures("untouched")
def test_backend_that_cannot_run(unable: str, fails: Fails) -> None:
    line = fails("demo", "--backend", unable)
    assert "--backend: got 'unable', which cannot run torch.bfloat16 on cpu (needs a quantum computer)" in line
    assert "torch, reference" in line


@pytest.mark.usefixtures("untouched")
def test_missing_package(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "tokenizers" else object())
    line = fails("demo")
    assert "tokenizers" in line and "rich" not in line
    assert "pip install 'cce-kernels[demo]'" in line


def _absent(path: Path) -> None:
    pass


def _pipe(path: Path) -> None:
    import os

    os.mkfifo(path)


def _empty(path: Path) -> None:
    path.touch()


def _short(path: Path) -> None:
    path.write_text("Too short.\n")


def _binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 50)


def _latin_1(path: Path) -> None:
    path.write_bytes("Größe\n".encode("latin-1") * 1000)


def _empty_folder(path: Path) -> None:
    path.mkdir()


def _binary_folder(path: Path) -> None:
    path.mkdir()
    _binary(path / "a")
    _latin_1(path / "b")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_absent, "no such path"),
        (_pipe, "a file or a folder"),
        (_empty, "found 0 tokens"),
        (_short, "tokens in"),
        (_binary, "UTF-8"),
        (_latin_1, "UTF-8"),
        (_empty_folder, "UTF-8"),
        (_binary_folder, "2 other files"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_text(make: Callable[[Path], None], expected: str, fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "text"
    make(path)
    line = fails("demo", "--text", str(path), "--out", str(tmp_path / "out.png"))
    assert "--text" in line and str(path) in line and "expected" in line
    assert expected in line
    assert not (tmp_path / "out.png").exists()


def test_unreadable_text(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "text"
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr("cce.demo.text._read_file", denied)  # root, who runs many CI containers, may read anything
        assert "Permission denied" in fails("demo", "--text", str(path), "--out", str(tmp_path / "out.png"))


def test_too_small_text_says_how_much_is_needed(fails: Fails, text: Path, tmp_path: Path) -> None:
    text.write_text(text.read_text()[:2000])
    line = fails("demo", "--text", str(text), "--out", str(tmp_path / "out.png"))
    assert "found" in line and "expected at least 18,720" in line
