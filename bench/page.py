"""Writes docs/benchmarks.md, and its pictures, from the records in docs/benchmarks: ``python bench/page.py``.

A test compares the page with the records, so that no figure on it is typed by hand.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import page_data
import page_gpu
import page_studies
from page_parts import STEP, best, label, missing, provenance, step

from cce.benchmarks import plots, record, table
from cce.benchmarks.record import Record, Row

DOCS = Path(__file__).parents[1] / "docs"
RECORDS, PAGE, PICTURES = DOCS / "benchmarks", DOCS / "benchmarks.md", DOCS / "assets"

HEAD = """\
<!-- Written by: python bench/page.py -->
# Benchmarks

What `cce bench` and `bench/curves.py` measured, also where other implementations are better. The page is written from
the records in `docs/benchmarks/`, and a test compares the two. How the figures are taken, what they mean and how to
take them again: [Reproducibility](reproducibility.md). What was tried, and goals that are missed:
[Performance notes](performance-notes.md).

A time stands here only if the case is right: its errors are within the bounds of the conformance kit. `mm` is one
`e @ c.T` of the matrix library in the same round; *peak* is memory over the inputs and *over* what of it is not the two
gradients; errors are relative, against float64; *live* is the share of the logits' gradient that is computed. Who is
fastest and who uses least memory is asked among those that leave no gradients out: `uncompensated`, and the default
filter of `cut-cross-entropy`, are in the tables with their errors.
"""


def main() -> None:
    """Writes page and pictures."""
    found = records()
    for path, each in found:
        plots.draw(each, PICTURES, path.stem)
    plots.memory(memory_record(found), PICTURES / "memory.svg")
    PAGE.write_text(page(found, curves()), "utf-8")


def records() -> list[tuple[Path, Record]]:
    """Those of ``cce bench``; of GPUs first."""
    found = [(path, record.read(path)) for path in sorted(RECORDS.glob("*.jsonl"))]
    return sorted(found, key=lambda pair: ("threads" in pair[1].facts, not pair[1].of("heads")))


def curves() -> list[tuple[Path, dict[str, Any]]]:
    """Those of ``bench/curves.py``."""
    return [(path, json.loads(path.read_text("utf-8"))) for path in sorted(RECORDS.glob("curves-*.json"))]


def memory_record(found: list[tuple[Path, Record]]) -> Record:
    """For the home page's picture: a GPU's that has the dense loss, too, or else the first one of ``cce bench``."""
    known = [each for _, each in found if any("peak_mib" in row for row in each.of("heads"))]
    of_gpu = Record({}, page_gpu.memory_rows(page_gpu.load(page_gpu.PATTERN, RECORDS)))
    if of_gpu.rows and not any("threads" not in each.facts for each in known):
        return of_gpu
    return known[0]


def page(found: list[tuple[Path, Record]], studies: list[tuple[Path, dict[str, Any]]]) -> str:
    """The whole page."""
    parts, of_cpu = [HEAD], list[str]()
    for path, each in found:
        (of_cpu if "threads" in each.facts else parts).extend(section(path, each))
    parts += page_data.section(found)
    parts += page_gpu.backends_section(page_gpu.load(page_gpu.PATTERN, RECORDS))
    parts += page_gpu.split_section(page_gpu.load("vocab-parallel*.json", RECORDS))
    parts += of_cpu
    for path, study in studies:
        parts += convergence(path, study)
    return "\n".join(parts).rstrip() + "\n"


def section(path: Path, found: Record) -> list[str]:
    """All heads and sweeps of a record."""
    facts = found.facts
    name = f"{facts['hardware']}, {facts['threads']} threads" if "threads" in facts else facts["hardware"]
    parts = [f"## {name}: {contents(found)}\n", f"{provenance(facts)}; record `docs/benchmarks/{path.name}`.\n"]
    everywhere = missing(found.of("heads"), only=("refused", "absent"))
    parts += [f"- {line}" for line in everywhere] + [""] * bool(everywhere)
    for _, group in groupby(found.of("heads"), key=table.head_of):
        parts += head(list(group))
    names = sorted(name for name, _ in plots.pictures(found))
    for name in names:
        if name.startswith("heads-"):
            title = f"Time and memory of forward and backward, {name.removeprefix('heads-')} data"
            parts.append(f"![{title}]({image(path, name)})\n")
    for study in page_studies.SWEEPS:
        if study in names:
            parts += page_studies.sweep(found, study, image(path, study))
    for name in names:
        if name.startswith("filter-"):
            parts += page_studies.threshold(found, name.removeprefix("filter-"), image(path, name))
    return parts


def contents(found: Record) -> str:
    """What a record is of, for a heading."""
    data = dict.fromkeys(row["data"].split("-")[0] for row in found.of("heads"))
    parts = [f"heads of models, {' and '.join(data)} data"] if data else []
    parts += ["scaling"] * any(found.of(study) for study in page_studies.SWEEPS)
    return "; ".join([*parts, *["the filter"] * bool(found.of("filter"))])


def image(path: Path, name: str) -> str:
    return f"assets/{path.stem}-{name}.svg"


def head(rows: list[Row]) -> list[str]:
    """A head: its data, who is best, and the table."""
    data, timed = rows[0], [row for row in rows if row["kind"] == "time"]
    parts = [f"### {table.title(data)}\n", f"{table.data_line(data)}\n"]
    if not timed:
        return [*parts, "Not measured: the run ended before.\n"]
    steps, whose = [row for row in timed if row["pass"] == STEP], ""
    if data["data"] == "random":  # nearly all is skipped there, as it is in no model
        steps, whose = [row for row in steps if row["mode"] in ("", "exact")], "without a filter, "
    parts += [f"- **Fastest**: {whose}{best(steps, 'time_ms', 'ms')}"]
    parts += [f"- **Least memory**: {whose}{best(steps, 'peak_mib', 'MiB')}"]
    parts += [f"- {line}" for line in missing(timed, only=("failed", "wrong", "skipped"))] + [""]
    parts += ["| | ms | × mm | roofline | peak MiB | over | loss | dE | dC | live |", "|---|" + "--:|" * 9]
    for row in timed:
        if "peak_mib" in row or "time_ms" in row:
            ms, spread, *others = table.figures(row)
            ms = f"{ms} {spread if spread == 'once' else f'± {float(spread[:-1]) / 2:.0f} %'}" if ms else "–"
            parts.append("| " + " | ".join([f"{label(row)}, {step(row)}", ms, *others]) + " |")
    return [*parts, ""]


def convergence(path: Path, study: dict[str, Any]) -> list[str]:
    """What ``bench/curves.py`` found."""
    steps = ", ".join(f"{count} steps of {phase}" for phase, count in study["steps"].items())
    parts = [
        f"## Convergence, {study['hardware']}\n",
        f"{provenance(study)}; record `docs/benchmarks/{path.name}`. The demo's model, {study['seeds']} seeds, "
        f"{steps}, {study['tokens_a_step']} tokens a step. *Gap*: held-out loss less that of the dense run of the same "
        "seed, mean over the seeds and its 95 % interval; *seeds*: the held-out loss's standard deviation between "
        "seeds.\n",
        f"![Loss curves and their differences](assets/{path.stem}.svg)\n",
        "| | held-out loss | gap | seeds | largest gap of the curves | live |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in study["rows"]:
        gap = "" if row["loss"] == "dense" else f"{row['held_out_gap']:+.4f} ± {row['held_out_gap_95']:.4f}"
        parts.append(
            f"| {row['phase']}, {row['loss']} | {row['held_out']:.4f} | {gap} | {row['held_out_seeds']:.4f} | "
            f"{row['largest_gap']:.1e} | {row['live_fraction']:.0%} |"
        )
    return [*parts, ""]


if __name__ == "__main__":
    main()
