"""Fixtures of the front end's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cce import files

sys.path.append(str(Path(__file__).parent))  # where tests of all folders find meter.py


#: Files of minutes, of which two processes get one each before the many of seconds: else one would be left alone with
#: them at the end.
LONG = ("test_interpreted.py", "test_simulated.py", "test_compile.py", "test_sm90.py", "test_sharded_models.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def nothing_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache warns once a process; in a test of its warnings, once a test."""
    monkeypatch.setattr(files, "_warned", set())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers: two threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
