"""Losses on several vocabulary entries per token: unlikelihood, and distillation from a teacher's top probabilities.

All their log-probabilities come from one pass over the logits, whatever the number of entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cce.frontend import checks
from cce.losses.call import Call, Options
from cce.losses.slopes import log_complement, log_rest, with_slope
from cce.losses.values import check_in_vocabulary, check_probabilities

if TYPE_CHECKING:
    from typing_extensions import Unpack

TAILS = ("drop", "renormalize", "bucket")


def unlikelihood(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    negatives: Tensor,
    alpha: float = 1.0,
    likelihood: bool = True,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Unlikelihood loss ``-log p(target) - alpha sum_k log(1 - p(negative_k))``: negatives become less likely.

    1 - p is clamped to at least 2^7 times the epsilon of the results' dtype, 1.5e-5 in float32: rounded logits do not
    determine it better, and its inverse multiplies their error in the gradient. A certain negative costs 11 alpha.

    Args:
        e, c, targets: (..., D), (V, D), (...). A token whose target is ignored costs nothing, and nor do its negatives.
        negatives: (..., K) integers, the set of negative candidates of each token, in the places of ``targets``:
            repeated ones count once, those equal to ``ignore_index`` or to the token's target do not count.
        alpha: weight of the negatives, at least 0.
        likelihood: False leaves out ``-log p(target)``, for sequence-level training on generated tokens. The targets
            then only determine which tokens count, and may themselves be negatives.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``negatives`` have another shape or a value
            outside [0, V), or ``alpha`` is not a number or is negative.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training, ICLR 2020, arXiv 1908.04319, section 5.

    >>> negatives = torch.tensor([[1], [2], [0]])
    >>> unlikelihood(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), negatives=negatives)
    tensor(0.7896)
    """
    checks.check_number("alpha", alpha, "a finite number >= 0", lambda x: x >= 0)
    checks.check_bool("likelihood", likelihood)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    checks.check_entries("negatives", negatives, targets)
    # An ignored token gets no entries, so that it costs no time either.
    ignored = (call.targets == call.ignore_index)[..., None]
    entries = negatives.to(torch.int64).masked_fill(ignored, call.ignore_index)
    if call.options["vocab_parallel"] is None:  # otherwise V is unknown here, and a bad value is reported as a target
        check_in_vocabulary("negatives", entries, len(call.c), call.ignore_index)
    entries = _as_set(entries, call.targets if likelihood else None, call.ignore_index)
    counts = call.of_results(entries, dim=-2) != call.ignore_index
    if likelihood:
        entries = torch.cat([call.targets[..., None], entries], -1)
    nll = call.nll_of_each(entries)
    of_negatives = with_slope(log_complement, nll[..., 1:] if likelihood else nll)
    unlikely = -alpha * of_negatives.masked_fill(~counts, 0).sum(-1)
    return call.reduce(nll[..., 0] + unlikely if likelihood else unlikely)


def _as_set(entries: Tensor, without: Tensor | None, ignore_index: int) -> Tensor:
    """Sort entries (..., K), with ``ignore_index`` in place of repeated ones and those equal to ``without`` (...)."""
    entries = entries.sort(-1).values
    repeats = torch.zeros_like(entries, dtype=torch.bool)
    repeats[..., 1:] = entries[..., 1:] == entries[..., :-1]
    if without is not None:
        repeats |= entries == without[..., None]
    return entries.masked_fill(repeats, ignore_index)


def top_k_distillation(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    target_weight: Tensor,
    temperature: float = 1.0,
    tail: str = "drop",
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Distillation loss ``temperature^2 KL(q || p)`` of a student's p from a teacher's K probabilities q per token.

    p is the student's softmax over the whole vocabulary at ``temperature``. ``tail`` determines how the teacher's other
    entries, with total probability ``1 - sum_k q_k``, are treated:

    - "drop": as if they were 0: ``sum_k q_k log(q_k / p_k)``. The sum may be negative.
    - "renormalize": likewise, after dividing the q of each token by their sum.
    - "bucket": as one further class, with probability ``1 - sum_k p_k`` in the student, clamped to at least 1.5e-5 in
      float32 (2^7 epsilon), since rounded logits do not determine it better.

    Args:
        e, c: (..., D), (V, D).
        targets: (..., K) integers, the entries the teacher kept, without repeats; ``ignore_index`` where there are
            fewer. A token without entries costs nothing.
        target_weight: (..., K) the teacher's probabilities q at the same temperature; not negative, and not requiring a
            gradient. With "bucket", those of a token must sum to at most 1. Values at ``ignore_index`` do not count.
        temperature: temperature of both softmaxes, above 0.
        tail: "drop", "renormalize" or "bucket".
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``target_weight`` requires a gradient, or is
            negative or sums to more than is listed above (on a GPU as for targets); ``temperature`` or ``tail`` is not
            one of those above.

    Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2; for sparse
        teachers: Anshumann et al., Sparse Logit Sampling, ACL 2025, arXiv 2503.16870.

    >>> e, teacher = torch.eye(3), (2 * torch.eye(3)).softmax(-1)
    >>> q, entries = teacher.topk(2)
    >>> top_k_distillation(e, torch.eye(3), entries, target_weight=q, tail="bucket")
    tensor(0.0989)
    """
    checks.check_number("temperature", temperature, "a finite number > 0", lambda x: x > 0)
    checks.check_choice("tail", tail, TAILS)
    checks.check_float_tensor("target_weight", target_weight)
    call = Call.of(
        e,
        c,
        targets,
        options,
        reduction=reduction,
        token_weight=token_weight,
        target_weight=target_weight,
        temperature=temperature,
    )
    if target_weight.requires_grad:
        raise ValueError("target_weight: got a tensor that requires grad, expected probabilities without (detach it)")
    nll = call.nll_of_each(call.targets)
    counts = call.of_results(call.targets, dim=-2) != call.ignore_index
    q = call.of_results(target_weight, dim=-2).to(nll.dtype).masked_fill(~counts, 0)
    check_probabilities("target_weight", q, target_weight.dtype, sum_at_most_one=tail == "bucket")
    if tail == "renormalize":
        mass = q.sum(-1, keepdim=True)
        q = q / mass.masked_fill(mass == 0, 1)
    # Where q is 0 the term is 0, even for an entry that the student masks.
    divergence = (torch.xlogy(q, q) + q * nll.masked_fill(q == 0, 0)).sum(-1)
    if tail == "bucket":
        rest = (1 - q.sum(-1)).clamp(min=0)
        mass = torch.exp(-nll).masked_fill(~counts, 0).sum(-1)
        divergence = divergence + torch.xlogy(rest, rest) - rest * with_slope(log_rest, mass)
    return call.reduce(temperature**2 * divergence)
