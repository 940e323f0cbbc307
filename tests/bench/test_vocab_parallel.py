"""The benchmark of a split head runs anywhere, and finds what one process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

SCRIPT = Path(__file__).parents[2] / "bench/vocab_parallel.py"
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")


def test_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--device", "cpu", "--backends", "torch", "--size", "64", "32", "60001", "--rounds", "1", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run([*launch, SCRIPT, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    record = json.loads(out.read_text())
    assert record["gpus"] == 2
    rows = {(row["backend"], row["mode"]): row for row in record["rows"]}
    assert set(rows) == {("torch", "exact"), ("torch", "filtered"), ("dense", "logits sharded")}
    exact, filtered = rows["torch", "exact"], rows["torch", "filtered"]
    assert max(exact["gap_loss"], exact["gap_de"], exact["gap_dc"]) < 1e-5
    assert filtered["gap_loss"] < 1e-6 and 1e-5 < filtered["gap_de"] < 0.05  # other tiles are live
    assert all(row["ms"] > 0 and row["sent_mib"] > 0 for row in rows.values())
    assert all(row["parts_ms"] > 0 and row["exchange_ms"] > 0 and 0 <= row["overlap"] <= 1 for row in (exact, filtered))
