"""``cce.tuning.autotune``: the fastest launch configuration for one problem on this GPU, kept for later processes.

Neither this module nor its imports need Triton.
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
    """Find the fastest launch configuration of the ``triton`` backend for a call of :func:`cce.loss` on this GPU.

    It is kept on disk (docs/tuning.md) and used from then on, including by this process. Tuning takes some minutes,
    mostly for compiling, and memory for a second set of gradients. Tensors should be as in a training step, and require
    gradients as there: with a filter, the time depends on their values.

    Args:
        e: (..., D); c: (V, D); targets, bias: as in :func:`cce.loss`, on the GPU.
        spec: as in :func:`cce.loss`.
        outputs: "entropy" and "prediction", if :func:`cce.terms` will be called for them.
        rounds: rounds of measurements, in each of which all candidates take a turn.
        timer: function that returns the milliseconds per step of a :class:`Trial`; None measures with CUDA events.
        progress: callback(steps done, total steps, description of the next step), or None.
        options: other options of :func:`cce.loss`.

    Returns:
        Tuned: the configuration, the result of every trial, and the path of the file.

    Raises:
        TypeError, ValueError: an argument is bad, ``CCE_TUNE_CACHE`` is "off" or cannot be written to, or a result is
            not finite.
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
    """Write the configuration under all ``keys``, and make this process use it."""
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
