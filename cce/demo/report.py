"""The results of a demo run, and the tables that show them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cce.demo.evaluate import Accuracy
from cce.demo.measure import Cost
from cce.demo.train import Training


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results of a run.

    Attributes:
        dense, fused: training runs with the ordinary loss and with cce.
        dense_cost, fused_cost: costs of the two losses.
        gradient_bytes: bytes of dE and dC together, which every loss has to hold.
        mode: mode of the run with cce, for a heading: "exact" or "filtered".
        measured: number N of tokens in the measurements.
        threshold: threshold of the filter. accuracy: accuracy of the filter on the trained model.
    """

    dense: Training
    fused: Training
    dense_cost: Cost
    fused_cost: Cost
    gradient_bytes: int
    mode: str
    measured: int
    threshold: float
    accuracy: list[Accuracy]

    @property
    def largest_difference(self) -> float:
        """Largest difference between the two loss curves, over all steps."""
        return max(abs(a - b) for a, b in zip(self.dense.losses, self.fused.losses, strict=True))


def mebibytes(count: int | None) -> str:
    """Format a number of bytes for the reader; a dash if it is unknown.

    >>> mebibytes(3 * 2**20), mebibytes(None)
    ('3.0 MiB', '–')
    """
    return "–" if count is None else f"{count / 2**20:.1f} MiB"


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    notes = (
        "dense: F.cross_entropy(F.linear(e, c), targets). Loss at the end: mean of the last tenth of the steps. "
        f"Memory and time: forward and backward of the loss on N = {report.measured} held-out tokens.",
        f"Relative errors against float64 on N = {report.measured} held-out tokens. Filtered: tiles without a softmax "
        f"value above {report.threshold:.2g} are skipped. Compensated: a skipped tile is replaced by its mass times "
        "the tile's mean row. Unordered: without sorting the vocabulary by mean logits first.",
    )
    for table, note in zip((_comparison(report), _accuracy(report.accuracy)), notes, strict=True):
        console.print()
        console.print(table)
        console.print(note, highlight=False, style="dim")


def _comparison(report: Report) -> Table:
    dense, fused = report.dense_cost, report.fused_cost
    table = Table(title="Training with both losses", title_justify="left")
    table.add_column("")
    for heading in ("dense", f"cce, {report.mode}", "cce / dense"):
        table.add_column(heading, justify="right")

    def row(name: str, left: str, right: str, ratio: float | None = None) -> None:
        table.add_row(name, left, right, "" if ratio is None else f"{ratio:.2f}")

    row("loss at the start", f"{report.dense.losses[0]:.3f}", f"{report.fused.losses[0]:.3f}")
    row("loss at the end", f"{report.dense.final_loss:.3f}", f"{report.fused.final_loss:.3f}")
    row("largest difference of the curves", "", f"{report.largest_difference:.1e}")
    speeds = report.dense.tokens_per_second, report.fused.tokens_per_second
    row("training, tokens per second", f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", speeds[1] / speeds[0])
    table.add_section()
    ratio = fused.peak_bytes / dense.peak_bytes if fused.peak_bytes and dense.peak_bytes else None
    row("peak memory of the loss", mebibytes(dense.peak_bytes), mebibytes(fused.peak_bytes), ratio)
    gradients = mebibytes(report.gradient_bytes)
    row("  dE and dC alone", gradients, gradients)
    times = [f"{cost.seconds * 1e3:,.1f} ms" for cost in (dense, fused)]
    row("time of the loss", times[0], times[1], fused.seconds / dense.seconds)
    return table


def _accuracy(rows: list[Accuracy]) -> Table:
    table = Table(title="The filter on the trained model", title_justify="left")
    table.add_column("gradients in bfloat16")
    for heading in ("live tiles", "error of dE", "error of dC"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.live_fraction:.1%}", f"{row.de:.2%}", f"{row.dc:.2%}")
    return table
