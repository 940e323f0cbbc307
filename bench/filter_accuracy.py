"""Error and live fraction of the filter on the demo's trained model: threshold, vocabulary order, compensation.

python bench/filter_accuracy.py demo.npz --out docs/benchmarks/filter.json
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

import cce
from cce.benchmarks import heads, record
from cce.demo.evaluate import dense_bfloat16, gradients, relative_errors
from cce.demo.train import cce_loss, dense_loss


def main() -> None:
    """Measures, prints a table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="what `python -m cce demo --save PATH` wrote")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()
    head = heads.trained_npz(options.trained)
    e, c = head.e.bfloat16(), head.c.bfloat16()
    exact = gradients(dense_loss, e.double(), c.double(), head.targets)
    rows = [row("dense bf16", 1.0, relative_errors(dense_bfloat16(e, c, head.targets), exact))]
    cases = itertools.product(("natural", "mean_logit"), (12, 13, 14, 16), (False, True))
    for order, power, compensate in cases:
        spec = cce.Spec(filter="element", threshold=2.0**-power, vocab_order=order, compensate=compensate)
        errors = relative_errors(gradients(cce_loss("torch", spec), e, c, head.targets), exact)
        name = f"{order}, 2^-{power}, {'compensated' if compensate else 'not compensated'}"
        rows.append(row(name, cce.live_fraction(e, c, head.targets, spec=spec), errors))
    show(rows)
    if options.out:
        record.write(options.out, "cpu", n=len(e), d=e.shape[1], v=len(c), rows=rows)


def row(name: str, live: float, errors: tuple[float, float]) -> dict[str, str | float]:
    """One line of the record."""
    return {"computation": name, "live_fraction": live, "error_de": errors[0], "error_dc": errors[1]}


def show(rows: list[dict[str, str | float]]) -> None:
    """The record as a table."""
    table = Table(*rows[0])
    for found in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else x for x in found.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
