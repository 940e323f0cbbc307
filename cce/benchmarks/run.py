"""A whole run of ``cce bench``: progress, record, tables, pictures."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cce.benchmarks import extend, plots, record, studies, table
from cce.benchmarks.record import Record, Row


def measure(options: studies.Options, out: Path | None, commit: str | None, console: Console | None = None) -> Record:
    """Measure everything chosen, and write rows to ``out`` as they are measured."""
    start = time.perf_counter()
    facts = record.facts(options.device.type, commit)
    facts = {"record": "cce bench", **facts, "options": _shown(options)}
    if options.trained:
        facts["trained"] = {name: extend.facts(path) for name, path in options.trained.items()}
    rows: list[Row] = []
    total = sum(1 for _ in studies.jobs(options))
    columns = (
        TextColumn("{task.fields[head]}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
    )  # fmt: skip
    with ExitStack() as stack:
        lines = stack.enter_context(out.open("w", encoding="utf-8")) if out else None
        progress = stack.enter_context(Progress(*columns, console=console or Console(), transient=True))
        task = progress.add_task("", total=total, head="", doing="")
        if lines:
            lines.write(record.line(facts))
        done = -1
        for found in studies.run(options):
            if isinstance(found, str):
                if found.split(":")[0] in studies.STUDIES:
                    done += 1
                    progress.update(task, completed=done, head=found, doing="")
                else:
                    progress.update(task, doing=found[:70])
                continue
            rows.append(record.rounded(found))
            if lines:
                lines.write(record.line(found))
                lines.flush()
        seconds = {"study": "run", "kind": "run", "seconds": round(time.perf_counter() - start, 1)}
        if lines:
            lines.write(record.line(seconds))
    return Record(facts, [*rows, seconds])


def report(found: Record, folder: Path | None, stem: str, suffix: str, console: Console | None = None) -> None:
    """Print the tables, and draw the pictures into ``folder``, if given."""
    console = console or Console(width=max(table.width(found.rows), Console().width))
    measured = Record(found.facts, [row for row in found.rows if row["kind"] != "run"])
    table.show(measured, console)
    facts = found.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    console.print(f"{facts['hardware']}, {versions}, commit {facts['commit'] or 'unknown'}", highlight=False)
    for row in found.rows:
        if row["kind"] == "run":
            console.print(f"took {row['seconds']:.0f} s", highlight=False)
    if folder is not None:
        for path in plots.draw(measured, folder, stem, suffix):
            console.print(f"picture: {path}", highlight=False, soft_wrap=True)


def _shown(options: studies.Options) -> Row:
    """Options in the form of the record."""
    names = {name: list(getattr(options, name)) for name in ("studies", "data", "backends", "modes", "passes", "peers")}
    shapes = [shape.label for shape in options.shapes]
    efforts = {"rounds": options.effort.rounds, "span_ms": options.effort.span_ms}
    sweeps = {"sweep_rounds": options.sweep_effort.rounds, "sweep_span_ms": options.sweep_effort.span_ms}
    return {"shapes": shapes, **names, **efforts, **(sweeps if set(options.studies) != {"heads"} else {})}
