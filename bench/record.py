"""The JSON records in ``docs/benchmarks/``: what was measured, on what, with which versions and commit."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from cce.testing.report import environment


def write(path: Path, device: str, commit: str | None = None, **content: Any) -> None:
    """Writes ``content`` with the facts about this run; the commit is the checkout's if none is given."""
    facts = {"date": datetime.date.today().isoformat(), "commit": commit or checkout()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(device), **facts, **content}, indent=1) + "\n")


def checkout() -> str:
    """The commit of the folder the program runs in; empty outside a repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip()
