"""How much memory a call takes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

R = TypeVar("R")


def peak_of(call: Callable[[], R]) -> tuple[R, int]:
    """The result of ``call``, and the most bytes it held at any moment.

    The profiler reports every allocation and release of the CPU allocator, those inside an operator too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    found = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"), key=lambda change: change[0]
    )
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return result, peak


def size_of(fields: Any) -> int:
    """Bytes of all tensors of a dataclass."""
    return sum(x.nbytes for x in vars(fields).values() if x is not None)
