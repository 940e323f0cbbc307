"""Heads small enough for every test of the benchmarks."""

from __future__ import annotations

import pytest

from cce.benchmarks import heads
from cce.benchmarks.heads import Head

N, D, V = 150, 32, 6000  # ragged: tiles of 128 rows and of 128 entries are cut off


@pytest.fixture(scope="session")
def small() -> Head:
    return heads.synthetic(N, D, V, entropy=1.0)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tensors of a few numbers."""


@pytest.fixture
def half(small: Head) -> Head:
    return Head("half", small.e.bfloat16(), small.c.bfloat16(), small.targets)
