"""What the host code costs with kernels that do nothing: seconds of the GPU, of the host, launches and memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from test_on_gpu import MIB, phases
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    """One line a phase, then what takes longest in a filtered backward."""
    for filter in ("none", "element"):
        for order in (False, True):
            for name, phase in phases(order, filter).items():
                print(f"{filter:8} {'ordered' if order else 'natural':8} {name:8} {measured(phase)}")
            torch.cuda.empty_cache()
    phase = phases(True, "element")["backward"]
    phase()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        phase()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
    for event in found:
        print(f"{event.self_device_time_total:8.0f} us {event.count:5} x {event.key[:100]}")


def measured(phase) -> str:  # type: ignore[no-untyped-def]
    phase()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = phase()
    torch.cuda.synchronize()
    kept = sum(x.nbytes for x in vars(results).values() if x is not None)
    over = torch.cuda.max_memory_allocated() - before - kept
    del results
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(40_000_000)
    start = time.perf_counter()
    begin.record()
    phase()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return f"GPU {begin.elapsed_time(end):7.2f} ms, host {1e3 * host:7.2f} ms, {over / MIB:6.0f} MiB over the results"


if __name__ == "__main__":
    main()
