"""Time and peak memory of a loss, forward and backward, on fixed hidden states.

Memory on a CPU is counted, not sampled: the process's resident size lags behind and depends on what the
allocator kept from earlier work, so the profiler records every allocation and release that PyTorch makes,
in any operator or autograd node, and the largest running sum is the peak. On a GPU the caching allocator keeps this
sum. Both start at zero after the inputs exist, so they show the memory that the loss adds: its temporaries and the two
gradients.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cce.demo.train import Loss, precision


@dataclass(frozen=True)
class Cost:
    """Cost of one forward and backward of a loss.

    Attributes:
        seconds: median of several measurements.
        peak_bytes: largest allocation at any time beyond the inputs; None where PyTorch cannot measure it.
    """

    seconds: float
    peak_bytes: int | None


def measure(losses: Mapping[str, Loss], e: Tensor, c: Tensor, targets: Tensor, repeats: int) -> dict[str, Cost]:
    """Measure the cost of each of ``losses`` for the same e (N, D), c (V, D) and targets (N,).

    The losses take turns, so that a change in the machine's speed affects all of them.
    """
    steps = {name: _step(loss, e, c, targets) for name, loss in losses.items()}
    for step in steps.values():
        step()  # one-time work is not measured: compilation, library handles, the first page faults
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, e.device))
    return {name: Cost(statistics.median(seconds[name]), peak_bytes(step, e.device)) for name, step in steps.items()}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of ``step`` beyond the memory allocated before; None if unknown."""
    if device.type == "cpu":
        return _peak_bytes_cpu(step)
    try:
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        result = step()  # kept until the peak is read
        peak = torch.accelerator.max_memory_allocated(device) - before
    except (RuntimeError, NotImplementedError):  # accelerators whose allocator keeps no statistics
        return None
    del result
    return peak


def _step(loss: Loss, e: Tensor, c: Tensor, targets: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().clone().requires_grad_() for x in (e, c)]

    def step() -> tuple[Tensor, ...]:
        with precision(e.device):
            value = loss(leaves[0], leaves[1], targets)
        return torch.autograd.grad(value, leaves)

    return step


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_bytes_cpu(step: Callable[[], object]) -> int:
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the log output of the profiler's C++ code at every start and stop; Python's own errors are still shown."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
