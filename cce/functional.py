"""``cce.terms`` and ``cce.loss``: the front end over every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce import checks, onepass, ops, tokens, transforms
from cce import reduction as reductions
from cce.parallel import Part
from cce.spec import Spec
from cce.vocab_parallel import VocabParallel, agree, operands

_DEFAULT_SPEC = Spec()


class Terms(NamedTuple):
    """Per-token results of :func:`terms`; those not asked for are None.

    Attributes:
        nll: negative log-likelihood of the target, nats; with soft targets ``sum_k w_k (lse - z[target_k])``.
        lse: log-sum-exp of the logits.
        entropy: of the softmax, nats.
        prediction: int64, the vocabulary entry with the largest logit. Not differentiable.
    """

    nll: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    prediction: Tensor | None = None


class _Flat(NamedTuple):
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


class _Rows(NamedTuple):
    """What the operator returns, per row of the flattened ``e`` (M,)."""

    lse: Tensor
    target_logits: Tensor  # (M, K)
    entropy: Tensor
    weighted_logit: Tensor
    prediction: Tensor


def terms(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: Sequence[str] = checks.OUTPUTS,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    target_weight: Tensor | None = None,
    backend: str = "auto",
    spec: Spec | None = None,
    vocab_parallel: Any = None,
) -> Terms:
    """Per-token log-likelihood, log-sum-exp, entropy and prediction of ``softmax(e c^T)``, without the logits.

    Args:
        e: (..., D) hidden states; bfloat16, float16, float32 or float64.
        c: (V, D) classifier, one row a vocabulary entry; may differ from ``e`` in dtype. Under autocast both
            are cast as ``torch.nn.functional.linear`` would.
        targets: integers of ``e``'s leading shape, in [0, V) or ``ignore_index``; with ``target_weight``, (..., K).
        bias: (V,), added to the logits. Entries of -inf mask vocabulary entries.
        outputs: names out of "nll", "lse", "entropy", "prediction"; only these are computed.
        ignore_index: targets of this value cost nothing; their rows are 0 in every output, -1 in ``prediction``.
        shift: ``targets[..., s:]`` are predicted from ``e[..., :-s, :]``, without a copy of ``e``; the results
            have the shape of ``targets[..., s:]``.
        softcap, logit_scale: ``z = softcap * tanh(logit_scale * (e c^T + bias) / softcap)``.
        target_weight: (..., K) weights of K-sparse soft targets (top-k distillation); differentiable.
        backend: "auto", or one of :func:`cce.backends`.
        spec: how to compute it; None means ``cce.Spec()``.
        vocab_parallel: ``c`` (and ``bias``) are this process's rows of a vocabulary split over a process group: the
            group, a one-dimensional ``DeviceMesh``, or a :class:`cce.VocabParallel`. Not needed where ``c`` is a
            DTensor sharded on dimension 0. All processes must make the same call.

    Returns:
        Terms: tensors of ``targets``' shape (without K; shortened by ``shift``), float32, or float64 for float64
        inputs. ``nll``, ``lse`` and ``entropy`` are differentiable once; ``nll`` and ``entropy`` of ordinary
        targets are never negative.

    Raises:
        TypeError, ValueError: a bad argument, named with its value. A target outside [0, V) on a GPU is a
            device-side assertion unless CCE_CHECK_TARGETS=1.
        BackendUnavailable: the backend cannot run this problem; all reasons are listed.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, section 4.

    >>> e, c = torch.eye(3), torch.eye(3)
    >>> terms(e, c, torch.tensor([0, 1, 2]), outputs=["prediction"]).prediction
    tensor([0, 1, 2])
    """
    checks.check_outputs(outputs)
    extra = tuple(name for name in ("entropy", "prediction") if name in outputs)
    flat = _flatten(
        e,
        c,
        targets,
        bias,
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        logit_scale=logit_scale,
        target_weight=target_weight,
        backend=backend,
        spec=spec,
        vocab_parallel=vocab_parallel,
        signature=extra,
    )
    rows = _run(flat, extra)
    found = {
        "nll": _nll(rows, flat.coefficients) if "nll" in outputs else None,
        "lse": rows.lse if "lse" in outputs else None,
        "entropy": rows.entropy if "entropy" in outputs else None,
        "prediction": rows.prediction if "prediction" in outputs else None,
    }
    return Terms(**{name: None if x is None else _unflatten(x, flat) for name, x in found.items()})


def loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    backend: str = "auto",
    spec: Spec | None = None,
    vocab_parallel: Any = None,
) -> Tensor:
    """Cross-entropy of ``softmax(e c^T)`` against ``targets``, as ``F.cross_entropy(F.linear(e, c, bias), targets)``.

    Arguments not listed are those of :func:`terms`.

    Args:
        reduction: "none", "sum", or "mean" over the weights in use: the sum of ``token_weight`` (1 each if None)
            times the target's class weight, as ``F.cross_entropy`` divides. Soft targets divide by the token
            weights alone. With no weight in use at all, "mean" is NaN, as in PyTorch.
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution over V.
        z_loss: ``z_loss * lse**2`` is added to each token's loss (PaLM, arXiv 2204.02311, section 5).
        weight: (V,) class weights.
        token_weight: one weight a token, of ``targets``' shape (without K); differentiable.

    Returns:
        Tensor: a scalar, or with "none" one value a token, in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`terms`.

    >>> e, c = torch.eye(3), torch.eye(3)
    >>> loss(e, c, torch.tensor([0, 1, 2]))
    tensor(0.5514)
    """
    flat = _flatten(
        e,
        c,
        targets,
        bias,
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        logit_scale=logit_scale,
        target_weight=target_weight,
        backend=backend,
        spec=spec,
        vocab_parallel=vocab_parallel,
        signature=(reduction, label_smoothing, z_loss, weight is None, token_weight is None),
    )
    checks.check_loss_options(
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        weight=weight,
        token_weight=token_weight,
        v=flat.v,
        lead=flat.shape,
        device=flat.e.device,
    )
    coefficients = _class_weighted(flat, weight)
    of_tokens = None if token_weight is None else _token_weights(flat, token_weight)
    total = None
    if reduction == "mean":
        total = _total(flat, coefficients if weight is not None and target_weight is None else None, of_tokens)
    if reduction != "none" and not label_smoothing and not z_loss:
        value = _in_one_pass(flat, coefficients, of_tokens, total)
        if value is not None:
            return value
    rows = _run(flat, ("weighted_logit",), _smoothing(flat, weight)) if label_smoothing else _run(flat)
    per_token = _nll(rows, coefficients)
    if label_smoothing:
        mass = 1.0 if weight is None else weight.to(flat.wide).mean()
        per_token = (1 - label_smoothing) * per_token + label_smoothing * (mass * rows.lse - rows.weighted_logit)
    if z_loss:
        per_token = per_token + z_loss * rows.lse.square()
    if of_tokens is not None:
        per_token = per_token * of_tokens
    if reduction == "none":
        return _unflatten(per_token, flat)
    return per_token.sum() if total is None else per_token.sum() / total


def nll_of_each(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The negative log-likelihood of each of K vocabulary entries a token, in one pass over the logits.

    For losses that are no weighted sum of them (``cce.losses``).

    Args:
        e, c, bias: as for :func:`terms`; tensors already checked.
        targets: (..., K) entries, or ``ignore_index``.
        **options: those of ``SHARED_DEFAULTS``.

    Returns:
        Tensor: (..., K), of ``targets``' shape shortened by ``shift``; 0 where ignored. Differentiable.
    """
    # The weights only say that there are K entries a token.
    weights = e.new_ones(1).expand(targets.shape)
    flat = _flatten(e, c, targets, bias, target_weight=weights, signature=("each",), **{**SHARED_DEFAULTS, **options})
    rows = _run(flat)
    each = (rows.lse[:, None] - rows.target_logits).masked_fill(flat.targets < 0, 0).reshape(targets.shape)
    return each if not flat.shift else each.narrow(-2, 0, flat.shape[-1] - flat.shift)


