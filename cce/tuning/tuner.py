"""``cce.tuning.autotune``: the fastest launch configuration for one problem on this GPU, kept for later processes.

Neither this module nor what it imports needs Triton.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cce.backends.triton import tunecache
from cce.backends.triton.launch import Launch
from cce.spec import Spec
from cce.tuning.candidates import kernels_of
from cce.tuning.search import Progress, Row, Timer, Tuned, tune


def autotune(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    spec: Spec | None = None,
    outputs: Sequence[str] = (),
    rounds: int = 5,
    timer: Timer | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Finds the fastest launch configuration of the ``triton`` backend for a call of :func:`cce.loss` on this GPU.

    It is kept on disk (docs/tuning.md), and used from then on, by this process too. That takes some minutes, most of
    them for compiling, and memory for a second set of gradients. Tensors are to be as in a training step, and want
    gradients where that does: with a filter, the time depends on what they hold.

    Args:
        e: (..., D); c: (V, D); targets, bias: as in :func:`cce.loss`, on the GPU.
        spec: as in :func:`cce.loss`.
        outputs: "entropy" and "prediction", if :func:`cce.terms` is called for them.
        rounds: of measurements, in each of which all candidates take their turn.
        timer: returns the milliseconds a step of a :class:`Trial` takes; None measures with CUDA events.
        progress: is told how many steps are done, out of how many, and what comes next.
        options: others of :func:`cce.loss`.

    Returns:
        Tuned: the configuration, all that was tried, and the file.

    Raises:
        TypeError, ValueError: a bad argument; ``CCE_TUNE_CACHE`` is off or cannot be written; a result is not finite.
        BackendUnavailable: the backend cannot run this problem.
    """
    from cce.tuning.prepare import prepare  # imports Triton

    if not isinstance(rounds, int) or isinstance(rounds, bool):
        raise TypeError(f"rounds: got {rounds!r} of type {type(rounds).__name__}, expected an int")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected an int >= 1")
    for name, function in (("timer", timer), ("progress", progress)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: got {function!r} of type {type(function).__name__}, expected a callable or None")
    where = tunecache.writable()
    ready = prepare(e, c, targets, bias, spec, outputs, timer, options)
    launch, rows = tune(
        ready.runner, ready.launch, ready.problem, ready.spec, ready.device, ready.timer, rounds, progress
    )
    return Tuned(launch, rows, _keep(where, ready.keys, launch, rows, kernels_of(ready.problem, ready.spec)))


def _keep(where: Path, keys: Sequence[str], launch: Launch, rows: Sequence[Row], kernels: Sequence[str]) -> Path:
    """Writes the configuration under all ``keys``, and has this process use it."""
    from cce.backends.triton.choice import forget

    notes: Mapping[str, Any] = {
        "tuned": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "times": [
            {"kernel": row.kernel, "tile": str(row.tile), "ms": row.ms, "ratio": row.ratio, "note": row.note}
            for row in rows
        ],
    }
    paths = [tunecache.store(where, key, launch.tiles(kernels), notes) for key in keys]
    forget()
    return paths[0]
