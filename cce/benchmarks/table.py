"""A record as tables, one for each head."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cce.benchmarks.record import Record, Row

HEADINGS = ("ms", "spread", "× mm", "roof", "peak MiB", "over", "loss", "dE", "dC", "live")
_FIGURES = 96  # characters of a line after its label
NOTES = """\
ms: median of the rounds; spread: of the rounds, over it. × mm: in units of one e @ c.T of the same round. roof: the
least time its products or its traffic take, over the time taken. peak: memory over the inputs; over: over the two
gradients (the loss, in a forward). loss, dE, dC: relative errors against float64. live: share of the tiles computed."""


def show(record: Record, console: Console) -> None:
    """Print every head: statistics of its data, then a line for each measurement."""
    for key, group in groupby(record.rows, key=head_of):
        rows = list(group)
        for row in rows:
            if row["kind"] == "data":
                console.print(Text(f"\n{title(row)}: {data_line(row)}"), soft_wrap=True)
        if timed := [row for row in rows if row["kind"] == "time"]:
            console.print(_table(f"{key[0]}: {title(timed[0])}", timed))
            for line in without_time(timed):
                console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(NOTES, style="dim", highlight=False, soft_wrap=True)


def head_of(row: Row) -> tuple[Any, ...]:
    """Key that the rows of one head share."""
    return tuple(row[name] for name in ("study", "shape", "n", "d", "v", "data"))


def title(row: Row) -> str:
    """Title of a row's head.

    >>> title({"shape": "gpt2", "n": 256, "d": 768, "v": 50257, "data": "random", "dtype": "float32"})
    'gpt2, N=256 D=768 V=50257, random data, float32'
    """
    return f"{row['shape']}, N={row['n']} D={row['d']} V={row['v']}, {row['data']} data, {row['dtype']}"


def data_line(row: Row) -> str:
    """Statistics of a head's data, or the reason why there are none."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return (
        f"entropy {row['entropy']:.2f} nats, loss {row['nll']:.2f}, {row['hits']:.0f} entries a row above 2^-12, the "
        f"others' mass {row['tail_mass']:.3f}, mean row / mean norm: e {row['mean_norm_e']:.2f}, "
        f"c {row['mean_norm_c']:.2f}"
    )


def figures(row: Row) -> list[str]:
    """Cells of a measured row, in the order of ``HEADINGS``; empty where there is no value."""

    def show(name: str, form: str) -> str:
        return f"{row[name]:{form}}" if row.get(name) is not None else ""

    spread = f"{(row['time_high_ms'] - row['time_low_ms']) / row['time_ms']:.0%}" if "time_ms" in row else ""
    if row.get("rounds") == 1:
        spread = "once"
    return [
        show("time_ms", ".4g"),
        spread,
        show("mm", ".2f"),
        show("roofline", ".0%"),
        show("peak_mib", ".1f"),
        show("over_gradients_mib", ".1f"),
        *(show(f"error_{of}", ".1e") for of in ("loss", "de", "dc")),
        show("live", ".0%"),
    ]


def without_time(rows: list[Row]) -> list[str]:
    """Reasons why rows have no time, one per line.

    >>> row = {"name": "liger", "mode": "", "status": "absent", "reason": "not installed"}
    >>> without_time([row | {"pass": "forward"}, row | {"pass": "forward+backward"}])
    ['liger absent: not installed']
    """
    reasons: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["name"], row["status"], row["reason"]), []).append(row)
    lines = []
    for (name, status, reason), found in reasons.items():
        every = len(found) == sum(row["name"] == name for row in rows)
        which = "; ".join(", ".join(filter(None, (row["mode"], row["pass"]))) for row in found)
        lines.append(f"{name}{'' if every else f' ({which})'} {status}: {reason}")
    return lines


def label(row: Row) -> str:
    """Label of a row: its candidate and pass.

    >>> label({"name": "torch", "mode": "exact", "pass": "forward+backward"})
    'torch, exact, step'
    """
    return ", ".join(filter(None, (row["name"], row["mode"], row["pass"].replace("forward+backward", "step"))))


def width(rows: list[Row]) -> int:
    """Length of the longest line: a narrower terminal wraps lines, which reads better than truncated figures."""
    return _FIGURES + max((len(label(row)) for row in rows if row["kind"] == "time"), default=0)


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(Column("", no_wrap=True), title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if len(row.keys() & {"time_ms", "peak_mib"}):
            table.add_row(*map(Text, (label(row), *figures(row))))
    return table
