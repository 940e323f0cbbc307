"""Tuning from end to end in Triton's interpreter, with a timer that tells fairy tales: no GPU is there to time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("tune_a_problem.py")


def run(what: str, folder: Path | str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CCE_TUNE_CACHE": str(folder)}
    warnings = ["-W", "error", "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    done = subprocess.run(
        [sys.executable, *warnings, SCRIPT, what],
        cwd=SCRIPT.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_later_process_uses_what_was_tuned(tmp_path: Path) -> None:
    tuned = run("tune", tmp_path)
    for name, kernels in (("exact", {"forward", "dense"}), ("filtered", {"forward", "sparse", "dc"})):
        rows = [row for row in tuned[name] if "chosen" in row[2]]
        assert {kernel for kernel, _, _ in rows} == kernels
        assert all(" x 32 x " in tile for _, tile, _ in rows), rows
        notes = [note for kernel, _, note in tuned[name] if kernel == "forward"]
        assert "RuntimeError: out of resource" in notes
        assert sum("lse differs by" in note for note in notes) == 1
    # The exact backward counts the rows in use: it has a key of its own.
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.iterdir())) == 3

    used, shipped = run("use", tmp_path), run("use", "off")
    for name in used:
        assert used[name]["columns"]
        for before, after in zip(shipped[name]["columns"], used[name]["columns"], strict=True):
            assert set(before.values()) == {64} and set(after.values()) == {32}, name
        for errors in (used[name]["errors"], shipped[name]["errors"]):
            assert max(errors) < 2e-6, (name, errors)
        assert "tuned for this problem" in used[name]["note"]
        assert "shipped, not measured" in shipped[name]["note"]  # float32
        assert used[name]["errors"] != shipped[name]["errors"]  # it did run another way
