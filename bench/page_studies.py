"""Sections of docs/benchmarks.md of the sweeps: cost against one size, and what the filter's threshold does."""

from __future__ import annotations

from itertools import groupby

from page_parts import STEP, best, label

from cce.benchmarks import table
from cce.benchmarks.record import Record, Row

#: Of a study: its title, and the size that varies.
SWEEPS = {
    "vocabulary": ("Against the size of the vocabulary", "v"),
    "tokens": ("Against the number of tokens", "n"),
    "width": ("Against the width", "d"),
}


def sweep(found: Record, study: str, picture: str) -> list[str]:
    """Cost against one size: the picture, who is best at each size, and who is missing where."""
    title, axis = SWEEPS[study]
    rows = [row for row in found.of(study) if row.get("pass") == STEP]
    parts = [
        f"### {title}\n",
        f"![{title}]({picture})\n",
        f"| {axis.upper()} | fastest | least memory |",
        "|--:|---|---|",
    ]
    for size, group in groupby(rows, key=lambda row: row[axis]):
        of_size = list(group)
        parts.append(f"| {size:,} | {best(of_size, 'time_ms', 'ms')} | {best(of_size, 'peak_mib', 'MiB')} |")
    return [*parts, "", *(f"- {line}" for line in without_time(rows, axis)), ""]


def without_time(rows: list[Row], axis: str) -> list[str]:
    """Who has no time at which sizes, with the reason at the first of them.

    >>> row = {"name": "eager", "mode": "", "lacks": [], "status": "failed", "reason": "no memory", "n": 8}
    >>> without_time([row, row | {"n": 4096, "reason": "less memory"}], "n")
    ['eager failed at N = 8 (no memory), 4,096']
    """
    lines = []
    kinds = dict.fromkeys((row["name"], row["mode"], row["status"]) for row in rows if row["status"] != "ok")
    for name, mode, status in kinds:
        group = [row for row in rows if (row["name"], row["mode"], row["status"]) == (name, mode, status)]
        first, *others = (f"{row[axis]:,}" for row in group)
        reason = group[0]["reason"].replace("|", "/")
        sizes = ", ".join([f"{axis.upper()} = {first} ({reason})", *others])
        lines.append(f"{label(group[0])} {status} at {sizes}")
    return lines


def threshold(found: Record, data: str, picture: str) -> list[str]:
    """The filter's study on one kind of data."""
    of_data = [row for row in found.of("filter") if row["data"] == data]
    rows = [row for row in of_data if row["kind"] == "time" and "filter_de" in row]
    (statistics,) = (row for row in of_data if row["kind"] == "data")
    parts = [
        f"### The filter: {table.title(statistics)}\n",
        f"{table.data_line(statistics)}\n",
        f"![Live fraction and error against the threshold]({picture})\n",
        "| threshold, vocabulary and row order | live | error of dE | error of dC | ms |",
        "|---|--:|--:|--:|--:|",
    ]
    parts += [f"| dense, {rows[0]['dtype']} | 100 % | {rows[0]['dense_de']:.1e} | {rows[0]['dense_dc']:.1e} | |"]
    for row in rows:
        ms = f"{row['time_ms']:.4g}" if "time_ms" in row else row["status"]
        parts.append(f"| {row['mode']} | {row['live']:.0%} | {row['error_de']:.1e} | {row['error_dc']:.1e} | {ms} |")
    return [*parts, ""]
