"""Sweeps and trained states on the benchmarks' page: every figure from the record, who is missing said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import page
import page_data
import page_studies
import pytest
import torch

from cce.benchmarks import plots, record, studies, timing
from cce.benchmarks.record import Record
from cce.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocabulary": (300, 700), "tokens": (8, 24), "width": (8, 16)}


@pytest.fixture(scope="module")
def tiny_sweeps():
    """Sweeps over two small sizes, and one threshold, instead of those of a CPU."""
    small = {"n": 16, "d": 8, "v": 500}
    with pytest.MonkeyPatch.context() as patch:
        for name, (fixed, _) in studies.SCALING["cpu"].items():
            sizes = {axis: size for axis, size in small.items() if getattr(fixed, axis)}
            patch.setitem(studies.SCALING["cpu"], name, (replace(fixed, **sizes), SIZES[name]))
        patch.setattr(studies, "QUICK_POWERS", (13,))
        patch.setattr(timing, "_CPU_CACHE", 2**12)  # no cache to be emptied a thousand times
        yield


@pytest.fixture(scope="module")
def written(tiny_sweeps: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of all studies, on synthetic data and two trained states, with its pictures."""
    folder = tmp_path_factory.mktemp("studies")
    rng = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        e, c = (torch.randn(size, 8, generator=rng) for size in (16, 400))
        counts = torch.arange(400, 0, -1)
        facts = {"parameters": 2_000_000, "width": 8, "layers": 3, "steps": 5, "steps_planned": 9, "training_s": 77.0}
        facts |= {"held_out_loss": 3.25} | ({"held_out_loss_before": 4.5} if name == "tuned" else {})
        kept = {"e": e, "c": c, "targets": torch.arange(16), "unigram_counts": counts, "facts": facts}
        torch.save(kept, folder / f"{name}.pt")
    argv = [
        "--device",
        "cpu",
        "--shapes",
        "24x16x700",
        "--rounds",
        "2",
        "--backends",
        "torch",
        "--modes",
        "exact",
        "filtered",
        "--peers",
        "eager",
    ]
    argv += ["--studies", "heads", *SIZES, "filter", "--trained", str(folder / "base.pt"), str(folder / "tuned.pt")]
    assert main(["bench", *argv, "--commit", "abc", "--quick", "--out", str(folder / "scaling.jsonl")]) == 0
    return folder / "scaling.jsonl"


def test_a_section_has_every_study(written: Path) -> None:
    found = record.read(written)
    text = "\n".join(page.section(written, found))
    assert text.startswith("## x86_64, 1 threads: heads of models, synthetic and trained data; scaling; the filter\n")
    images = re.findall(r"\(assets/([\w.-]+)\)", text)
    assert sorted(images) == sorted(path.name for path in written.parent.glob("*.svg"))
    assert len(images) == 3 + 3 + 3, "heads and filter of three data, three sweeps"
    for study, (title, axis) in page_studies.SWEEPS.items():
        part = text.split(f"### {title}\n")[1].split("\n### ")[0]
        for size in SIZES[study]:
            (line,) = (line for line in part.splitlines() if line.startswith(f"| {size} | "))
            rows = [row for row in found.of(study) if row[axis] == size and "time_ms" in row and row["name"] != "mm"]
            fastest = min(rows, key=lambda row: row["time_ms"])
            assert f"{fastest['time_ms']:,.4g} ms" in line.split(" | ")[1] and len(rows) == 3
            assert f"{min(row['peak_mib'] for row in rows):,.4g} MiB" in line.split(" | ")[2]
    for data in ("synthetic", "trained-base", "trained-tuned"):
        part = text.split(f"### The filter: given, N=24 D=16 V=700, {data} data, float32\n")[1].split("\n### ")[0]
        (statistics,) = (row for row in found.of("filter") if row["data"] == data and row["kind"] == "data")
        assert part.startswith(f"\nentropy {statistics['entropy']:.2f} nats")
        for row in found.of("filter"):
            if row["data"] == data and "filter_de" in row:
                assert f"| {row['mode']} | {row['live']:.0%} | {row['error_de']:.1e} | " in part


def test_trained_states_stand_beside_synthetic_data(written: Path) -> None:
    found = record.read(written)
    found.facts.pop("threads")  # as of a GPU
    text = "\n".join(page_data.section([(written, found)]))
    assert "| trained-base | 2.0 | 8, 3 | 5 of 9, ended by time | 77 | 3.250 |  |" in text
    assert "| trained-tuned | 2.0 | 8, 3 | 5 of 9, ended by time | 77 | 3.250 | 4.500 |" in text
    for row in found.of("heads"):
        if row["kind"] == "data":
            assert f"| {row['data']} | {row['entropy']:.2f} | {row['nll']:.2f} | {row['hits']:.0f} | " in text
        elif row["mode"] == "filtered" and row["pass"] == plots.STEP:
            line = f"| {row['data']} | `torch` filtered | {row['live']:.0%} | {row['time_ms']:.4g} | {row['mm']:.2f} | "
            assert line in text and f" | {row['error_de']:.1e} | {row['error_dc']:.1e} | " in text
    assert text.count("`torch` filtered") == 3
    assert page_data.section([(written, Record({**found.facts, "trained": {}}, found.rows))]) == []


def test_who_has_no_time_in_a_sweep_is_said_once() -> None:
    def row(n: int, status: str, **more: Any) -> dict[str, Any]:
        return {"name": "torch", "mode": "filtered", "pass": plots.STEP, "n": n, "status": status, **more}

    rows = [
        row(256, "ok"),
        row(4096, "failed", reason="no | memory"),
        row(8192, "skipped", reason="slow"),
        row(16_384, "skipped", reason="slower"),
    ]
    assert page_studies.without_time(rows, "n") == [
        "`torch` filtered failed at N = 4,096 (no / memory)",
        "`torch` filtered skipped at N = 8,192 (slow), 16,384",
    ]
