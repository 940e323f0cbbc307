"""The studies: heads of models, scaling of the cost with V, N and D, and the effect of the filter's threshold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import cce
from cce import registry
from cce.backends.resolve import resolve
from cce.benchmarks import heads, statistics, timing
from cce.benchmarks.candidates import MODES, candidates, one_line
from cce.benchmarks.extend import extend, load
from cce.benchmarks.heads import Head
from cce.benchmarks.measure import PASSES, Effort, Row, Slow, measured
from cce.benchmarks.peers import PEERS
from cce.benchmarks.shapes import Shape

DATA = ("random", "synthetic", "trained")
TRAINED = "trained-"  # followed by the name of the state's file
#: Fixed sizes, and the values of the varying one; a quick run leaves out the larger ones.
SCALING = {
    "cuda": {
        "vocabulary": (Shape("V", 4096, 2048, 0), (8192, 32_768, 131_072, 262_144, 524_288, 1_048_576)),
        "tokens": (Shape("N", 0, 2304, 256_000), (256, 1024, 4096, 8192, 16_384, 32_768)),
        "width": (Shape("D", 8192, 0, 131_072), (512, 1024, 2048, 4096, 8192)),
    },
    "cpu": {
        "vocabulary": (Shape("V", 64, 128, 0), (8192, 32_768, 131_072, 524_288, 1_048_576)),
        "tokens": (Shape("N", 0, 128, 32_768), (64, 128, 256, 512, 1024)),
        "width": (Shape("D", 128, 0, 32_768), (64, 128, 256, 512)),
    },
}
STUDIES = ("heads", *SCALING["cuda"], "filter")
POWERS = (8, 10, 12, 13, 14, 16, 18)  # thresholds of the filter's study: 2^-8, ...
QUICK_POWERS = (10, 13, 16)


@dataclass(frozen=True)
class Options:
    """Choices of the user.

    Attributes:
        device, dtype: those of the inputs.
        shapes: shapes of the study "heads".
        studies, backends, modes, passes, peers: names, explained in the command's help.
        data: "random", "synthetic", or keys of ``trained``.
        trained: files written by ``bench/train_lm.py`` or ``cce demo --save``, by name.
        quick: whether sweeps are smaller.
        effort: duration of measurements; ``sweep_effort``: that in the other studies, which have many more points.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    studies: tuple[str, ...] = ("heads",)
    data: tuple[str, ...] = ("random", "synthetic")
    backends: tuple[str, ...] = field(default_factory=lambda: tuple(cce.list_backends()))
    modes: tuple[str, ...] = tuple(MODES)
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = tuple(PEERS)
    trained: dict[str, Path] = field(default_factory=dict)
    quick: bool = False
    effort: Effort = field(default_factory=Effort)
    sweep_effort: Effort = field(default_factory=lambda: Effort(3, 60))


@dataclass(frozen=True)
class Job:
    """One head of a study, and the candidates compared on it."""

    study: str
    shape: Shape
    data: str
    specs: dict[str, cce.Spec]
    passes: tuple[str, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]


def jobs(options: Options) -> Iterator[Job]:
    """Heads of all chosen studies, small ones first within a sweep."""
    modes = {name: MODES[name] for name in options.modes}
    for study in options.studies:
        if study == "heads":
            for shape in options.shapes:
                for data in options.data:
                    yield Job(study, shape, data, modes, options.passes, options.backends, options.peers)
        elif study == "filter":
            shape, able = options.shapes[0], _compared(options)[:1]
            for data in [name for name in options.data if name != "random"]:
                yield Job(study, shape, data, filter_specs(options.quick), PASSES[1:], able, ())
        else:
            fixed, sizes = SCALING["cuda" if options.device.type == "cuda" else "cpu"][study]
            for size in sizes[: 3 if options.quick else None]:
                sizes_of: dict[str, Any] = {fixed.name.lower(): size}
                shape = replace(fixed, **sizes_of)
                few = tuple(name for name in options.peers if name in ("eager", "compiled", "torch-chunked", "liger"))
                specs = {name: spec for name, spec in modes.items() if name != "uncompensated"}
                yield Job(study, shape, "synthetic", specs, PASSES[1:], _compared(options), few)


def filter_specs(quick: bool) -> dict[str, cce.Spec]:
    """Specs by name: thresholds with and without compensation and orders, as "2^-13, compensated, mean_logit, live"."""
    specs = {"exact": MODES["exact"]}
    for power in QUICK_POWERS if quick else POWERS:
        for compensate, vocab, rows in (
            (True, "mean_logit", "live"),
            (False, "mean_logit", "live"),
            (True, "natural", "live"),
            (True, "mean_logit", "natural"),
        ):
            name = f"2^-{power}, {'compensated' if compensate else 'not compensated'}, {vocab}, {rows}"
            specs[name] = cce.Spec(
                filter="element", threshold=2.0**-power, compensate=compensate, vocab_order=vocab, row_order=rows
            )
    return specs


def run(options: Options) -> Iterator[str | Row]:
    """Yield the rows of all studies, and before each, lines that report progress."""
    bandwidth = timing.bandwidth(options.device)
    slow: dict[tuple[str, ...], Slow] = defaultdict(dict)
    for job in jobs(options):
        shape = job.shape
        base: Row = {"study": job.study, "shape": shape.name, "n": shape.n, "d": shape.d, "v": shape.v}
        base |= {"data": job.data, "dtype": str(options.dtype).removeprefix("torch.")}
        yield f"{job.study}: {shape.label}, {job.data}"
        try:
            head = make_head(job.data, shape, options)
        except (ValueError, torch.OutOfMemoryError) as error:
            yield {**base, "kind": "data", "status": "failed", "reason": one_line(error)}
            continue
        yield {**base, "kind": "data", "status": "ok", **statistics.summary(head)}
        found = candidates(head, job.backends, job.specs, job.peers)
        effort = options.effort if job.study == "heads" else options.sweep_effort
        # A candidate slow on a head is also slow on its other data, and one slow in a sweep is also slow on larger
        # sizes.
        known = slow[job.study, shape.label] if job.study in ("heads", "filter") else slow[job.study,]
        for each in measured(head, found, job.passes, effort, bandwidth, known):
            yield each if isinstance(each, str) else {**base, "kind": "time", **each}
        del head, found


def make_head(data: str, shape: Shape, options: Options) -> Head:
    """Make the problem of a shape.

    Raises:
        ValueError: trained data have larger sizes.
    """
    makers: dict[str, Callable[..., Head]] = {"random": heads.random, "synthetic": heads.synthetic}
    if data in makers:
        return makers[data](shape.n, shape.d, shape.v, options.dtype, options.device)
    head = extend(load(options.trained[data], options.device), shape.n, shape.d, shape.v)
    return Head(data, head.e.to(options.dtype), head.c.to(options.dtype), head.targets)


def _compared(options: Options) -> tuple[str, ...]:
    """Chosen backends that can run here, with the one ``backend="auto"`` takes first."""
    problem: dict[str, Any] = {"e_dtype": options.dtype, "c_dtype": options.dtype, "device": options.device.type}
    step = cce.backends.problem.Problem(n=256, v=1024, d=256, grad_e=True, grad_c=True, **problem)
    spec = resolve(cce.Spec(), step)
    able = [name for name in options.backends if name != "reference" and not registry.reasons(name, step, spec)]
    first = registry.choose_name("auto", step, spec)
    return tuple(sorted(able, key=lambda name: name != first))
