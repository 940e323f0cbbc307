"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cce.cli import main
from cce.demo.config import Size

TINY = Size(
    text_bytes=30_000, vocab=400, width=16, layers=1, heads=2, context=8, batch=2, held_out=8, measured=48, repeats=1
)

SENTENCE = "Tile {n} holds {m} logits; the filter skips what weighs less than one part in {k}.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, on every platform."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("cce.demo.tokens.cache_folder", lambda: folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small text file."""
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCE.format(n=n, m=n * n % 97, k=2 ** (n % 13)) for n in range(300)))
    return path


@pytest.fixture
def tiny() -> Size:
    return TINY


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must end with exit code 2 and one line on stderr, and returns that line."""

    def run(*argv: str) -> str:
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse's way to end
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return run
