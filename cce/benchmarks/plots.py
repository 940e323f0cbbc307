"""Pictures drawn from a record alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cce.benchmarks.record import Record, Row
from cce.benchmarks.table import title

COLORS = {
    "triton": "#2b5c8a", "torch": "#5b9bd5", "cupy": "#2e8b57", "numba": "#7a4fa3", "reference": "#999999",
    "eager": "#e8963c", "compiled": "#c96a1b", "torch-chunked": "#d9b44a", "liger": "#b03a48",
    "liger-float32": "#d98088", "cut-cross-entropy": "#555555", "cut-cross-entropy-exact": "#888888",
}  # fmt: skip
LINES = {"exact": "-", "filtered": "--", "uncompensated": ":", "": "-"}
INK = "#333333"
STEP = "forward+backward"


def draw(record: Record, folder: Path, stem: str, suffix: str = ".svg") -> list[Path]:
    """Write the pictures for which a record has rows, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # The same record gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": stem, "svg.fonttype": "none", "font.size": 9}):
        for name, figure in pictures(record):
            path = folder / f"{stem}-{name}{suffix}"
            figure.savefig(path, metadata={"Date": None} if suffix == ".svg" else {}, dpi=130)
            paths.append(path)
    return paths


def pictures(record: Record) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures with their names."""
    heads = [row for row in record.of("heads") if row.get("pass") == STEP]
    for data in dict.fromkeys(row["data"] for row in heads):
        yield f"heads-{data}", heads_figure([row for row in heads if row["data"] == data])
    for study, axis in (("vocabulary", "v"), ("tokens", "n"), ("width", "d")):
        rows = [row for row in record.of(study) if row["kind"] == "time" and row["status"] == "ok"]
        if any(row["pass"] == STEP for row in rows):
            yield study, scaling_figure([row for row in rows if row["pass"] == STEP], axis)
    found = [row for row in record.of("filter") if row["kind"] == "time" and "error_de" in row]
    for data in dict.fromkeys(row["data"] for row in found):
        yield f"filter-{data}", filter_figure([row for row in found if row["data"] == data])


def heads_figure(rows: list[Row]) -> Figure:
    """Time and memory of a step, as bars for each head."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    most = max(len(group) for group in groups.values())
    figure = Figure(figsize=(10, len(groups) * (0.8 + 0.17 * most)), layout="constrained")
    for (left, right), (name, group) in zip(
        figure.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True
    ):
        measured = [row for row in group if "peak_mib" in row]
        timed = sorted((row for row in group if "time_ms" in row), key=lambda row: row["time_ms"])
        # One candidate that takes a hundred times as long would leave the others without visible bars.
        bars(left, timed, "time_ms", "{:.4g} ms", longest=12 * timed[0]["time_ms"] if timed else math.inf)
        left.set_title(f"{name}\ntime of forward and backward", loc="left", fontsize=9, color=INK)
        bars(right, sorted(measured, key=lambda row: row["peak_mib"]), "peak_mib", "{:,.0f} MiB")
        right.set_title("peak memory over the inputs", loc="left", fontsize=9, color=INK)
    return figure


def bars(axes: Axes, rows: list[Row], name: str, form: str, longest: float = math.inf) -> None:
    """Draw a bar per row, the smallest on top, with values as text; bars beyond ``longest`` are cut and marked."""
    labels = [" ".join(filter(None, (row["name"], row["mode"]))) for row in rows]
    values = [row[name] for row in rows]
    positions = range(len(rows))
    ends = [min(value, longest) for value in values]
    axes.barh(positions, ends, color=[COLORS.get(row["name"], INK) for row in rows])
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    for y, value, end in zip(positions, values, ends, strict=True):
        text = form.format(value) + (" (bar cut)" if end < value else "")
        axes.annotate(f" {text}", (end, y), va="center", color=INK, fontsize=8)
    axes.set_xlim(0, 1.25 * max(ends, default=1))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def memory(record: Record, path: Path) -> None:
    """Draw the peak memory of a step on the largest head of a record, the two gradients apart, for the home page.

    If the record has several kinds of data, the synthetic are shown.
    """
    found = [row for row in record.of("heads") if row.get("pass") == STEP and row["status"] == "ok"]

    def rank(row: Row) -> tuple[int, bool, str]:
        return row["n"] * row["v"], row["data"] == "synthetic", row["data"]

    largest = max(map(rank, found))
    rows = sorted(
        (row for row in found if rank(row) == largest and row["mode"] != "uncompensated"),
        key=lambda row: row["peak_mib"],
    )
    with matplotlib.rc_context({"svg.hashsalt": "memory", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 0.8 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        bars(axes, rows, "peak_mib", "{:,.0f} MiB")
        gradients = rows[0]["peak_mib"] - rows[0]["over_gradients_mib"]
        axes.barh(range(len(rows)), gradients, color="#dddddd")
        axes.set_title(
            f"Peak memory of forward and backward over the inputs\n{title(rows[0])}\n"
            "grey: the two gradients, which every loss returns",
            loc="left", fontsize=9, color=INK,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None})


def scaling_figure(rows: list[Row], axis: str) -> Figure:
    """Time and memory against one size, on logarithmic scales."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key in dict.fromkeys((row["name"], row["mode"]) for row in rows):
        line = sorted((row for row in rows if (row["name"], row["mode"]) == key), key=lambda row: row[axis])
        style: dict[str, Any] = {"color": COLORS.get(key[0], INK), "linestyle": LINES.get(key[1], "-"), "marker": "."}
        label = " ".join(filter(None, key))
        left.plot([row[axis] for row in line], [row["time_ms"] for row in line], label=label, **style)
        right.plot([row[axis] for row in line], [row["peak_mib"] for row in line], **style)
    fixed = ", ".join(f"{name.upper()} = {rows[0][name]:,}" for name in "ndv" if name != axis)
    left.set_title(f"Time of forward and backward, ms ({fixed})", loc="left", color=INK)
    right.set_title("Peak memory over the inputs, MiB", loc="left", color=INK)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(axis.upper())
        finish(axes)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def filter_figure(rows: list[Row]) -> Figure:
    """Live fraction and errors against the threshold."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    series: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        power, _, kind = row["mode"].partition(", ")
        if kind:
            series.setdefault(kind, []).append((-int(power.removeprefix("2^")), row))
    for kind, points in series.items():
        x = [power for power, _ in points]
        dashed = "--" if "not compensated" in kind else "-"
        left.plot(x, [row["live"] for _, row in points], dashed, marker=".", label=kind)
        right.plot(x, [row["error_de"] for _, row in points], dashed, marker=".", label=kind)
    right.axhline(rows[0]["dense_de"], color="#999999", linewidth=1)
    right.annotate(f"dense, {rows[0]['dtype']}", (1, rows[0]["dense_de"]), xycoords=("axes fraction", "data"),
                   ha="right", va="bottom", color="#777777", fontsize=8)  # fmt: skip
    left.set_title(f"Live tiles ({title(rows[0])})", loc="left", color=INK, fontsize=9)
    right.set_title("Relative error of dE against float64", loc="left", color=INK, fontsize=9)
    right.set_yscale("log")
    right.legend(frameon=False, fontsize=8, title="vocabulary order, row order", title_fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("threshold")
        powers = sorted({power for points in series.values() for power, _ in points})
        axes.set_xticks(powers, [rf"$2^{{-{power}}}$" for power in powers])
        finish(axes)
    left.set_ylim(0, 1)
    return figure


def finish(axes: Axes) -> None:
    """Apply the style common to all axes."""
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
