"""Pictures and tables are made from rows alone, whatever some of them lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cce.benchmarks import plots, table
from cce.benchmarks.record import Record

STEP = plots.STEP


def row(
    study: str, name: str, ms: float | None, mib: float, mode: str = "", v: int = 1000, **more: Any
) -> dict[str, Any]:
    base = {
        "study": study,
        "shape": "x",
        "n": 4,
        "d": 8,
        "v": v,
        "data": "synthetic",
        "dtype": "float32",
        "kind": "time",
    }
    found = {**base, "name": name, "mode": mode, "pass": STEP, "status": "ok", "peak_mib": mib, **more}
    found["over_gradients_mib"] = mib - 1
    if ms is not None:
        found |= {"time_ms": ms, "time_low_ms": ms, "time_high_ms": ms, "mm": 1.0, "roofline": 0.5, "rounds": 1}
    return found


@pytest.fixture
def found() -> Record:
    wrong = row("heads", "mine", None, 3, "exact", status="wrong", reason="dE errs by [a lot]")
    rows = [row("heads", "torch", 2.0, 4, "exact"), row("heads", "eager", 1.0, 9), wrong]
    rows += [row("vocabulary", "torch", v / 9, v / 7, mode, v) for v in (10, 100) for mode in ("exact", "filtered")]
    rows += [row("width", "eager", None, 3, status="failed", reason="no memory")]
    return Record({}, rows)


def test_pictures(found: Record, tmp_path: Path) -> None:
    paths = plots.draw(found, tmp_path, "r")
    assert [path.name for path in paths] == ["r-heads-synthetic.svg", "r-vocabulary.svg"], "nothing of what has no time"
    heads, scaling = (path.read_text() for path in paths)
    assert "mine exact" in heads and "9 MiB" in heads, "memory is shown of what is wrong, too"
    assert "torch filtered" in scaling and "N = 4, D = 8" in scaling


def test_memory_picture_shows_the_largest_head(found: Record, tmp_path: Path) -> None:
    found.rows.extend([row("heads", "eager", 1.0, 77, v=5000), row("heads", "torch", 1.0, 5, "uncompensated", 5000)])
    plots.memory(found, tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    assert "77 MiB" in text and "V=5000" in text and "uncompensated" not in text and "9 MiB" not in text


def test_table_tells_reasons_as_they_are(found: Record) -> None:
    console = Console(record=True, width=table.width(found.rows))
    table.show(found, console)
    text = console.export_text()
    assert "mine wrong: dE errs by [a lot]" in text and "eager failed: no memory" in text
    assert "torch, filtered, step" in text and "…" not in text
