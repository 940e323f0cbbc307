"""Sections of docs/benchmarks.md from the records of ``bench/gpu.py`` and ``bench/vocab_parallel.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu import SHAPES
from page_parts import best, label, provenance

from cce.benchmarks.record import Row

COMPILED = "torch.compile"
FEW = "256 rows"
#: Records of ``bench/gpu.py``: h100.json, h100-few.json and so on.
PATTERN = "h[0-9]*.json"
#: Rows of a whole step on random data: what may be compared with each other.
COMPARED = ("exact", COMPILED)
KERNELS = """\
Made by `bench/gpu.py`, in bfloat16: random normal data where a row says nothing else, *imposed* live tiles of a filter,
hidden states of a trained model. 256 rows are timed by the wall clock."""
SPLIT = """\
Made by `bench/vocab_parallel.py`: wall clock of the slowest process, forward and backward in bfloat16 on synthetic
data; *dense* keeps its part of the logits in memory. *Alone*: the whole head on one GPU; efficiency: that time over the
number of GPUs times the time together. *Exchange*: the collectives alone; overlap: what of them does not add to the
time that the parts take by themselves. Gaps: relative differences of loss, dE and dC to the result of one GPU."""


def load(pattern: str, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Records by file name, in that order."""
    return [(path, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob(pattern))]


def as_row(row: Row, backend: str) -> Row:
    """A row of ``bench/gpu.py`` as one of ``cce bench``."""
    n, d, v = SHAPES[row["shape"]]
    peer = COMPILED in row["what"]
    few = row["what"].startswith(FEW)
    gradients = 0 if row["what"] == "forward" else 2 * d * ((256 if few else n) + v) / 2**20
    found: Row = {
        "name": "compiled" if peer else backend,
        "mode": (FEW if few else "exact") if peer else row["what"],
        "pass": "forward" if row["what"] == "forward" else "forward+backward",
        "status": "failed" if "failed" in row else "ok",
        "reason": row.get("failed", ""),
        "shape": row["shape"],
        "what": row["what"],
    }
    if peer:
        found["lacks"] = []
    if "ms" in row:
        found |= {"time_ms": row["ms"], "over_gradients_mib": row["mib_over"], "peak_mib": row["mib_over"] + gradients}
        unit = row.get("mm_ms", 0.0)  # the wall clock's rows have none, and no spread
        found |= {"time_low_ms": row.get("mm_low", 0) * unit or row["ms"], "mm": row.get("mm")}
        found |= {"time_high_ms": row.get("mm_high", 0) * unit or row["ms"], "live": row.get("live")}
        found |= {name: row.get(name) for name in ("error_de", "error_dc", "dense_de")}
    return found


def rows(records: list[tuple[Path, dict[str, Any]]]) -> list[Row]:
    """All rows of these records; a row says which backend it is of, those of the first record are Triton's."""
    return [as_row(row, row.get("backend", "triton")) for _, found in records for row in found["rows"]]


