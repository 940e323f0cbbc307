"""GPU time in units of one cuBLAS ``e @ c.T``, and memory.

The card is power-capped: the clock falls with the work of the last tenth of a second (docs/performance-notes.md). So
candidates take turns, all of them, ``mm`` too, run equally long without a pause, as in training, and every round is
compared with its own ``mm``. A kernel that sleeps lets the host run ahead before the first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], object]
#: Cycles of the kernel that sleeps: longer than the host needs to launch a step.
_HEAD_START = 20_000_000


@dataclass(frozen=True)
class Time:
    """Of one step.

    Attributes:
        ms: median of the rounds.
        mm: median of the rounds' ratios to that round's ``mm``.
        low, high: smallest and largest of these ratios.
    """

    ms: float
    mm: float
    low: float
    high: float


def compare(runs: Mapping[str, Run], e: Tensor, c: Tensor, rounds: int = 5, span_ms: float = 120) -> dict[str, Time]:
    """The time of each of ``runs``, and of ``mm``, in turns; steps of about ``span_ms`` make a measurement."""
    logits = torch.empty(len(e), len(c), dtype=e.dtype, device=e.device)
    all_runs = {"mm": lambda: torch.mm(e, c.T, out=logits), **runs}
    steps = {}
    for name, run in all_runs.items():
        run()
        steps[name] = max(1, round(span_ms / _events(run, 2)))
    times: dict[str, list[float]] = {name: [] for name in all_runs}
    for _ in range(rounds):
        for name, run in all_runs.items():
            times[name].append(_events(run, steps[name]))
    return {name: _summary(found, times["mm"]) for name, found in times.items()}


def _events(run: Run, steps: int) -> float:
    """Milliseconds of GPU time a step."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    for _ in range(steps):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / steps


def _summary(times: list[float], unit: list[float]) -> Time:
    ratios = [mine / mm for mine, mm in zip(times, unit, strict=True)]
    return Time(statistics.median(times), statistics.median(ratios), min(ratios), max(ratios))


def wall_ms(runs: Mapping[str, Run], rounds: int = 5, steps: int = 40) -> dict[str, float]:
    """Wall-clock milliseconds of a step in a loop that waits only at its end: host and GPU, whichever is slower."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                run()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / steps * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_bytes(run: Run) -> int:
    """The most memory a step holds beyond what was there before; what it returns counts."""
    for _ in range(2):  # what is allocated once only
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
