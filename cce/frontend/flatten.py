"""A call as one row a token: what :func:`cce.terms`, :func:`cce.loss` and the operators agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce.distributed.join import Part
from cce.distributed.operands import operands
from cce.distributed.vocab_parallel import VocabParallel, agree, tell_refusal
from cce.frontend import checks, decision, tracing
from cce.frontend.decision import Call, Request
from cce.frontend.targets import prepare
from cce.spec import Spec

_DEFAULT_SPEC = Spec()


class Flat(NamedTuple):
    """The arguments of a call, one row a token."""

    e: Tensor  # (M, D)
    c: Tensor
    bias: Tensor | None
    targets: Tensor  # (M, K), -1 where ignored
    shape: torch.Size  # of one value a token, before the shift
    shift: int
    spec: Spec
    request: Request
    scale: Tensor | None = None  # logit_scale where compiled code has it as an input
    call: Call | None = None  # None where compiled or transformed code decides when it runs
    coefficients: Tensor | None = None  # (M, K) target_weight, 0 where ignored
    mean_weights: Tensor | None = None  # (M, 1) those of a plain mean, where wanted
    part: Part | None = None
    own: tuple[int, ...] | None = None  # tokens of every process, where each passes its own

    @property
    def v(self) -> int:
        """V of the whole vocabulary."""
        return self.c.shape[0] if self.part is None else self.part.total

    @property
    def order(self) -> Tensor | None:
        order = self.spec.permutation
        return None if order is None else order.to(self.e.device)

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the outputs: the accumulation dtype."""
        inputs = torch.promote_types(self.e.dtype, self.c.dtype)
        return torch.float64 if "float64" in (self.spec.accumulate, str(inputs)[6:]) else torch.float32


def flatten(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    shift: int,
    softcap: float | None,
    logit_scale: float,
    target_weight: Tensor | None,
    backend: str,
    spec: Spec | None,
    vocab_parallel: Any,
    signature: Mapping[str, Any],
    outputs: tuple[str, ...] = (),
    plain_mean: bool = False,
    check: Callable[..., None] | None = None,
) -> Flat:
    """Check the arguments, make one row a token of them, and decide how the call runs.

    Args:
        signature: what else must be the same on all processes of a split vocabulary, numbers and strings by name.
        outputs: those of ``EXTRA_OUTPUTS`` that are wanted.
        plain_mean: the weights of a mean may be wanted, no tensor being one of them.
        check: checks the options that :func:`cce.terms` does not have; called with ``lead`` and ``device`` of the call,
            and with ``v``, the number of entries of the whole vocabulary, or None while it is not known.
    """
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "shift": shift,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "backend": backend,
    }
    e, c, bias, targets, split = operands(e, c, bias, targets, vocab_parallel)
    try:
        flat = arrange(e, c, targets, bias, target_weight, spec, outputs, options, part=split is not None)
        if check is not None:
            check(v=flat.v if split is None else None, lead=flat.shape, device=flat.e.device)
        if not tracing.traced(flat.e) and not tracing.active():
            # Of a split vocabulary too: a backend that cannot run it is to be told before the processes agree.
            call = decision.decide(flat.e, flat.c, flat.bias, flat.targets, flat.request.key)
            flat = flat._replace(call=call)
    except Exception as error:
        tell_refusal(split, error, e, c, targets)
        raise
    if split is not None:
        flat = _split(flat, split, {**options, "target_weight": target_weight is not None, **signature})
        if check is not None:
            check(v=flat.v, lead=flat.shape, device=flat.e.device)
    return _prepared(flat, ignore_index, target_weight, plain_mean)


def arrange(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    target_weight: Tensor | None,
    spec: Spec | None,
    outputs: tuple[str, ...],
    options: Mapping[str, Any],
    *,
    part: bool = False,
) -> Flat:
    """Check the arguments, but for the targets' values, and make one row a token of them.

    Args:
        part: ``c`` is a part of a vocabulary, so that no number of entries is expected of it.
        options: ignore_index, shift, softcap, logit_scale and backend.
    """
    checks.check_tensors(e, c, targets, bias, target_weight, part=part)
    checks.check_options(**options, spec=spec)
    checks.check_vocab_order(spec or _DEFAULT_SPEC, c.shape[0])
    checks.check_shift(options["shift"], targets, targets.ndim - (target_weight is not None))
    flat = _arranged(e, c, targets, bias, target_weight, spec, outputs, options)
    checks.check_range(flat.wide, softcap=flat.request.softcap, logit_scale=options["logit_scale"])
    return flat


def _arranged(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    target_weight: Tensor | None,
    spec: Spec | None,
    outputs: tuple[str, ...],
    options: Mapping[str, Any],
) -> Flat:
    """One row a token of arguments that have been checked."""
    spec = _DEFAULT_SPEC if spec is None else spec
    lead = targets.ndim - (target_weight is not None)
    rows, shift = _rows(targets, options["shift"], lead, options["ignore_index"])
    e, c, bias = autocast(e, c, bias)
    e = e if e.ndim == 2 else e.reshape(-1, c.shape[1])
    softcap = None if options["softcap"] is None else float(options["softcap"])
    scale, number = _scale(options["logit_scale"])
    request = Request(
        options["backend"], spec.key, softcap, number, ",".join(outputs), wanted_gradients(e, c, bias)
    )  # fmt: skip
    return Flat(e, c, bias, rows, targets.shape[:lead], shift, spec, request, scale)


