"""docs/benchmarks.md is what the records say, and tells who is best also where it is not us."""

from __future__ import annotations

import re
from typing import Any

import page
import page_gpu
import page_parts
import pytest

from cce.benchmarks import table

STEP = page_parts.STEP


def row(name: str, ms: float | None, mib: float, mode: str = "", **more: Any) -> dict[str, Any]:
    found = {"name": name, "mode": mode, "pass": STEP, "kind": "time", "status": "ok", "peak_mib": mib, **more}
    if ms is not None:
        found |= {"time_ms": ms, "time_low_ms": 0.95 * ms, "time_high_ms": 1.05 * ms}
    return found


def test_the_page_is_up_to_date() -> None:
    assert page.PAGE.read_text("utf-8") == page.page(page.records(), page.curves()), "run: python bench/page.py"


def test_pictures_are_there() -> None:
    names = re.findall(r"\(assets/([\w.-]+)\)", page.PAGE.read_text("utf-8"))
    assert names and all((page.PICTURES / name).is_file() for name in names)
    assert (page.PICTURES / "memory.svg").is_file()


def test_records_have_device_versions_and_commit() -> None:
    for path, found in page.records():
        facts = found.facts
        assert facts["hardware"] and facts["versions"]["torch"] and facts["date"], path
        assert re.fullmatch(r"[0-9a-f]{7,}", facts["commit"]), f"{path}: a record of a commit, without changes"


def test_every_head_says_who_is_best() -> None:
    parts = page.PAGE.read_text("utf-8").split("\n### ")
    heads = [row for _, found in page.records() for row in found.of("heads") if row.get("name") == "mm"]
    assert heads
    for row in heads:
        (part,) = (part for part in parts if part.startswith(table.title(row)))
        assert "- **Fastest**: " in part and "- **Least memory**: " in part, table.title(row)


def test_a_peer_that_is_best() -> None:
    rows = [
        row("triton", 10.0, 5, "exact"),
        row("compiled", 8.0, 50, lacks=[]),
        row("eager", 8.1, 90, lacks=[]),
        row("triton", 1.0, 2, "uncompensated"),
        row("cut-cross-entropy", 1.0, 2, lacks=[]),
        row("wrong", None, 1, "exact", status="wrong", reason="dE errs"),
    ]
    fastest = page_parts.best(rows, "time_ms", "ms")
    assert fastest == "compiled, 8 ms; not clearly slower: eager; the best of cce: `triton` exact, 10 ms (1.25 ×)"
    assert (
        page_parts.best(rows, "peak_mib", "MiB")
        == "`triton` exact, 5 MiB; the best of the others: compiled, 50 MiB (10.00 ×)"
    )
    assert page_parts.best([], "peak_mib", "MiB") == "nobody could be measured"
    once = [{**rows[0], "rounds": 1}]
    assert page_parts.best(once, "time_ms", "ms") == "no time was taken more than once"
    assert page_parts.best([*once, rows[1]], "time_ms", "ms") == "compiled, 8 ms"


@pytest.mark.parametrize("data", ["random", "trained-base"])
def test_a_filter_is_not_praised_for_random_data(data: str) -> None:
    base = {"shape": "x", "n": 1, "d": 2, "v": 3, "data": data, "dtype": "bfloat16"}
    statistics = {"kind": "data", "status": "failed", "reason": "none"}
    rows = [row("triton", 10.0, 5, "exact"), row("triton", 1.0, 6, "filtered"), row("compiled", 8.0, 50, lacks=[])]
    text = "\n".join(page.head([{**base, **x} for x in (statistics, *rows)]))
    fastest = "without a filter, compiled, 8 ms" if data == "random" else "`triton` filtered, 1 ms"
    assert f"- **Fastest**: {fastest}" in text and "| `triton` filtered, step | 1 " in text


@pytest.mark.parametrize("status", ["absent", "failed", "refused", "wrong"])
def test_who_is_missing_is_said(status: str) -> None:
    rows = [row("liger", None, 1, status=status, reason="why | not")]
    assert page_parts.missing(rows, only=(status,)) == [f"liger {status}: why / not"]
    assert page_parts.missing(rows, only=("other",)) == []


def test_convergence_section() -> None:
    study = {
        "hardware": "x", "python": "3", "versions": {"torch": "2"}, "date": "d", "commit": "abc", "seeds": 3,
        "steps": {"pre-training": 4}, "tokens_a_step": 8,
        "rows": [{"phase": "pre-training", "loss": "filtered", "held_out": 2.0, "held_out_gap": -0.001,
                  "held_out_gap_95": 0.002, "held_out_seeds": 0.01, "largest_gap": 0.1, "live_fraction": 0.25}],
    }  # fmt: skip
    text = "\n".join(page.convergence(page.RECORDS / "curves-x.json", study))
    assert "| pre-training, filtered | 2.0000 | -0.0010 ± 0.0020 | 0.0100 | 1.0e-01 | 25% |" in text
    assert "assets/curves-x.svg" in text


def test_a_row_of_a_gpus_record() -> None:
    """Peak memory is what the record has over the gradients, and the gradients."""
    kept = {"ms": 4.0, "mm": 2.0, "mm_low": 1.9, "mm_high": 2.2, "mm_ms": 2.0, "mib_over": 100.0}
    mine = page_gpu.as_row({"shape": "gemma2", "what": "exact", **kept}, "cupy")
    theirs = page_gpu.as_row({"shape": "gemma2", "what": "torch.compile", **kept, "ms": 3.0}, "cupy")
    gradients = 2 * 2304 * (8192 + 256_000) / 2**20
    assert mine["peak_mib"] == pytest.approx(100 + gradients) and mine["time_high_ms"] == pytest.approx(4.4)
    expected = "compiled, 3 ms; not clearly slower: `cupy` exact; the best of cce: `cupy` exact, 4 ms (1.33 ×)"
    assert page_parts.best([mine, theirs], "time_ms", "ms") == expected
    few = page_gpu.as_row({"shape": "gemma2", "what": "256 rows", "ms": 1.0, "mib_over": 0.0}, "triton")
    assert few["peak_mib"] == pytest.approx(2 * 2304 * (256 + 256_000) / 2**20)
    failed = page_gpu.as_row({"shape": "qwen", "what": "few_rows", "failed": "no memory"}, "triton")
    assert failed["status"] == "failed" and "time_ms" not in failed


def test_every_gpu_record_is_on_the_page() -> None:
    text = page.PAGE.read_text("utf-8")
    names = [path.name for pattern in (page_gpu.PATTERN, "vocab-parallel*.json") for path in page.RECORDS.glob(pattern)]
    assert names and all(f"`docs/benchmarks/{name}`" in text for name in names)
