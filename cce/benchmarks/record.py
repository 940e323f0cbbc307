"""Records of measurements: the results, with the hardware, versions and commit.

``python -m cce bench`` writes JSON lines: first the facts about the run, then one line per row as it is measured, so
that an interrupted run keeps its results. The scripts in ``bench/`` write one JSON object.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cce.benchmarks.peers import PEERS
from cce.testing.report import environment

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """Results of one run: ``facts`` about it, and its rows."""

    facts: Row
    rows: list[Row]

    def of(self, study: str) -> list[Row]:
        """Rows of a study."""
        return [row for row in self.rows if row["study"] == study]


def read(path: Path) -> Record:
    """Read a record written by ``python -m cce bench --out``.

    Raises:
        ValueError: the file is not such a record.
    """
    try:
        facts, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not isinstance(facts, dict) or facts.get("record") != "cce bench":
            raise ValueError("its first line has no facts about a run")
    except ValueError as error:  # json's errors are ValueErrors, too
        raise ValueError(f"got {str(path)!r}, expected JSON lines written by cce bench --out ({error})") from error
    return Record(facts, rows)


def line(row: Row) -> str:
    """Format a row as a line."""
    return json.dumps(rounded(row)) + "\n"


def rounded(row: Row) -> Row:
    """Round the numbers of a row to five digits, more than any measurement has."""
    return {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in row.items()}


def facts(device: str, commit: str | None = None, **more: Any) -> Row:
    """Facts about a run: device, versions, date and commit (default: that of the checkout)."""
    packages = {peer.package: peer.version for peer in PEERS.values() if peer.package and not peer.absent()}
    found = environment(device)
    found["versions"] |= packages
    if device == "cuda":
        found["versions"]["cuda"] = torch.version.cuda
    threads = {"threads": torch.get_num_threads(), "cores": os.cpu_count()} if device == "cpu" else {}
    when = {"date": datetime.date.today().isoformat(), "commit": commit or checkout()}
    return {**found, **threads, **when, **more}


def write(path: Path, device: str, commit: str | None = None, **content: Any) -> None:
    """Write ``content`` with the facts about this run as one JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts(device, commit, **content), indent=1) + "\n")


def checkout() -> str:
    """Commit of the folder the program runs in; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
