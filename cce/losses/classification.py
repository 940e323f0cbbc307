"""Losses of the target's probability: focal, comp-sum (GCE, MAE), Dice, LDR; and the z-loss.

All take ``e`` (..., D), ``c`` (V, D) and integer ``targets`` with the leading shape of ``e``. ``reduction`` and
``token_weight`` are those of :func:`cce.loss`, ``**options`` are :class:`Options`. With p the target's probability,
every loss but the z-loss is a function of ``nll = -log p``. Each costs one call of :func:`cce.terms`, forward and
backward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cce.frontend import checks
from cce.losses.call import Call, Options
from cce.losses.slopes import probabilities, with_slope

if TYPE_CHECKING:
    from typing_extensions import Unpack

# exp(margin / lam) multiplies the rounding error of nll; a factor of 2e4 is acceptable in float32.
_LARGEST_MARGIN = {torch.float32: 10, torch.float64: 30}


def focal(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Focal loss ``-(1 - p)^gamma log p``, in which tokens that are already predicted well count less.

    Args:
        e, c, targets: (..., D), (V, D), (...).
        gamma: exponent of the factor, at least 0; 0 gives the cross-entropy.
        reduction, token_weight: as :func:`cce.loss`. The paper's alpha is ``token_weight=alpha[targets]``.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``gamma`` is not a number or is negative.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002, equation 4.

    >>> focal(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), gamma=2.0)
    tensor(0.0991)
    """
    checks.check_number("gamma", gamma, "a finite number >= 0", lambda x: x >= 0)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    return call.reduce(with_slope(_focal, call.nll(), gamma))


