"""The convergence study runs anywhere; its losses start alike, and what is left out makes them differ."""

from __future__ import annotations

import json
from pathlib import Path

import curves
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_whole_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "WINDOW", 5)
    for name, word in (("a", "tile"), ("b", "gradient")):
        lines = (f"{word} {n} of {n * n % 89} is {n % 7}\n" for n in range(1500))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    out, plot = tmp_path / "x.json", tmp_path / "x.svg"
    sizes = "--steps 15 --tune-steps 7 --seeds 2 --batch 2 --vocab 300 --width 16 --device cpu"
    texts = ["--text", str(tmp_path / "a.txt"), "--tune-text", str(tmp_path / "b.txt")]
    curves.main([*sizes.split(), *texts, "--out", str(out), "--plot", str(plot), "--commit", "abc"])
    found = json.loads(out.read_text())
    rows = {(row["phase"], row["loss"]): row for row in found["rows"]}
    assert len(rows) == 8 and len(found["held_out"]) == 16 and found["commit"] == "abc"
    for phase in curves.PHASES:
        assert rows[phase, "dense"]["largest_gap"] == 0
        assert 0 < rows[phase, "exact"]["largest_gap"] < 1e-3
        assert rows[phase, "dense"]["held_out_seeds"] > 0
    first, last = (np.mean(found["curves"][curves.PHASES[0]]["dense"], 0)[i] for i in (0, -1))
    assert last < first
    tuned = found["curves"][curves.PHASES[1]]["dense"]
    assert np.shape(tuned) == (2, 1)
    assert b"</svg>" in plot.read_bytes()


def test_band_is_students() -> None:
    mean, half = curves.band(np.array([[1.0], [2.0], [3.0]]))
    assert mean[0] == 2 and half[0] == pytest.approx(4.303 / 3**0.5)


def test_smoothed_drops_what_does_not_fill_a_window() -> None:
    found = curves.smoothed([list(range(2 * curves.WINDOW + 3))])
    assert found.tolist() == [[(curves.WINDOW - 1) / 2, curves.WINDOW + (curves.WINDOW - 1) / 2]]