def _flatten(
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
    signature: tuple[Any, ...],
) -> _Flat:
    """Checks the arguments; makes one row a token of them.

    ``signature``: what else must be the same on all processes of a split vocabulary.
    """
    e, c, bias, targets, split = operands(e, c, bias, targets, vocab_parallel)
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
    rows = _shifted(targets, shift, lead, ignore_index).reshape(-1, k)
    e, c, bias = autocast(e, c, bias)
    softcap = None if softcap is None else float(softcap)
    flat = _Flat(
        e.reshape(-1, c.shape[1]), c, bias, rows, None, shape, shift, softcap, float(logit_scale), backend, spec
    )
    if split is not None:
        flat = _split(flat, split, (ignore_index, softcap, logit_scale, *signature))
    prepare = ops.prepare_targets_op if torch.compiler.is_compiling() else ops.prepare_targets
    if transforms.active():
        prepare = transforms.prepare_targets
    rows = prepare(rows, flat.v, ignore_index)
    flat = flat._replace(targets=rows)
    if target_weight is None:
        return flat
    coefficients = _shifted(target_weight, shift, lead, 0).reshape(-1, k).to(flat.wide)
    return flat._replace(coefficients=coefficients.masked_fill(rows < 0, 0))


def _split(flat: _Flat, split: VocabParallel, signature: tuple[Any, ...]) -> _Flat:
    """What the other processes hold of the vocabulary, and of the tokens where each has its own."""
    wants = wanted_gradients(flat.e, flat.c, flat.bias).startswith("e")  # dE is a sum over all processes
    found = agree(split, flat.e, flat.c, flat.targets, (wants, *signature))
    first = sum(found.sizes[: found.rank])
    part = Part(found.group, first, found.sizes, split.reduce_de)
    return flat._replace(part=part, own=found.rows if split.tokens == "own" else None)


