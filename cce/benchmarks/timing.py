"""Time of a step in units of one ``e @ c.T`` by torch, and memory.

GPUs are power-capped: the clock falls with the work of the last tenth of a second (docs/performance-notes.md). So
candidates, including ``mm``, take turns and run equally long without a pause, as in training, and every round is
compared with its own ``mm``. Before each step a buffer larger than the caches is written, outside the measured time. A
sleeping kernel lets the host run ahead before the first step. On a CPU the same turns are measured by the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce.demo import measure

Run = Callable[[], object]
#: Cycles of the sleeping kernel: longer than the host needs to launch a step.
_HEAD_START = 20_000_000
_CPU_CACHE = 64 * 2**20
#: Milliseconds beyond which a step is measured only once, so that one slow candidate does not take all the time.
SLOW_MS = {"cuda": 1000, "cpu": 2000}


@dataclass(frozen=True)
class Time:
    """Time of one step.

    Attributes:
        ms: median of the rounds.
        ms_low, ms_high: smallest and largest of them.
        mm: median of the rounds' ratios to that round's ``mm``.
        low, high: smallest and largest of these ratios.
        rounds: number of rounds.
    """

    ms: float
    ms_low: float
    ms_high: float
    mm: float
    low: float
    high: float
    rounds: int


def slow(ms: float, device: torch.device) -> bool:
    """Whether a step takes too long to be measured several times."""
    return ms > SLOW_MS["cuda" if device.type == "cuda" else "cpu"]


def compare(runs: Mapping[Any, Run], e: Tensor, c: Tensor, rounds: int = 5, span_ms: float = 120) -> dict[Any, Time]:
    """Measure each of ``runs``, and ``mm``, in turns; a measurement is steps of about ``span_ms`` in total."""
    *_, times = turns(runs, e, c, rounds, span_ms)
    assert isinstance(times, dict)
    return times


def turns(runs: Mapping[Any, Run], e: Tensor, c: Tensor, rounds: int, span_ms: float) -> Iterator[Any]:
    """Like :func:`compare`, but yield the name of each measurement as it is made, and at the end the times."""
    logits = torch.empty(len(e), len(c), dtype=e.dtype, device=e.device)
    all_runs = {"mm": lambda: torch.mm(e, c.T, out=logits), **runs}
    flush = Flush(e.device)
    one = _events if e.device.type == "cuda" else _wall
    steps, times = {}, dict[str, list[float]]()
    for name, run in all_runs.items():
        if e.device.type == "cuda":
            run()
        first = one(run, 1, flush)
        steps[name] = max(1, round(span_ms / first))
        times[name] = [first] if slow(first, e.device) else []
        yield name
    fast = {name: run for name, run in all_runs.items() if not times[name]}
    for _ in range(rounds):
        for name, run in fast.items():
            times[name].append(one(run, steps[name], flush))
            yield name
    yield {name: _summary(found, times["mm"]) for name, found in times.items()}


class Flush:
    """Flush of the caches, by writing a buffer twice as large as the last level."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE // 2
        self._buffer = torch.empty(2 * size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    count = 2**29 if device.type == "cuda" else 2**26
    source = torch.zeros(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    one = _events if device.type == "cuda" else _wall
    return 2 * count / min(one(lambda: target.copy_(source), 3, lambda: None) for _ in range(3)) * 1e3


def _events(run: Run, steps: int, flush: Run) -> float:
    """GPU time of a step in milliseconds, the median of several."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    for begin, end in pairs:
        flush()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs)


def _wall(run: Run, steps: int, flush: Run) -> float:
    """Wall-clock time of a step in milliseconds, the median of several."""
    times = []
    for _ in range(steps):
        flush()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _summary(times: list[float], unit: list[float]) -> Time:
    ratios = [mine / mm for mine, mm in zip(times, unit, strict=False)]  # a slow one has fewer rounds
    middle, ratio = statistics.median(times), statistics.median(ratios)
    return Time(middle, min(times), max(times), ratio, min(ratios), max(ratios), len(times))


def once(ms: float, mm: float) -> Time:
    """Time of a step that was measured once, relative to a median of ``mm``."""
    return Time(ms, ms, ms, ms / mm, ms / mm, ms / mm, 1)


def wall_ms(runs: Mapping[str, Run], rounds: int = 5, steps: int = 40) -> dict[str, float]:
    """Wall-clock milliseconds per step in a loop that waits only at its end: those of the slower of host and GPU."""
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


def peak_bytes(run: Run, device: torch.device | str = "cuda", *, warm_up: bool = True) -> int:
    """Peak memory of a step beyond the memory held before, including its results; 0 if unknown.

    A step that was run before needs no ``warm_up``, which makes one-time allocations.
    """
    device = torch.device(device)
    if device.type != "cpu" and warm_up:
        run()
        torch.accelerator.synchronize()
    return measure.peak_bytes(run, device) or 0


def peak_and_slow_ms(run: Run, device: torch.device) -> tuple[int, float | None]:
    """Peak memory of a step that was run before, and on a GPU its wall-clock time, if it is slow.

    On a CPU the allocations are recorded, which itself takes time.
    """
    if device.type == "cpu":
        return peak_bytes(run, device), None
    torch.accelerator.synchronize()
    start = time.perf_counter()
    peak = peak_bytes(run, device, warm_up=False)
    torch.accelerator.synchronize()
    ms = (time.perf_counter() - start) * 1e3
    return peak, ms if slow(ms, device) else None
