"""Autotuning: timing the candidates for one problem on this GPU, and keeping the fastest for later processes.

It runs only on request: :func:`cce.tuning.autotune`, or ``python -m cce tune``. Neither this module nor its imports
need Triton.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cce.backends.problem import Problem
from cce.backends.triton.launch import Device, Launch, Tile, fitted
from cce.spec import Spec
from cce.tuning.candidates import candidates, kernels_of

#: Gain over the shipped tile that a candidate needs to replace it: about the scatter of medians on a power-capped GPU.
LEAST_GAIN = 0.02


class Runner(Protocol):
    """Protocol of the work to tune; :class:`cce.tuning.phases.Work` for a real call."""

    def run(self, kernel: str, launch: Launch) -> None:
        """Run once the phase that ``kernel`` is part of."""

    def fault(self, launch: Launch) -> str | None:
        """Reason not to use a configuration, if there is one."""


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel, which a timer may call any number of times.

    Attributes:
        kernel: name of the tile to try.
        launch: configuration with that tile in it.
    """

    runner: Runner
    kernel: str
    launch: Launch

    @property
    def tile(self) -> Tile:
        tile: Tile = getattr(self.launch, self.kernel)
        return tile

    def __call__(self) -> None:
        self.runner.run(self.kernel, self.launch)


#: Function that returns the milliseconds per step of a trial.
Timer = Callable[[Trial], float]
#: Callback(steps done, total steps, description of the next step).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """Result of trying one tile.

    Attributes:
        kernel, tile: name of the kernel, and the tile.
        ms: median time of a step of its phase; None if it was left out.
        ratio: median, over the rounds, of its time divided by the shipped tile's in the same round.
        note: "shipped", "chosen", "shipped, chosen", the reason why it was left out, or "".
    """

    kernel: str
    tile: Tile
    ms: float | None
    ratio: float | None
    note: str


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`cce.tuning.autotune`.

    Attributes:
        launch: fastest configuration.
        rows: all tiles that were tried.
        path: path of the file that holds it.
    """

    launch: Launch
    rows: tuple[Row, ...]
    path: Path

    def __str__(self) -> str:
        lines = [f"{'kernel':8} {'tile':44} {'ms':>9} {'ratio':>6}  note"]
        lines += [
            f"{row.kernel:8} {row.tile!s:44} {number(row.ms, 3):>9} {number(row.ratio, 3):>6}  {row.note}"
            for row in self.rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), f"kept in {self.path}"])


def number(x: float | None, digits: int) -> str:
    """Format a number for a table.

    >>> number(1.5, 2), number(None, 2)
    ('1.50', '–')
    """
    return "–" if x is None else f"{x:.{digits}f}"


def tune(
    runner: Runner,
    launch: Launch,
    problem: Problem,
    spec: Spec,
    device: Device,
    timer: Timer,
    rounds: int,
    progress: Progress | None = None,
) -> tuple[Launch, tuple[Row, ...]]:
    """Find, kernel by kernel, the fastest tile given those already chosen; ``launch`` is the shipped configuration."""
    tiles = {kernel: candidates(kernel, launch, problem, spec, device) for kernel in kernels_of(problem, spec)}
    total = sum(len(found) + rounds for found in tiles.values())
    done, rows = 0, []

    def step(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, what)
        done += 1

    for kernel, found in tiles.items():
        # The tiles of both products share their number of warps, so that one may change with the other.
        launches = [fitted(launch.with_tiles({kernel: tile}), problem, spec) for tile in found]
        trials, left_out = [Trial(runner, kernel, launch)], []
        for trial in (Trial(runner, kernel, other) for other in launches):
            step(f"{kernel}: checking")
            fault = runner.fault(trial.launch)
            if fault is None:
                trials.append(trial)
            else:
                left_out.append(Row(kernel, trial.tile, None, None, fault))
        times = []
        for _ in range(rounds):
            step(f"{kernel}: timing {len(trials)} tiles")
            times.append([timer(trial) for trial in trials])
        best, measured = _fastest(trials, times)
        launch = best.launch
        rows += measured + left_out
    step("done")
    return replace(launch, tuned=True), tuple(rows)


def _fastest(trials: Sequence[Trial], times: Sequence[Sequence[float]]) -> tuple[Trial, list[Row]]:
    """The trial to keep, and a row for each; the first is the shipped one, kept unless another gains enough."""
    ms = [statistics.median(column) for column in zip(*times, strict=True)]
    # Within a round the GPU's clock is about the same.
    ratios = [statistics.median(line[i] / line[0] for line in times) for i in range(len(trials))]
    best = min(range(len(trials)), key=lambda i: (ratios[i], i))
    if ratios[best] > 1 - LEAST_GAIN:
        best = 0
    rows = []
    for i, trial in enumerate(trials):
        note = ", ".join(["shipped"] * (i == 0) + ["chosen"] * (i == best))
        rows.append(Row(trial.kernel, trial.tile, ms[i], ratios[i], note))
    return trials[best], rows