def backends_section(records: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Time and memory of the kernels, shape by shape, and who is best."""
    parts = []
    for hardware in dict.fromkeys(found["hardware"] for _, found in records):
        parts += _of_hardware(hardware, [pair for pair in records if pair[1]["hardware"] == hardware])
    return parts


def _of_hardware(hardware: str, records: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    parts = [f"## {hardware}: kernels\n"]
    for path, found in records:
        parts.append(f"- `docs/benchmarks/{path.name}`: {provenance(found)}")
    parts.append(f"\n{KERNELS}\n")
    every = rows(records)
    for shape, (n, d, v) in SHAPES.items():
        of_shape = [row for row in every if row["shape"] == shape]
        if not of_shape:
            continue
        parts += [f"### {shape}, N={n} D={d} V={v}\n"]
        for tokens, chosen in ((n, COMPARED), (256, (FEW, f"{FEW}, {COMPILED}"))):
            compared = [row for row in of_shape if row["what"] in chosen]
            if any("lacks" in row for row in compared):
                parts.append(f"- **Fastest**, exact, N = {tokens}: {best(compared, 'time_ms', 'ms')}")
                parts.append(f"- **Least memory**, exact, N = {tokens}: {best(compared, 'peak_mib', 'MiB')}")
            else:
                parts.append(f"- exact, N = {tokens}: the record has no other implementation to compare with")
        parts += [f"- {label(row)} failed: {row['reason']}" for row in of_shape if row["status"] == "failed"]
        parts += ["", "| | ms | × mm | over the gradients, MiB | live | dE | dC | dense dE |", "|---|" + "--:|" * 7]
        parts += [_line(row) for row in of_shape if "time_ms" in row]
        parts.append("")
    return parts


def _line(row: Row) -> str:
    def show(name: str, form: str) -> str:
        return f"{row[name]:{form}}" if row.get(name) is not None else ""

    cells = [
        label(row),
        show("time_ms", ".4g"),
        show("mm", ".2f"),
        show("over_gradients_mib", ",.1f"),
        show("live", ".0%"),
    ]
    cells += [show(name, ".1e") for name in ("error_de", "error_dc", "dense_de")]
    return "| " + " | ".join(cells) + " |"


def split_section(records: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """A vocabulary split over GPUs, beside the dense loss with sharded logits."""
    parts = []
    for path, found in records:
        parts += [
            f"## A split vocabulary: {found['gpus']} × {found['hardware']}\n",
            f"{provenance(found)}; record `docs/benchmarks/{path.name}`. {SPLIT}\n",
        ]
        for shape in dict.fromkeys(row["shape"] for row in found["rows"]):
            of_shape = [row for row in found["rows"] if row["shape"] == shape]
            n, d, v = (of_shape[0][name] for name in "ndv")
            parts.append(f"### {shape}, N={n} D={d} V={v}, split\n")
            for title, name, unit in (("Fastest", "ms", "ms"), ("Least memory", "peak_mib", "MiB")):
                first, *others = sorted(of_shape, key=lambda row: row[name])
                text = "; ".join(f"{_who(row)} {row[name]:,.4g} {unit}" for row in others)
                parts.append(f"- **{title}**: {_who(first)}, {first[name]:,.4g} {unit}; {text}")
            parts += [
                "",
                "| | ms | peak MiB | sent MiB | alone, ms | alone, peak MiB | efficiency | exchange, ms | overlap "
                "| gap loss | dE | dC |",
            ]
            parts += ["|---|" + "--:|" * 11, *(_split_line(row) for row in of_shape), ""]
    return parts


def _who(row: Row) -> str:
    return f"`{row['backend']}` {row['mode']}" if row["backend"] != "dense" else f"dense, {row['mode']}"


def _split_line(row: Row) -> str:
    forms = {
        "ms": ".4g", "peak_mib": ",.0f", "sent_mib": ".0f", "alone_ms": ".4g", "alone_peak_mib": ",.0f",
        "efficiency": ".0%", "exchange_ms": ".2f", "overlap": ".0%",
        "gap_loss": ".1e", "gap_de": ".1e", "gap_dc": ".1e",
    }  # fmt: skip
    cells = [f"{row[name]:{form}}" if row.get(name) is not None else "" for name, form in forms.items()]
    return "| " + " | ".join([_who(row), *cells]) + " |"


def memory_rows(records: list[tuple[Path, dict[str, Any]]]) -> list[Row]:
    """Exact steps of the first shape, ours and the dense one, for the home page's picture; [] without a dense one."""
    shape, (n, d, v) = next(iter(SHAPES.items()))
    found = [row for row in rows(records) if row["shape"] == shape and row["what"] in COMPARED and "peak_mib" in row]
    if not any(row["what"] == COMPILED for row in found):
        return []
    base = {"n": n, "d": d, "v": v, "data": "random", "dtype": "bfloat16", "study": "heads", "kind": "time"}
    return list({row["name"]: {**row, **base} for row in found}.values())
