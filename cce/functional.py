"""``cce.terms`` and ``cce.loss``: the front end over every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import unwrap
from typing import Any, NamedTuple

from torch import Tensor

from cce.frontend import checks, decision, weights
from cce.frontend.apply import Rows, run
from cce.frontend.flatten import Flat, again, flatten, unflatten
from cce.frontend.one_pass import total_loss
from cce.frontend.tracing import eager_if_transformed
from cce.spec import Spec


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


@eager_if_transformed
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
        backend: "auto", or one of :func:`cce.list_backends`.
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

    >>> import torch
    >>> e, c = torch.eye(3), torch.eye(3)
    >>> terms(e, c, torch.tensor([0, 1, 2]), outputs=["prediction"]).prediction
    tensor([0, 1, 2])
    """
    checks.check_outputs(outputs)
    extra = tuple(name for name in ("entropy", "prediction") if name in outputs)
    flat = flatten(
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
        signature={"outputs": extra},
        outputs=extra,
    )
    _check_filter(flat, outputs)
    rows = run(flat)
    found = {
        "nll": _nll(rows, flat.coefficients) if "nll" in outputs else None,
        "lse": rows.lse if "lse" in outputs else None,
        "entropy": rows.entropy if "entropy" in outputs else None,
        "prediction": rows.prediction if "prediction" in outputs else None,
    }
    return Terms(**{name: None if x is None else unflatten(x, flat) for name, x in found.items()})


@eager_if_transformed
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

    >>> import torch
    >>> e, c = torch.eye(3), torch.eye(3)
    >>> loss(e, c, torch.tensor([0, 1, 2]))
    tensor(0.5514)
    """
    kind, plain = None, weight is None and token_weight is None and target_weight is None
    if plain and vocab_parallel is None:
        numbers = (ignore_index, shift, softcap, logit_scale, label_smoothing, z_loss)
        kind = decision.kind_of(e, c, targets, bias, spec, (reduction, backend, *numbers))
    known = decision.recall(kind)
    plain_mean = plain and reduction == "mean" and not asked(z_loss)
    if known is not None:
        flat = again(e, c, targets, bias, ignore_index, shift, spec, plain_mean, known)
    else:
        flat = flatten(
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
            signature={
                "reduction": reduction,
                "label_smoothing": label_smoothing,
                "z_loss": z_loss,
                "weight": weight is not None,
                "token_weight": token_weight is not None,
            },
            outputs=("weighted_logit",) if asked(label_smoothing) else (),
            plain_mean=plain_mean,
            check=partial(
                checks.check_loss_options,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                weight=weight,
                token_weight=token_weight,
            ),
        )
        decision.remember(kind, flat.call)
    coefficients = weights.class_weighted(flat, weight)
    of_tokens = None if token_weight is None else weights.token_weights(flat, token_weight)
    total = None
    if reduction == "mean":
        of_target = coefficients if weight is not None and target_weight is None else None
        total = partial(weights.total, flat, of_target, of_tokens)
    if reduction != "none" and not label_smoothing and not z_loss:
        value = total_loss(flat, coefficients, of_tokens, total)
        if value is not None:
            return value
    rows = run(flat, weights.smoothing(flat, weight) if label_smoothing else None)
    per_token = _nll(rows, coefficients)
    if label_smoothing:
        per_token = (1 - label_smoothing) * per_token + label_smoothing * _uniform_nll(rows, weight)
    if z_loss:
        per_token = per_token + z_loss * rows.lse.square()
    if of_tokens is not None:
        per_token = per_token * of_tokens
    if reduction == "none":
        return unflatten(per_token, flat)
    return per_token.sum() if total is None else per_token.sum() / total()


def asked(number: float) -> bool:
    """Whether an option is other than 0; a value of a wrong type counts as one, and is refused later."""
    return not isinstance(number, (int, float)) or number != 0


def _check_filter(flat: Flat, outputs: Sequence[str]) -> None:
    """Refuse a filter where a gradient of lse or entropy is wanted: it may consist of what the filter leaves out."""
    filter, names = flat.spec.filter, [name for name in ("lse", "entropy") if name in outputs]
    if filter not in (None, "none") and names and flat.request.grads:
        raise ValueError(
            f"spec: got filter={filter!r} with outputs {names} and gradients enabled, expected filter='none': a "
            "gradient of lse or entropy is not concentrated where the filter looks; or ask for other outputs, or "
            "compute these under torch.no_grad()"
        )


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
    flat = flatten(
        e, c, targets, bias, target_weight=weights, signature={"outputs": "each"}, **{**SHARED_DEFAULTS, **options}
    )
    rows = run(flat)
    each = rows.nll.reshape(targets.shape)
    return each if not flat.shift else each.narrow(-2, 0, flat.shape[-1] - flat.shift)


def _nll(rows: Rows, coefficients: Tensor | None) -> Tensor:
    """(M,) sum_k w_k (lse - z_k); 0 in ignored rows."""
    return rows.nll[:, 0] if coefficients is None else (coefficients * rows.nll).sum(1)


def _uniform_nll(rows: Rows, weight: Tensor | None) -> Tensor:
    """(M,) mean over the vocabulary of ``w_v (lse - z_v)``; 0 in ignored rows.

    Both terms may share a large offset, so they are subtracted in the dtype of the weighted logit, which is float64
    where there is one.
    """
    fine = rows.weighted_logit.dtype
    mass = 1.0 if weight is None else weight.to(fine).mean()
    return (mass * (rows.lse.to(fine) + rows.lse_low) - rows.weighted_logit).to(rows.lse.dtype)


#: What :func:`terms`, :func:`loss` and every recipe of ``cce.losses`` take alike, beside the tensors.
SHARED_DEFAULTS: dict[str, Any] = {
    name: value
    for name, value in (unwrap(terms).__kwdefaults__ or {}).items()
    if name not in ("outputs", "target_weight")
}
#: :func:`loss`'s keyword options, and their names.
LOSS_DEFAULTS: dict[str, Any] = dict(unwrap(loss).__kwdefaults__ or {})
LOSS_OPTIONS = frozenset(LOSS_DEFAULTS)