def _focal(nll: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    p, rest = probabilities(nll)
    factor = rest**gamma
    # d/dnll = (1 - p)^gamma (1 + gamma p nll / (1 - p)); the quotient is 1 at p = 1, the product 0 at p = 0.
    quotient = torch.where(rest > 0, nll / rest, 1)
    return factor * nll, factor * (1 + gamma * torch.where(p > 0, p * quotient, 0))


def comp_sum(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    tau: float,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Comp-sum loss ``(p^(tau - 1) - 1) / (1 - tau)``, or ``-log p`` at ``tau = 1``.

    With u the sum of ``exp(z_j - z_y)`` over the entries j other than the target y, so that 1 + u = 1 / p, this is the
    family ``((1 + u)^(1 - tau) - 1) / (1 - tau)``. tau = 0 gives the sum-exponential loss, 1 the logistic loss
    (cross-entropy), a value between 1 and 2 the generalized cross-entropy with q = tau - 1, and 2 the mean absolute
    error 1 - p.

    Args:
        e, c, targets: (..., D), (V, D), (...).
        tau: parameter of the family, at least 0. Below 1 the loss grows like ``p^(tau - 1)`` as p goes to 0, and is inf
            where that overflows or p is 0; its gradient is not finite there.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``tau`` is not a number or is negative.

    Source: Mao, Mohri, Zhong, Cross-Entropy Loss Functions: Theoretical Analysis and Applications, ICML 2023,
        arXiv 2304.07288.

    >>> comp_sum(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), tau=2.0)
    tensor(0.4239)
    """
    checks.check_number("tau", tau, "a finite number >= 0", lambda x: x >= 0)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    return call.reduce(with_slope(_comp_sum, call.nll(), 1 - tau))


def _comp_sum(nll: Tensor, power: float) -> tuple[Tensor, Tensor]:
    if power == 0:
        return nll, torch.ones_like(nll)
    return torch.expm1(power * nll) / power, torch.exp(power * nll)


def generalized_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    q: float = 0.7,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Generalized cross-entropy ``(1 - p^q) / q``, between the cross-entropy (q to 0) and the absolute error (q = 1).

    It is :func:`comp_sum` with ``tau = 1 + q``.

    Args:
        e, c, targets: (..., D), (V, D), (...).
        q: parameter in (0, 1]; the larger it is, the less a wrong label counts.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``q`` is not a number in (0, 1].

    Source: Zhang, Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels,
        NeurIPS 2018, arXiv 1805.07836, equation 6.

    >>> generalized_cross_entropy(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), q=1.0)
    tensor(0.4239)
    """
    checks.check_number("q", q, "a number in (0, 1]", lambda x: 0 < x <= 1)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    return call.reduce(with_slope(_comp_sum, call.nll(), -q))


def dice(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 1.0,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Self-adjusting Dice loss ``1 - (2 w + gamma) / (w + 1 + gamma)`` with ``w = (1 - p)^alpha p``.

    Of the paper's sum over the classes, only the target's term is taken. w is largest at p = 1 / (1 + alpha): above it
    the loss rises again, and training pushes a token back. ``alpha=0`` is the plain Dice loss, which does not do so.

    Args:
        e, c, targets: (..., D), (V, D), (...).
        alpha: exponent of the factor that makes easy tokens count less, at least 0.
        gamma: smoothing of the quotient, at least 0.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``alpha`` or ``gamma`` is not a number or is
            negative.

    Source: Li et al., Dice Loss for Data-imbalanced NLP Tasks, ACL 2020, arXiv 1911.02855, section 3.

    >>> dice(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]))
    tensor(0.3368)
    """
    checks.check_number("alpha", alpha, "a finite number >= 0", lambda x: x >= 0)
    checks.check_number("gamma", gamma, "a finite number >= 0", lambda x: x >= 0)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    return call.reduce(with_slope(_dice, call.nll(), alpha, gamma))


def _dice(nll: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    p, rest = probabilities(nll)
    factor, power = rest**alpha, rest ** (alpha - 1)
    w = factor * p
    if alpha < 1:
        # It is infinite at p = 1, where any finite number is right: the logits' gradient has the factor 1 - p.
        power = power.masked_fill(rest == 0, 0)
    complement = rest + p * (1 - factor)  # 1 - w
    dw = p * (alpha * p * power - factor)
    return complement / (w + 1 + gamma), -(2 + gamma) / (w + 1 + gamma) ** 2 * dw


def ldr(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    lam: float = 1.0,
    margin: float = 0.0,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Label-distributionally-robust loss with KL: ``lam log mean_k exp((z_k - z_y + margin [k != y]) / lam)``.

    The mean is over the V entries. ``lam=1, margin=0`` gives the cross-entropy minus log V. As ``lam`` goes to 0, the
    loss becomes the multi-class hinge loss ``max_k (z_k - z_y + margin [k != y])``; as ``lam`` grows, the mean in place
    of the maximum.

    Args:
        e, c, targets: (..., D), (V, D), (...).
        lam: the paper's lambda, the temperature of the worst-case distribution over labels; above 0.
        margin: margin of all entries other than the target; at least 0 and at most 10 ``lam`` (30 ``lam`` for float64
            inputs), since exp(margin / lam) multiplies the rounding error of ``nll``.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``lam`` or ``margin`` is outside its range;
            the vocabulary is split over processes.

    Source: Zhu, Ying, Yang, Label Distributionally Robust Losses for Multi-class Classification, ICML 2023,
        arXiv 2112.14869 (LDR-KL).

    >>> ldr(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), lam=0.5, margin=0.1)
    tensor(-0.4065)
    """
    checks.check_number("lam", lam, "a finite number > 0", lambda x: x > 0)
    call = Call.of(
        e, c, targets, options, reduction=reduction, token_weight=token_weight, temperature=lam, temperature_name="lam"
    )
    if call.options["vocab_parallel"] is not None:
        raise ValueError("vocab_parallel: got a split vocabulary, expected None: ldr needs the size of the whole")
    most = _LARGEST_MARGIN[torch.float64 if torch.float64 in (e.dtype, c.dtype) else torch.float32]
    checks.check_number("margin", margin, f"a number in [0, {most} * lam]", lambda x: 0 <= x <= most * lam)
    nll = call.nll()
    # sum_k exp(.. / lam) = 1 + exp(margin / lam) (exp(nll) - 1): no term is negative. The factor is a tensor, as a
    # number would be a constant in compiled code.
    factor = (nll.new_ones(()) * (margin / lam)).expm1()
    raised = torch.log1p(factor * -torch.expm1(-nll))
    return call.reduce(lam * (nll + raised - math.log(c.shape[0])))


def z_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    coefficient: float = 1e-4,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The z-loss alone, ``coefficient * lse^2``, which keeps the log-sum-exp of the logits near 0.

    To add it to a cross-entropy, use ``cce.loss(..., z_loss=coefficient)``: one pass over the logits serves both.

    Args:
        e, c: (..., D), (V, D).
        targets: (...); they only determine which tokens are ignored.
        coefficient: factor of the loss, a finite number.
        reduction, token_weight: as :func:`cce.loss`.
        **options: :class:`Options`.

    Returns:
        Tensor: a scalar, or with "none" one value per token.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``coefficient`` is not a finite number.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, section 5.

    >>> z_loss(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), coefficient=1.0)
    tensor(2.4070)
    """
    checks.check_number("coefficient", coefficient, "a finite number", lambda x: True)
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight)
    lse = call.terms("lse").lse
    assert lse is not None
    return call.reduce(coefficient * lse * lse)  # in this order it overflows only where the result does