def _run(flat: _Flat, extra: tuple[str, ...] = (), logit_weight: Tensor | None = None) -> _Rows:
    """The operator: lse, target logits and the ``extra`` outputs of every row."""
    if flat.own is not None and flat.part is not None:
        group, own = flat.part.group, flat.own
        every = flat._replace(
            e=tokens.gather_rows(flat.e, group, own), targets=tokens.gather_rows(flat.targets, group, own), own=None
        )
        return _Rows(*(tokens.own_rows(x, group, own) if x.numel() else x for x in _run(every, extra, logit_weight)))
    found = (transforms.forward if transforms.active() else ops.forward)(
        flat.e,
        flat.c,
        flat.bias,
        flat.targets,
        logit_weight,
        flat.order,
        flat.backend,
        flat.spec.key,
        flat.softcap,
        flat.logit_scale,
        ",".join(extra),
        wanted_gradients(flat.e, flat.c, flat.bias),
        "" if flat.part is None else flat.part.key,
    )
    return _Rows(*found[:5])


def _in_one_pass(
    flat: _Flat, coefficients: Tensor | None, of_tokens: Tensor | None, total: Tensor | None
) -> Tensor | None:
    """The sum (mean) of the losses with their gradients computed along with it; None where that is not to be had.

    Its weights must be known beforehand, and it is the caller's to multiply the gradients by one number only.
    """
    grads = wanted_gradients(flat.e, flat.c, flat.bias)
    if flat.part is not None or any(x is not None and x.requires_grad for x in (coefficients, of_tokens)):
        return None
    call = onepass.choose(
        flat.e, flat.c, flat.bias, flat.targets, flat.softcap, flat.logit_scale, flat.backend, flat.spec, grads
    )
    if call is None:
        return None
    weights = flat.targets >= 0 if coefficients is None else coefficients
    if of_tokens is not None:
        weights = weights * of_tokens[:, None]
    # Of a count, and of a mean over nothing, which is NaN, too.
    weights = weights.to(flat.wide) if total is None else weights / total
    return onepass.weighted_loss(flat.e, flat.c, flat.bias, flat.targets, weights, call)


def _token_weights(flat: _Flat, token_weight: Tensor) -> Tensor:
    """(M,) one weight a row."""
    return _shifted(token_weight, flat.shift, token_weight.ndim, 0).reshape(-1).to(flat.wide)


def _total(flat: _Flat, of_target: Tensor | None, of_tokens: Tensor | None) -> Tensor:
    """What "mean" divides by."""
    in_use = flat.targets[:, 0] >= 0 if flat.coefficients is None else (flat.targets >= 0).any(1)
    weights = of_tokens
    if of_target is not None:
        weights = of_target[:, 0] if of_tokens is None else of_target[:, 0] * of_tokens
    return reductions.total(in_use, weights, flat.wide)


def _smoothing(flat: _Flat, weight: Tensor | None) -> Tensor | None:
    """(V,) weights of the smoothed target's logits, of this process's entries; None stands for 1 / V each."""
    if weight is not None:
        u = weight.to(torch.promote_types(weight.dtype, torch.float32)) / flat.v
        return u if flat.part is None else u.narrow(0, flat.part.first, flat.c.shape[0])
    return None if flat.part is None else flat.c.new_full((flat.c.shape[0],), 1 / flat.v, dtype=flat.wide)


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


def _shifted(x: Tensor, shift: int, lead: int, fill: int) -> Tensor:
    """``x[..., shift:]`` along dimension ``lead - 1``, filled up at the end: what each row of ``e`` predicts."""
    if not shift:
        return x
    moved = x.narrow(lead - 1, shift, x.shape[lead - 1] - shift)
    tail = torch.full_like(x.narrow(lead - 1, 0, shift), fill)
    return torch.cat([moved, tail], dim=lead - 1)


def _unflatten(x: Tensor, flat: _Flat) -> Tensor:
    x = x.reshape(flat.shape)
    return x if not flat.shift else x.narrow(-1, 0, flat.shape[-1] - flat.shift)


def _nll(rows: _Rows, coefficients: Tensor | None) -> Tensor:
    """(M,) sum_k w_k (lse - z_k); 0 in ignored rows, where both are 0."""
    gap = rows.lse[:, None] - rows.target_logits
    return gap[:, 0] if coefficients is None else (coefficients * gap).sum(1)


def _class_weighted(flat: _Flat, weight: Tensor | None) -> Tensor | None:
    """(M, K) target weights times class weights, 0 where ignored; None if both are 1."""
    if weight is None:
        return flat.coefficients
    of_target = weight.to(flat.wide)[flat.targets.clamp(min=0)].masked_fill(flat.targets < 0, 0)
    return of_target if flat.coefficients is None else of_target * flat.coefficients


#: What :func:`terms`, :func:`loss` and every recipe of ``cce.losses`` take alike, beside the tensors.
SHARED_DEFAULTS: dict[str, Any] = {
    name: value for name, value in (terms.__kwdefaults__ or {}).items() if name not in ("outputs", "target_weight")
}
#: Names of :func:`loss`'s keyword options.
LOSS_OPTIONS = frozenset(loss.__kwdefaults__ or ())
