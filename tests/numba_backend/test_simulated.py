"""The numba backend's kernels in Numba's simulator: the contract's cases, and every option that a kernel hears of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT, PARTS = Path(__file__).with_name("simulate.py"), 4


@pytest.mark.parametrize("part", range(PARTS))
def test_in_the_simulator(part: int) -> None:
    assert passed(part, PARTS) > 15


def test_smoke() -> None:
    """A few that launch every kernel, for the quick tests; the parts leave them out."""
    assert passed("smoke") == 5


def passed(*part: object) -> int:
    """How many, if none fails."""
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, part)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert found.returncode == 0, found.stdout
    assert not [line for line in lines if ": FAILED" in line], "\n".join(line for line in lines if "FAILED" in line)
    return sum(": passed" in line for line in lines)
