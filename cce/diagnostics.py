"""Diagnostics: which backend would run and why, and how much of the logits a filter leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from cce import registry
from cce.backends.problem import Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.shared.rows import used_rows
from cce.backends.shared.worklist import live_fraction as fraction_of
from cce.distributed.operands import operands
from cce.errors import BackendUnavailable, describe
from cce.frontend import checks, operators, tracing
from cce.frontend.decision import decide, described
from cce.frontend.flatten import arrange
from cce.frontend.targets import prepare
from cce.functional import LOSS_DEFAULTS, LOSS_OPTIONS, asked
from cce.spec import Spec
from cce.torch_private import fake_tensor_type


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`.

    Attributes:
        backend: the one that would run, or None if none can.
        reasons: for every backend, why it cannot run; an empty list if it can. Entry points whose name cannot be a
            backend's follow, with that of their distribution.
        spec: the resolved spec.
        problem: the metadata the choice was made from.
        note: what the backend says about how it would run; may be empty.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    spec: Spec
    problem: Problem
    note: str = ""

    def __str__(self) -> str:
        p, s = self.problem, self.spec
        lines = [
            f"N={p.n} D={p.d} V={p.v}, e {p.e_dtype}, c {p.c_dtype}, on {p.device}",
            f"would run: {self.backend or 'nothing'}",
            *([self.note] if self.note else []),
            f"filter={s.filter!r} threshold={s.threshold:.3g} compensate={s.compensate}, "
            f"tiles {s.block_n} x {s.block_v}, scratch {s.scratch_bytes / 2**20:.0f} MiB",
        ]
        for name, found in self.reasons.items():
            lines += [f"  {name}: {'can run' if not found else found[0]}"] + [f"    {more}" for more in found[1:]]
        return "\n".join(lines)


def explain(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    spec: Spec | None = None,
    **options: Any,
) -> Explanation:
    """Which backend would run ``cce.loss(e, c, targets, bias, ...)``, and why each other one would not.

    Takes the arguments of :func:`cce.loss`; nothing is computed, and no other process is asked: of a vocabulary split
    by a process group, the default threshold shown is that of a vocabulary of this process's size.

    Raises:
        TypeError, ValueError: as :func:`cce.loss`, or an option it does not have.

    >>> import torch
    >>> print(explain(torch.randn(8, 4), torch.randn(10, 4), torch.zeros(8, dtype=torch.long)).backend)
    torch
    """
    unknown = sorted(set(options) - LOSS_OPTIONS)
    if unknown:
        raise TypeError(f"{unknown[0]}: got {options[unknown[0]]!r}, expected an option of cce.loss")
    given = {**LOSS_DEFAULTS, **options, "backend": backend}
    whole = c
    e, c, bias, targets, split = operands(e, c, bias, targets, given["vocab_parallel"])
    shared = {name: given[name] for name in ("ignore_index", "shift", "softcap", "logit_scale", "backend")}
    outputs = ("weighted_logit",) if asked(given["label_smoothing"]) else ()
    flat = arrange(e, c, targets, bias, given["target_weight"], spec, outputs, shared, part=split is not None)
    checks.check_loss_options(
        **{name: given[name] for name in ("reduction", "label_smoothing", "z_loss", "weight", "token_weight")},
        v=flat.v if split is None else None,  # other processes are not asked
        lead=flat.shape,
        device=flat.c.device,
    )
    problem, _, _ = described(flat.e, flat.c, flat.bias, flat.targets, flat.request)
    resolved = resolve(flat.spec, problem, whole.shape[0])  # a DTensor knows how large the whole is
    reasons = {name: registry.reasons(name, problem, resolved) for name in registry.list_backends()}
    reasons |= registry.passed_over()
    try:
        chosen = registry.choose_name(backend, problem, resolved)
    except BackendUnavailable:
        chosen = None
    note = registry.note(chosen, replace(problem, part=split is not None), resolved) if chosen else ""
    return Explanation(chosen, reasons, resolved, problem, note)


def live_fraction(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    spec: Spec | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> float:
    """Fraction of the logits' gradient the backward would compute for a plain mean loss, in [0, 1].

    Arguments as :func:`cce.loss`; ``e`` (..., D), ``c`` (V, D). Runs one forward. 1.0 means that the filter is
    off or skips nothing. Ignored rows do not count.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`.
    """
    options = {"ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale, "backend": backend}
    flat = arrange(e, c, targets, bias, None, spec, (), {"shift": 0, **options})
    if flat.e.is_meta or isinstance(flat.e, fake_tensor_type()) or tracing.active():
        raise TypeError(f"e: got {describe(e)}, expected a tensor whose values can be looked at")
    request = flat.request._replace(grads="e,c")  # a filter is for a backward
    call = decide(flat.e, flat.c, flat.bias, flat.targets, request.key)
    rows, _ = prepare(flat.targets, flat.v, ignore_index, call.backend)
    if call.spec.filter == "none":
        return 1.0
    found = operators.forward_of(call, flat.e, flat.c, flat.bias, rows, None, flat.order)
    if found is None:
        return 1.0
    used = used_rows(found.inputs)
    count, g = int(used.sum()), used.to(found.outputs.lse.dtype)
    if count == 0:
        return 1.0
    work = call.backend.work_list(found.inputs, found.problem, call.spec, found.maps, Upstream(g, g[:, None]))
    return fraction_of(work, replace(found.problem, n=count), call.spec)