def again(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    shift: int,
    spec: Spec | None,
    plain_mean: bool,
    known: Call,
) -> Flat:
    """One row a token of a call whose kind is known (plain tensors, no target weights); host time counts here.

    Args:
        known: what an earlier call of this kind was decided to be; all but the targets' values is good.
        others: as of :func:`flatten`.
    """
    shape = targets.shape
    if shift or targets.dtype in checks.UNSIGNED:
        targets, shift = _rows(targets, shift, len(shape), ignore_index)
    e = e if e.ndim == 2 else e.reshape(-1, known.problem.d)
    spec = _DEFAULT_SPEC if spec is None else spec
    wide = known.results.wide if plain_mean and known.one_pass is not None else None
    rows, weights = prepare(targets.reshape(-1, 1), known.problem.v, ignore_index, known.backend, wide)
    return Flat(e, c, bias, rows, shape, shift, spec, known.request, None, known, None, weights)


def _rows(targets: Tensor, shift: int, lead: int, ignore_index: int) -> tuple[Tensor, int]:
    """Targets (M, K), a row for each row of ``e``, and the shift; ``lead`` dimensions of the targets are tokens."""
    if shift:
        shift = min(shift, targets.shape[lead - 1])  # nothing is predicted in a sequence that is no longer
    if shift or targets.dtype in checks.UNSIGNED:
        targets = _as_int64(targets)  # narrower ones may not hold ignore_index
    k = 1 if lead == targets.ndim else targets.shape[-1]
    return shifted(targets, shift, lead, ignore_index).reshape(-1, k), shift


def _scale(logit_scale: float) -> tuple[Tensor | None, float]:
    """The number as a tensor, if it is an input of compiled code, and the number that the request holds instead."""
    if not tracing.symbolic(logit_scale):
        return None, float(logit_scale)
    # A number of an operator's arguments would be a constant of the compiled code, which would be compiled anew.
    return torch.ones((), dtype=torch.float64, device="cpu") * logit_scale, 1.0


def _prepared(flat: Flat, ignore_index: int, target_weight: Tensor | None, plain_mean: bool) -> Flat:
    """The same call with its targets' values checked, and weights that are 0 where targets are ignored."""
    backend = None if flat.call is None else flat.call.backend
    weighted = plain_mean and flat.call is not None and flat.call.one_pass is not None
    rows, weights = prepare(flat.targets, flat.v, ignore_index, backend, flat.wide if weighted else None)
    flat = flat._replace(targets=rows, mean_weights=weights)
    if target_weight is None:
        return flat
    lead = target_weight.ndim - 1
    coefficients = shifted(target_weight, flat.shift, lead, 0).reshape(rows.shape).to(flat.wide)
    return flat._replace(coefficients=coefficients.masked_fill(rows < 0, 0))


def _as_int64(targets: Tensor) -> Tensor:
    """The targets as int64; those of uint64 beyond it become its largest number, which is no entry, not one below 0."""
    found = targets.to(torch.int64)
    return found.where(found >= 0, 2**63 - 1) if targets.dtype == torch.uint64 else found


def _split(flat: Flat, split: VocabParallel, options: Mapping[str, Any]) -> Flat:
    """Agree with the other processes on the parts of the vocabulary, and on each one's tokens if it has its own."""
    found = agree(split, flat.e, flat.c, flat.bias, flat.targets, flat.spec, flat.request.grads, options)
    part = Part(found.group, sum(found.sizes[: found.rank]), found.sizes, split.reduce_de)
    request = flat.request._replace(part=found.part)
    # What was decided before is the call of this part as a whole vocabulary, which has a pass of its own.
    call = None if flat.call is None else replace(flat.call, one_pass=None)
    own = found.rows if split.tokens == "own" else None
    return flat._replace(part=part, request=request, call=call, own=own)


def unflatten(x: Tensor, flat: Flat) -> Tensor:
    """One value a token, of the targets' shape without the first ``shift`` of each sequence."""
    x = x.reshape(flat.shape)
    return x if not flat.shift else x.narrow(-1, 0, flat.shape[-1] - flat.shift)


def shifted(x: Tensor, shift: int, lead: int, fill: int) -> Tensor:
    """``x[..., shift:]`` along dimension ``lead - 1``, filled up at the end: what each row of ``e`` predicts."""
    if not shift:
        return x
    moved = x.narrow(lead - 1, shift, x.shape[lead - 1] - shift)
    tail = torch.full_like(x.narrow(lead - 1, 0, shift), fill)
    return torch.cat([moved, tail], dim=lead - 1)


def wanted_gradients(e: Tensor, c: Tensor, bias: Tensor | None) -> str:
    """Names of the gradients that may be asked for, so that the forward keeps maps only if they will be used."""
    if not torch.is_grad_enabled():
        return ""
    return ",".join(n for n, x in (("e", e), ("c", c), ("bias", bias)) if x is not None and x.requires_grad)


def autocast(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts F.linear makes under autocast (which leaves float64 alone)."""
    device = e.device.type
    # Not every device has it; torch.compile cannot ask for it (torch 2.11), but compiles for those that have.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device) or torch.float64 in (e.dtype, c.dtype):
        return e, c, bias
    dtype = torch.get_autocast_dtype(device)
    return e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)
