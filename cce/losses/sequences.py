"""Losses on whole sequences: log-probability, pass@N coverage, direct preference optimisation.

``e`` is (..., L, D) and ``targets`` (..., L); each sequence along L gives one value. Prompts and padding are
``ignore_index``; with ``shift=1`` a sequence contains its prompt and predicts itself. A sequence without any token in
use costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cce.frontend import checks
from cce.frontend.reduction import reduce
from cce.losses.call import Call, Options
from cce.losses.slopes import with_slope
from cce.losses.values import check_log_prob

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sequence_log_prob(e: Tensor, c: Tensor, targets: Tensor, **options: Unpack[Options]) -> Tensor:
    """Log-probability of each sequence, the sum over its tokens.

    Args:
        e, c, targets: (..., L, D), (V, D), (..., L).
        **options: :class:`Options`.

    Returns:
        Tensor: (...), differentiable.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.terms`; ``targets`` is a single number.

    >>> sequence_log_prob(torch.eye(3), torch.eye(3), torch.tensor([0, 1, -100]))
    tensor(-1.1029)
    """
    return -_nll(_call(e, c, targets, options, "none"))


def pass_at_n(
    e: Tensor, c: Tensor, targets: Tensor, *, n: int, reduction: str = "mean", **options: Unpack[Options]
) -> Tensor:
    """Direct coverage optimisation, ``-log(1 - (1 - p)^n)``, where p is the probability of a whole sequence.

    ``1 - (1 - p)^n`` is the probability that at least one of n samples is this sequence. Sequences that n samples would
    find anyway count less than in the cross-entropy, which is ``n=1``.

    Args:
        e, c, targets: (..., L, D), (V, D), (..., L); L is 1 if each token is an answer of its own.
        n: number of samples, from 1 to 2^53.
        reduction: "mean" or "sum" over the sequences, or "none".
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" (...), one value per sequence.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``n`` is not an int from 1 to 2^53.

    Source: Chen et al., Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves
        Mathematical Reasoning, NeurIPS 2025, arXiv 2502.07154.

    >>> pass_at_n(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), n=4)
    tensor(0.5584)
    """
    checks.check_count("n", n)
    checks.check_number("n", n, "an int of at most 2^53", lambda x: x <= 2**53)
    call = _call(e, c, targets, options, reduction)
    return reduce(with_slope(_coverage, _nll(call), n), call.in_use.any(-1), reduction)


def _coverage(nll: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Coverage loss -log(1 - (1 - p)^n) and its derivative n (1 - p)^(n - 1) p / (1 - (1 - p)^n)."""
    if n == 1:
        return nll, torch.ones_like(nll)
    p = torch.exp(-nll)
    log_rest = torch.where(p < 0.5, torch.log1p(-p), torch.log(-torch.expm1(-nll)))
    # (1 - (1 - p)^n) / p tends to n as p tends to 0; in a long sequence p rounds to 0, and the loss is still finite.
    gain = torch.where(p > torch.finfo(p.dtype).tiny, -torch.expm1(n * log_rest) / p, n)
    missed = torch.exp(n * log_rest)
    value = torch.where(missed > 0.5, nll - gain.log(), -torch.log1p(-missed))
    return value, n * torch.exp((n - 1) * log_rest) / gain


def dpo(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    ref_log_prob: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **options: Unpack[Options],
) -> Tensor:
    """Direct preference optimisation, ``-log sigmoid(h)``, where h is the policy's preference beyond the reference's.

    ``h = beta (log p(chosen) - log ref(chosen) - log p(rejected) + log ref(rejected))``. Both halves of the batch take
    one pass over the classifier.

    Args:
        e, c: (2 B, L, D), (V, D).
        targets: (2 B, L): the B chosen sequences, then the B rejected ones in the same order.
        ref_log_prob: (2 B,) log-probabilities under the reference model, :func:`sequence_log_prob` of its hidden states
            and head; at most 0. Those of a pair without tokens are never used.
        beta: scale of the preference, above 0.
        label_smoothing: probability that a preference is recorded the wrong way round, in [0, 0.5).
        reduction: "mean" or "sum" over the pairs, or "none".
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" (B,).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``targets`` are not pairs, ``ref_log_prob`` has
            another shape or is above 0 (on a GPU as for targets), or a number is outside its range above.

    Source: Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv 2305.18290, equation 7; label
        smoothing: Mitchell, A note on DPO with noisy preferences, 2023.

    >>> e, targets = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [3, 2]])
    >>> dpo(e, torch.eye(4), targets, ref_log_prob=torch.zeros(2), beta=1.0)
    tensor(0.1269)
    """
    checks.check_number("beta", beta, "a finite number > 0", lambda x: x > 0)
    checks.check_number("label_smoothing", label_smoothing, "a number in [0, 0.5)", lambda x: 0 <= x < 0.5)
    call = _call(e, c, targets, options, reduction)
    if targets.ndim != 2 or len(targets) % 2:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected (2 B, L), chosen then rejected")
    checks.check_floats("ref_log_prob", ref_log_prob, tuple(targets.shape[:1]), "one a sequence", e)
    nll = _nll(call)
    first, second = call.in_use.any(-1).chunk(2)
    counts = first | second
    ref = ref_log_prob.to(nll.dtype).masked_fill(~counts.repeat(2), 0)
    check_log_prob("ref_log_prob", ref, ref_log_prob.dtype, targets.shape[-1])
    chosen, rejected = (-nll - ref).chunk(2)
    h = beta * (chosen - rejected)
    value = -(1 - label_smoothing) * F.logsigmoid(h)
    if label_smoothing:  # otherwise 0 * inf, where the rejected sequence is impossible
        value = value - label_smoothing * F.logsigmoid(-h)
    return reduce(value, counts, reduction)


def _call(e: Tensor, c: Tensor, targets: Tensor, options: Options, reduction: str) -> Call:
    call = Call.of(e, c, targets, options, reduction=reduction)
    if targets.ndim < 1:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected (..., L)")
    return call


def _nll(call: Call) -> Tensor:
    """Negative log-likelihood of each sequence, (...)."""
    return call.nll().sum(-1)
