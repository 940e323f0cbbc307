"""What would run and why, and how much of the logits the filter leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce import registry
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.shared.rows import rows_in_use
from cce.backends.shared.worklist import live_fraction as fraction_of
from cce.backends.shared.worklist import work_list
from cce.distributed.vocab_parallel import operands
from cce.errors import BackendUnavailable
from cce.frontend import checks, operators
from cce.frontend.flatten import autocast, wanted_gradients
from cce.frontend.mean_logit import mean_logit_order
from cce.functional import LOSS_OPTIONS
from cce.spec import Spec


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

    Takes the arguments of :func:`cce.loss`; nothing is computed.

    Raises:
        TypeError, ValueError: as :func:`cce.loss`, or an option it does not have.

    >>> print(explain(torch.randn(8, 4), torch.randn(10, 4), torch.zeros(8, dtype=torch.long)).backend)
    torch
    """
    unknown = sorted(set(options) - LOSS_OPTIONS)
    if unknown:
        raise TypeError(f"{unknown[0]}: got {options[unknown[0]]!r}, expected an option of cce.loss")
    soft = options.get("target_weight") is not None
    e, c, bias, targets, split = operands(e, c, bias, targets, options.get("vocab_parallel"))
    checks.check_tensors(e, c, targets, bias, options.get("target_weight"), part=split is not None)
    checks.check_options(**_shared_options(options), backend=backend, spec=spec)
    lead = targets.shape[:-1] if soft else targets.shape
    v = c.shape[0] if split is None else None  # other processes are not asked
    checks.check_loss_options(**_loss_options(options), v=v, lead=lead, device=c.device)
    checks.check_shift(options.get("shift", 0), targets, len(lead))
    checks.check_vocab_order(spec or Spec(), c.shape[0])
    e, c, bias = autocast(e, c, bias)
    problem = Problem.of(
        e.reshape(-1, c.shape[1]),
        c,
        bias,
        targets.reshape(-1, targets.shape[-1] if soft else 1),
        options.get("softcap"),
        float(options.get("logit_scale", 1.0)),
        "weighted_logit" if options.get("label_smoothing") else "",
        wanted_gradients(e, c, bias),
    )
    resolved = resolve(spec or Spec(), problem)
    reasons = {name: registry.reasons(name, problem, resolved) for name in registry.list_backends()}
    reasons |= registry.passed_over()
    try:
        chosen = registry.choose_name(backend, problem, resolved)
    except BackendUnavailable:
        chosen = None
    note = registry.note(chosen, problem, resolved) if chosen else ""
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
    checks.check_tensors(e, c, targets, bias, None)
    checks.check_options(
        **_shared_options({"ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale}),
        backend=backend,
        spec=spec,
    )
    spec = spec or Spec()
    checks.check_vocab_order(spec, c.shape[0])
    flat = operators.prepare_targets(targets.reshape(-1, 1), c.shape[0], ignore_index)
    e, c, bias = autocast(e, c, bias)
    rows, used = rows_in_use(flat)
    problem = Problem.of(e.reshape(-1, c.shape[1]), c, bias, used, softcap, logit_scale, "", "e,c")
    resolved = resolve(spec, problem)
    if resolved.filter == "none" or problem.n == 0:
        return 1.0
    flat_e, c = e.detach().reshape(-1, c.shape[1]), c.detach()
    order = None if spec.permutation is None else spec.permutation.to(e.device)
    if resolved.vocab_order == "mean_logit":
        order = mean_logit_order(flat_e, c, bias, flat)
    inputs = Inputs(flat_e, c, used, bias, rows, None, order)
    outputs, maps = run_forward(backend, inputs, problem, resolved)
    one = torch.ones_like(outputs.lse)
    work = work_list(inputs, problem, resolved, maps, Upstream(one, one[:, None]))
    return fraction_of(work, problem, resolved)


def run_forward(
    backend: str, inputs: Inputs[Tensor], problem: Problem, spec: Spec
) -> tuple[Outputs[Tensor], Maps[Tensor]]:
    """One forward of a backend outside autograd, with maps allocated for it."""
    shape = (spec.tiles(problem.v), problem.n)
    maps = Maps(**{name: inputs.e.new_empty(shape, dtype=problem.map_dtype(spec)) for name in problem.maps(spec)})
    with torch.no_grad():
        return registry.choose(backend, problem, spec).forward(inputs, problem, spec, maps), maps


def _loss_options(options: dict[str, Any]) -> dict[str, Any]:
    names = {"reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "weight": None, "token_weight": None}
    return {name: options.get(name, default) for name, default in names.items()}


def _shared_options(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"ignore_index": -100, "shift": 0, "softcap": None, "logit_scale": 1.0}
    return {name: options.get(name, default) for name, default in defaults.items()}
