"""Preparation of a tuning run from the arguments of ``cce.loss``: the problem to run, and its timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.gpu.sizes import power_of_two
from cce.backends.problem import EXTRA_OUTPUTS, Inputs, Problem
from cce.backends.triton.choice import gpu_of
from cce.backends.triton.launch import Device, Launch, shipped
from cce.backends.triton.tunecache import key_of
from cce.diagnostics import explain
from cce.distributed.operands import operands
from cce.errors import describe
from cce.frontend import checks
from cce.frontend.flatten import Flat, flatten
from cce.frontend.mean_logit import mean_logit_order
from cce.frontend.rows import own_dtypes
from cce.functional import SHARED_DEFAULTS
from cce.spec import Spec
from cce.tuning.phases import Work
from cce.tuning.search import Runner, Timer, Trial


@dataclass(frozen=True)
class Prepared:
    """A problem to tune.

    Attributes:
        runner: runs the problem; launch: shipped configuration for it.
        problem, spec, device: as passed to :func:`cce.backends.triton.choice.choose`; ``spec`` is resolved.
        timer: timer of trials.
        keys: keys of the cache for which the result is valid.
    """

    runner: Runner
    launch: Launch
    problem: Problem
    spec: Spec
    device: Device
    timer: Timer
    keys: tuple[str, ...]


def prepare(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec | None,
    outputs: Sequence[str],
    timer: Timer | None,
    options: Mapping[str, Any],
) -> Prepared:
    """Check the arguments of :func:`cce.tuning.autotune`, and run the shipped configuration once."""
    flat = _flat(e, c, targets, bias, spec, outputs, options)
    if timer is None and flat.e.device.type != "cuda":
        raise ValueError(f"e: got device {flat.e.device}, expected a CUDA device: Triton's interpreter cannot be timed")
    if flat.call is None:
        raise TypeError(f"e: got {describe(e)}, expected a plain tensor with values, outside of tracing and transforms")
    problem, resolved = flat.call.problem, flat.call.spec
    inputs = _inputs(flat, resolved)
    used = int((inputs.targets >= 0).any(1).sum())
    if not used:
        raise ValueError("targets: got only ignore_index, expected some that count")
    device = gpu_of(inputs.e.device)
    launch = shipped(problem, resolved, device)
    runner = Work(inputs, problem, resolved, launch)
    # The exact backward leaves out rows without a target, and looks up the configuration for the remaining number.
    sizes = {power_of_two(problem.n)} | ({power_of_two(used)} if resolved.filter == "none" else set())
    ordered = inputs.vocab_order is not None
    keys = tuple(key_of(replace(problem, n=n), resolved, device, ordered) for n in sorted(sizes, reverse=True))
    return Prepared(runner, launch, problem, resolved, device, timer or EventTimer(inputs.e.device), keys)


def _flat(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec | None,
    outputs: Sequence[str],
    options: Mapping[str, Any],
) -> Flat:
    """Call as the front end decides it, for this backend."""
    if len(outputs):
        checks.check_outputs(outputs)
    explain(e, c, targets, bias, backend="triton", spec=spec, **options)  # checks all options
    if operands(e, c, bias, targets, options.get("vocab_parallel")).split is not None:
        raise ValueError("vocab_parallel: got a split vocabulary, expected None: tune one process's part as a whole")
    smoothed = ("weighted_logit",) if options.get("label_smoothing") else ()
    extra = tuple(name for name in EXTRA_OUTPUTS if name in (*outputs, *smoothed))
    given = {**SHARED_DEFAULTS, "target_weight": None, **options, "backend": "triton", "spec": spec}
    taken = {name: given[name] for name in (*SHARED_DEFAULTS, "target_weight")}
    flat = flatten(e, c, targets, bias, signature={}, outputs=extra, **taken)
    if not len(flat.e):
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected at least one row")
    return flat


def _inputs(flat: Flat, resolved: Spec) -> Inputs[Tensor]:
    """Inputs of the call, detached from the graph that computed them."""
    e, c = flat.e.detach(), flat.c.detach()
    bias, order = None if flat.bias is None else flat.bias.detach(), flat.order
    if order is None and resolved.vocab_order == "mean_logit":
        with own_dtypes(e):
            order = mean_logit_order(e, c, bias, flat.targets)
    return Inputs(e, c, flat.targets, bias, vocab_order=order)


class EventTimer:
    """Timer by CUDA events, of steps that run for a while without a pause, as in training.

    A power-capped GPU lowers its clock with the work of the last tenth of a second: a single launch would be timed at a
    clock that training never reaches.
    """

    #: Cycles of a sleeping kernel, during which the host runs ahead.
    _HEAD_START = 20_000_000

    def __init__(self, device: torch.device, span_ms: float = 60) -> None:
        self._device, self._span_ms = device, span_ms
        self._steps: dict[str, int] = {}

    def __call__(self, trial: Trial) -> float:
        if trial.kernel not in self._steps:  # the shipped tile comes first; all others use its number of steps
            self._measure(trial, 1)  # compiles the kernel and allocates its memory
            self._steps[trial.kernel] = min(1000, max(1, round(self._span_ms / self._measure(trial, 2))))
        return self._measure(trial, self._steps[trial.kernel])

    def _measure(self, trial: Trial, steps: int) -> float:
        with torch.cuda.device(self._device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(self._HEAD_START)
            begin.record()
            for _ in range(steps):
                trial()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / steps
