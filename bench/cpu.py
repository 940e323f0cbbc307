"""Time and memory of the loss on a CPU, against ``F.cross_entropy(F.linear(e, c), targets)`` in the same run.

    python bench/cpu.py --trained demo.npz --out docs/benchmarks/cpu.json

The computations take turns and every round is compared with itself, so that a change of the machine's speed
meets all of them. A time is recorded only if the gradients are right: those of the exact mode against the dense
ones, those of the filter within a percent of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cce
from cce.benchmarks import heads, record
from cce.benchmarks.peers import Loss, dense
from cce.demo.measure import peak_bytes

SPECS = {"exact": cce.Spec(filter="none"), "filtered": cce.Spec(filter="element")}
TOLERANCE = {"exact": 1e-5, "filtered": 1e-2}


def main() -> None:
    """Measures, prints a table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, help="what `python -m cce demo --save PATH` wrote")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()
    problems = [heads.random(1024, 512, 32_000), heads.peaked()]
    if options.trained:
        problems.append(heads.trained_npz(options.trained))
    rows = [row for head in problems for row in measure(head, options.rounds)]
    show(rows)
    if options.out:
        record.write(options.out, "cpu", rows=rows)


def measure(head: heads.Head, rounds: int) -> list[dict[str, object]]:
    """One row a mode: the medians of the times and of their ratio to the dense computation's of the same round."""
    losses: dict[str, Loss] = {"dense": dense, **{name: with_spec(spec) for name, spec in SPECS.items()}}
    steps = {name: step(loss, head) for name, loss in losses.items()}
    expected = steps["dense"]()
    for name, allowed in TOLERANCE.items():
        for found, want in zip(steps[name](), expected, strict=True):
            error = float((found - want).norm() / want.norm())
            if not error <= allowed:
                raise SystemExit(f"{head.name}, {name}: gradients err by {error:.3g}, allowed {allowed}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    gradients = (head.e.numel() + head.c.numel()) * 4
    peaks = {name: (peak_bytes(run, head.e.device) or 0) - gradients for name, run in steps.items()}
    return [row(head, name, times, peaks) for name in SPECS]


def row(head: heads.Head, mode: str, times: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, object]:
    """The figures of one mode, and the limits of issue 2."""
    live = cce.live_fraction(head.e, head.c, head.targets, spec=SPECS[mode])
    ratios = [mine / dense for mine, dense in zip(times[mode], times["dense"], strict=True)]
    return {
        "problem": head.name,
        "n": len(head.e),
        "d": head.e.shape[1],
        "v": len(head.c),
        "mode": mode,
        "live_fraction": live,
        "time_ms": statistics.median(times[mode]) * 1e3,
        "dense_ms": statistics.median(times["dense"]) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_limit": 1.05 if mode == "exact" else (1 + 3 * live) / 3 + 0.15,
        "peak_mib": peaks[mode] / 2**20,
        "dense_peak_mib": peaks["dense"] / 2**20,
    }


def with_spec(spec: cce.Spec) -> Loss:
    """The same with cce."""
    return lambda e, c, targets: cce.loss(e, c, targets, spec=spec)


def step(loss: Loss, head: heads.Head) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, new leaves each time."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (head.e, head.c)]
        return torch.autograd.grad(loss(leaves[0], leaves[1], head.targets), leaves)

    return run


def show(rows: list[dict[str, object]]) -> None:
    """The record as a table."""
    names = (
        "problem",
        "mode",
        "live_fraction",
        "time_ms",
        "dense_ms",
        "ratio",
        "ratio_limit",
        "peak_mib",
        "dense_peak_mib",
    )
    table = Table(*names)
    for found in rows:
        table.add_row(*(f"{found[n]:.3g}" if isinstance(found[n], float) else str(found[n]) for n in names))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
