"""The tests of ``interpreted/``, in a process of their own: the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("interpreted")


def test_results() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER],
        cwd=FOLDER.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    passed = re.search(r"(\d+) passed", found.stdout.splitlines()[-1])
    assert passed is not None and int(passed[1]) > 200, found.stdout
