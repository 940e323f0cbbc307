"""The conformance kit on the triton backend, in Triton's interpreter.

The interpreter is chosen when Triton is imported, and for the whole process: so this is one of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT = ["-m", "pytest", "--pyargs", "cce.testing", "--backend", "triton", "-m", "not long", "-p", "no:cacheprovider"]


def test_conformance() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, *KIT], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert found.returncode == 0, found.stdout
    passed = re.search(r"(\d+) passed", found.stdout.splitlines()[-1])
    # The kit skips what a backend refuses: not most of it.
    assert passed is not None and int(passed[1]) > 70, found.stdout
