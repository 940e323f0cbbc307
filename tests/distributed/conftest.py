"""The ranks that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

sys.path.append(str(Path(__file__).parent))

from harness import Workers  # found through the line above

if sys.platform == "win32" or not distributed.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four processes in a Gloo group; they start with the first test that asks."""
    found = Workers(4)
    yield found
    found.stop()
