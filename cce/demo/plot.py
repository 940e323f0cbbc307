"""The picture of a demo run: both loss curves, and the memory of both losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cce.demo.report import Report

DENSE_COLOR, FUSED_COLOR, INK = "#e8963c", "#2b5c8a", "#333333"
MIB = 2**20


def draw(report: Report, path: Path) -> None:
    """Write the picture to ``path`` as a PNG."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")  # no pyplot: no window, no global state
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _curves(left, report)
    _memory(right, report)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.savefig(path, format="png")


def _curves(axes: Axes, report: Report) -> None:
    steps = range(1, len(report.dense.losses) + 1)
    # The curves overlap: where they agree, the wide one shows on both sides of the narrow one.
    axes.plot(steps, report.dense.losses, color=DENSE_COLOR, linewidth=5, alpha=0.55, marker=_marker(report))
    axes.plot(steps, report.fused.losses, color=FUSED_COLOR, linewidth=1.4, marker=_marker(report))
    axes.set_title("Training loss, same seed and batches", loc="left", color=INK, weight="bold")
    axes.set_xlabel("training step", color=INK)
    axes.set_ylabel("loss of the batch (nats per token)", color=INK)
    axes.grid(axis="y", color="#eeeeee")
    text: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 10}
    axes.annotate("cross_entropy(linear(e, c)), wide", (0.98, 0.97), color=DENSE_COLOR, weight="bold", **text)
    axes.annotate(f"cce.loss(e, c), {report.mode}, narrow", (0.98, 0.90), color=FUSED_COLOR, weight="bold", **text)
    axes.annotate(f"largest difference {report.largest_difference:.1e}", (0.98, 0.83), color=INK, **text)


def _marker(report: Report) -> str | None:
    return "o" if len(report.dense.losses) == 1 else None


def _memory(axes: Axes, report: Report) -> None:
    axes.set_title(f"Peak memory of the loss, {report.measured} tokens", loc="left", color=INK, weight="bold")
    peaks = [report.dense_cost.peak_bytes, report.fused_cost.peak_bytes]
    if peaks[0] is None or peaks[1] is None:
        axes.text(0.5, 0.5, "not known on this device", transform=axes.transAxes, ha="center", color=INK)
        axes.set_axis_off()
        return
    names = ["cross_entropy\n(linear(e, c))", f"cce.loss(e, c)\n{report.mode}"]
    totals = [peak / MIB for peak in peaks if peak is not None]
    axes.bar(names, totals, color=[DENSE_COLOR, FUSED_COLOR], width=0.5)
    for i, total in enumerate(totals):
        axes.annotate(
            f"{total:,.0f} MiB",
            (i, total),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=INK,
            weight="bold",
            fontsize=11,
        )
    gradients = report.gradient_bytes / MIB
    axes.axhline(gradients, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"dE and dC:\n{gradients:,.0f} MiB",
        (0.5, gradients),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        color=INK,
        fontsize=9,
    )
    axes.set_ylabel("memory beyond the inputs (MiB)", color=INK)
    axes.set_ylim(0, max(totals) * 1.12)
