"""The conformance kit on the triton backend, and the tests of ``interpreted/``, in Triton's interpreter.

The interpreter is chosen when Triton is imported, and for the whole process: so these are processes of their own, each
for a part of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fast_interpreter import SMOKE

HERE, PARTS = Path(__file__).parent, 4
TESTS = [
    "--pyargs", "cce.testing", str(HERE / "interpreted"), "--backend", "triton", "-m", "not long",
    "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
]  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
def test_in_the_interpreter(part: int) -> None:
    assert passed(f"{part}/{PARTS}") > 60  # the kit skips what a backend refuses: few of them


def test_smoke() -> None:
    """A few that launch nearly every kernel, for the quick tests; the parts leave them out."""
    assert passed("smoke") == len(SMOKE)


def passed(part: str) -> int:
    """How many, if none fails."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fast_interpreter", "--part", part, *TESTS],
        cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    count = re.search(r"(\d+) passed", found.stdout.splitlines()[-1])
    assert count is not None, found.stdout
    return int(count[1])
