"""A call as one row a token: what :func:`cce.terms`, :func:`cce.loss` and the operators agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce.distributed import tokens
from cce.distributed.join import Part
from cce.distributed.vocab_parallel import VocabParallel, agree, operands, tell_refusal
from cce.frontend import checks, operators, transforms
from cce.spec import Spec

_DEFAULT_SPEC = Spec()


class Flat(NamedTuple):
    """The arguments of a call, one row a token."""

    e: Tensor  # (M, D)
    c: Tensor
    bias: Tensor | None
    targets: Tensor  # (M, K), -1 where ignored
    coefficients: Tensor | None  # (M, K) target_weight, 0 where ignored
    shape: torch.Size  # of one value a token, before the shift
    shift: int
    softcap: float | None
    logit_scale: float
    backend: str
    spec: Spec
    part: Part | None = None
    own: tuple[int, ...] | None = None  # tokens of every process, where each passes its own

    @property
    def v(self) -> int:
        """Of the whole vocabulary."""
        return self.c.shape[0] if self.part is None else self.part.total

    @property
    def order(self) -> Tensor | None:
        order = self.spec.permutation
        return None if order is None else order.to(self.e.device)

    @property
    def wide(self) -> torch.dtype:
        """Of the outputs: the accumulation dtype."""
        inputs = torch.promote_types(self.e.dtype, self.c.dtype)
        return torch.float64 if "float64" in (self.spec.accumulate, str(inputs)[6:]) else torch.float32


class Rows(NamedTuple):
    """What the operator returns, per row of the flattened ``e`` (M,)."""

    lse: Tensor
    nll: Tensor  # (M, K)
    lse_low: Tensor
    entropy: Tensor
    weighted_logit: Tensor
    prediction: Tensor


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
) -> Flat:
    """Checks the arguments; makes one row a token of them.

    ``signature``: what else must be the same on all processes of a split vocabulary, numbers and strings by name.
    """
    e, c, bias, targets, split = operands(e, c, bias, targets, vocab_parallel)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "shift": shift,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    options |= {"backend": backend, "target_weight": target_weight is not None, **signature}
    try:
        checks.check_tensors(e, c, targets, bias, target_weight, part=split is not None)
        checks.check_options(
            ignore_index=ignore_index,
            shift=shift,
            softcap=softcap,
            logit_scale=logit_scale,
            backend=backend,
            spec=spec,
        )
        spec = _DEFAULT_SPEC if spec is None else spec
        checks.check_vocab_order(spec, c.shape[0])
        lead = targets.ndim - (target_weight is not None)
        checks.check_shift(shift, targets, lead)
        shape = targets.shape[:lead]
        k = 1 if target_weight is None else targets.shape[-1]
        if shift:
            shift = min(shift, shape[-1])  # nothing is predicted in a sequence that is no longer
        if shift or targets.dtype in checks.UNSIGNED:
            targets = _as_int64(targets)  # narrower ones may not hold ignore_index
        rows = shifted(targets, shift, lead, ignore_index).reshape(-1, k)
        e, c, bias = autocast(e, c, bias)
        softcap = None if softcap is None else float(softcap)
        if not transforms.symbolic(logit_scale):
            logit_scale = float(logit_scale)
        flat = Flat(e.reshape(-1, c.shape[1]), c, bias, rows, None, shape, shift, softcap, logit_scale, backend, spec)
        checks.check_range(flat.wide, softcap=softcap, logit_scale=logit_scale)
    except Exception as error:
        tell_refusal(split, error, e, c, targets)
        raise
    if split is not None:
        flat = _split(flat, split, options)
    prepare = operators.prepare_targets_op if transforms.traced(e) else operators.prepare_targets
    if transforms.active():
        prepare = transforms.prepare_targets
    rows = prepare(rows, flat.v, ignore_index)
    flat = flat._replace(targets=rows)
    if target_weight is None:
        return flat
    coefficients = shifted(target_weight, shift, lead, 0).reshape(-1, k).to(flat.wide)
    return flat._replace(coefficients=coefficients.masked_fill(rows < 0, 0))


def _as_int64(targets: Tensor) -> Tensor:
    """The targets; those of uint64 beyond int64 become its largest number, which is no entry, not one below 0."""
    found = targets.to(torch.int64)
    return found.where(found >= 0, 2**63 - 1) if targets.dtype == torch.uint64 else found


def _split(flat: Flat, split: VocabParallel, options: Mapping[str, Any]) -> Flat:
    """What the other processes hold of the vocabulary, and of the tokens where each has its own."""
    wanted = wanted_gradients(flat.e, flat.c, flat.bias)
    found = agree(split, flat.e, flat.c, flat.bias, flat.targets, flat.spec, wanted, options)
    first = sum(found.sizes[: found.rank])
    part = Part(found.group, first, found.sizes, split.reduce_de)
    return flat._replace(part=part, own=found.rows if split.tokens == "own" else None)


def run(flat: Flat, extra: tuple[str, ...] = (), logit_weight: Tensor | None = None) -> Rows:
    """The operator: lse, nll and the ``extra`` outputs of every row."""
    if flat.own is not None and flat.part is not None:
        group, own = flat.part.group, flat.own
        every = flat._replace(
            e=tokens.gather_rows(flat.e, group, own), targets=tokens.gather_rows(flat.targets, group, own), own=None
        )
        return Rows(*(tokens.own_rows(x, group, own) if x.numel() else x for x in run(every, extra, logit_weight)))
    scale, scale_tensor = flat.logit_scale, None
    if transforms.symbolic(scale):
        # As a number it would be a constant of the compiled code, which is compiled anew for the next one.
        scale, scale_tensor = 1.0, torch.ones((), dtype=torch.float64, device="cpu") * scale
    found = (transforms.forward if transforms.active() else operators.forward)(
        flat.e,
        flat.c,
        flat.bias,
        flat.targets,
        logit_weight,
        flat.order,
        flat.backend,
        flat.spec.key,
        flat.softcap,
        scale,
        scale_tensor,
        ",".join(extra),
        wanted_gradients(flat.e, flat.c, flat.bias),
        "" if flat.part is None else flat.part.key,
    )
    return Rows(*found[:6])


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
    """Which gradients may be asked for, so that the forward keeps maps only if they will be used."""
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
