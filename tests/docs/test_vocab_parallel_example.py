"""docs/examples/vocab_parallel.py runs under torchrun, and its losses do not depend on the number of processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

EXAMPLE = Path(__file__).parents[2] / "docs/examples/vocab_parallel.py"
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")


def losses(processes: int) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), EXAMPLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return re.findall(r"loss (\d+\.\d+)", found.stdout)


def test_the_number_of_processes_does_not_matter() -> None:
    one, two = losses(1), losses(2)
    assert one == two and len(one) == 5
    assert float(one[-1]) < 0.9 * float(one[0])
