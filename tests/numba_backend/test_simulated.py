"""The numba backend's kernels in Numba's simulator: the contract's cases, and every option of the interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = 2


def test_in_the_simulator() -> None:
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("simulate.py")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(part), str(PARTS)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for part in range(PARTS)
    ]  # fmt: skip
    texts = [process.communicate()[0] for process in running]
    lines = [line for text in texts for line in text.splitlines()]
    assert all(process.returncode == 0 for process in running), "\n".join(lines)
    assert not [line for line in lines if ": FAILED" in line], "\n".join(line for line in lines if "FAILED" in line)
    assert sum(": passed" in line for line in lines) > 60, "\n".join(lines)
