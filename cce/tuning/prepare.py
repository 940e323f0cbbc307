"""From the arguments of ``cce.loss`` to what the tuner runs and how it takes the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce import registry
from cce.backends.gpu.sizes import power_of_two
from cce.backends.problem import EXTRA_OUTPUTS, Inputs, Problem
from cce.backends.resolve import resolve
from cce.backends.triton.call import gpu_of
from cce.backends.triton.launch import Device, Launch, shipped
from cce.backends.triton.tunecache import key_of
from cce.diagnostics import explain
from cce.errors import BackendUnavailable
from cce.frontend import checks, operators
from cce.frontend.flatten import autocast
from cce.frontend.mean_logit import mean_logit_order
from cce.frontend.rows import own_dtypes
from cce.spec import Spec
from cce.tuning.phases import Work
from cce.tuning.search import Runner, Timer, Trial


@dataclass(frozen=True)
class Prepared:
    """A problem to tune.

    Attributes:
        runner: runs it; launch: what is shipped for it.
        problem, spec, device: as :func:`cce.backends.triton.choice.choose` is asked; ``spec`` is resolved.
        timer: of trials.
        keys: of the cache, under which the result is good.
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
    """Checks the arguments of :func:`cce.tuning.autotune` and has the shipped configuration run once."""
    problem, resolved = _problem(e, c, targets, bias, spec, outputs, options)
    if timer is None and e.device.type != "cuda":
        raise ValueError(f"e: got device {e.device}, expected a CUDA device: Triton's interpreter tells no times")
    inputs = _inputs(e, c, targets, bias, spec, resolved, options)
    used = int((inputs.targets >= 0).any(1).sum())
    if not used:
        raise ValueError("targets: got none but ignore_index, expected some that count")
    device = gpu_of(inputs.e.device)
    launch = shipped(problem, resolved, device)
    runner = Work(inputs, problem, resolved, launch)
    # The exact backward leaves out rows without a target, and asks for the configuration of so many.
    sizes = {power_of_two(problem.n)} | ({power_of_two(used)} if resolved.filter == "none" else set())
    ordered = inputs.vocab_order is not None
    keys = tuple(key_of(replace(problem, n=n), resolved, device, ordered) for n in sorted(sizes, reverse=True))
    return Prepared(runner, launch, problem, resolved, device, timer or EventTimer(inputs.e.device), keys)


def _problem(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec | None,
    outputs: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[Problem, Spec]:
    if len(outputs):
        checks.check_outputs(outputs)
    found = explain(e, c, targets, bias, backend="triton", spec=spec, **options)
    extra, softcap = frozenset(outputs) & set(EXTRA_OUTPUTS), found.problem.softcap
    softcap = None if softcap is None else float(softcap)  # an int would make another kernel
    problem = replace(found.problem, outputs=found.problem.outputs | extra, softcap=softcap)
    resolved = resolve(spec or Spec(), problem)
    reasons = registry.reasons("triton", problem, resolved)
    if reasons:
        raise BackendUnavailable("\n".join([f"backend 'triton' cannot run {problem} with {resolved}:", *reasons]))
    if problem.n == 0:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected at least one row")
    return problem, resolved


def _inputs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec | None,
    resolved: Spec,
    options: Mapping[str, Any],
) -> Inputs[Tensor]:
    """As the front end makes them."""
    soft = options.get("target_weight") is not None
    ignore_index, shift = options.get("ignore_index", -100), options.get("shift", 0)
    if shift:
        along = targets.ndim - 1 - soft
        moved = targets.narrow(along, shift, targets.shape[along] - shift)
        targets = torch.cat([moved, torch.full_like(targets.narrow(along, 0, shift), ignore_index)], dim=along)
    flat = operators.prepare_targets(targets.reshape(-1, targets.shape[-1] if soft else 1), c.shape[0], ignore_index)
    e, c, bias = autocast(e, c, bias)
    e, c = e.detach().reshape(-1, c.shape[1]), c.detach()
    bias = None if bias is None else bias.detach()
    order = None if spec is None or spec.permutation is None else spec.permutation.to(e.device)
    if order is None and resolved.vocab_order == "mean_logit":
        with own_dtypes(e):
            order = mean_logit_order(e, c, bias, flat)
    return Inputs(e, c, flat, bias, vocab_order=order)


class EventTimer:
    """GPU time by CUDA events, of steps that together run for a while, without a pause, as in training.

    A power-capped card lowers its clock with the work of the last tenth of a second: a single launch would be timed at
    a clock that training never sees.
    """

    #: Cycles of a kernel that sleeps, while the host runs ahead.
    _HEAD_START = 20_000_000

    def __init__(self, device: torch.device, span_ms: float = 60) -> None:
        self._device, self._span_ms = device, span_ms
        self._steps: dict[str, int] = {}

    def __call__(self, trial: Trial) -> float:
        if trial.kernel not in self._steps:  # the shipped tile comes first: all get its number of steps
            self._measure(trial, 1)  # compiled, and its memory allocated
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
