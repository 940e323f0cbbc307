"""Losses of several heads: multi-token prediction, and one head per codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cce.errors import describe
from cce.frontend import checks
from cce.functional import loss
from cce.losses.call import Options, check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def multi_token(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    head_weight: Tensor | Sequence[float] | None = None,
    reduction: str = "mean",
    **options: Unpack[Options],
) -> Tensor:
    """Multi-token prediction: H heads share one classifier, and head h predicts the token ``shift + h`` places ahead.

    The rows of all heads are multiplied by the classifier together: it is read once, and its gradient is written once,
    instead of H times; and since the weight of every token is known beforehand, the gradients may be computed along
    with the loss.

    Args:
        e: (H, ..., L, D) hidden states of each head.
        c: (V, D) classifier shared by all heads.
        targets: (..., L) tokens, not shifted; ``ignore_index`` costs nothing.
        head_weight: weights of the heads, H numbers; None means 1 each.
        reduction: "mean": sum over the heads of weight times the mean over the head's tokens in use; "sum": sum over
        the heads of weight times the sum over tokens; "none": weight times each token's loss. **options:
        :class:`Options`, with ``shift`` that of the first head, 1 if not given.

    Returns:
        Tensor: a scalar, or with "none" (H, ..., L), 0 where a head has nothing to predict. A head without any token in
        use costs nothing.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``e`` and ``targets`` do not match.

    Source: Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction, ICML 2024,
        arXiv 2404.19737, equation 2.

    >>> e = torch.eye(4).expand(2, 4, 4)
    >>> multi_token(e, torch.eye(4), torch.tensor([0, 0, 1, 2]))
    tensor(2.4873)
    """
    check_options(options)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_float_tensor("e", e)
    checks.check_float_tensor("c", c)
    checks.check_integers("targets", targets, dtypes=(*checks.INTEGERS, *checks.UNSIGNED))
    if e.ndim < 3 or e.shape[1:-1] != targets.shape or len(e) < 1:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected {('H', *targets.shape, 'D')} with H >= 1")
    rest: dict[str, Any] = dict(options)
    shift = rest.pop("shift", 1)
    targets = targets.to(torch.int64)  # as uint8 cannot hold -100
    weight = _head_weight(head_weight, e, c)
    ignore_index = rest.get("ignore_index", -100)
    ahead = torch.stack([_ahead(targets, shift + h, ignore_index) for h in range(len(e))])
    if reduction == "mean":
        weight = weight / (ahead != ignore_index).flatten(1).sum(1).clamp(min=1)
    per_token = weight.view(-1, *[1] * targets.ndim).expand(ahead.shape)
    return loss(e, c, ahead, token_weight=per_token, reduction="none" if reduction == "none" else "sum", **rest)


def multi_codebook(
    e: Tensor,
    c: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    reduction: str = "mean",
    **options: Unpack[Options],
) -> Tensor:
    """Cross-entropy of Q codebooks, each with its own classifier, averaged over the codebooks.

    Each codebook takes one call, as its log-sum-exp is over its own entries: in one pass over all the classifiers, the
    log-sum-exp of every row would cover the logits of all codebooks, which is a different loss; and separate rows for
    each codebook would take Q times the logits.

    Args:
        e: (..., D) hidden states shared by all heads, or (..., Q, D), one for each head.
        c: (Q, V, D), or Q tensors (V_q, D).
        targets: (..., Q) entries of each codebook; ``ignore_index``, in one codebook or in all, costs nothing.
        reduction: "mean": mean of the codebooks' means over their tokens in use; "sum"; "none".
        **options: :class:`Options` but ``bias``; ``shift`` is along the dimension before Q.

    Returns:
        Tensor: a scalar, or with "none" (..., Q), shortened by ``shift``.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``c`` and ``targets`` do not have the same Q.

    Source: Copet et al., Simple and Controllable Music Generation, NeurIPS 2023, arXiv 2306.05284, section 2.

    >>> multi_codebook(torch.eye(3), torch.eye(3).expand(2, 3, 3), torch.tensor([[0, 0], [1, 1], [2, 0]]))
    tensor(0.7181)
    """
    check_options(options, set(Options.__annotations__) - {"bias"})
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_float_tensor("e", e)
    checks.check_integers("targets", targets, dtypes=(*checks.INTEGERS, *checks.UNSIGNED))
    if not isinstance(c, (Tensor, Sequence)) or isinstance(c, str):
        raise TypeError(f"c: got {describe(c)}, expected a tensor (Q, V, D) or Q tensors (V_q, D)")
    if targets.ndim < 1 or len(c) < 1 or targets.shape[-1] != len(c):
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected (..., Q) with Q = {len(c)} classifiers")
    shared = e.shape[:-1] == targets.shape[:-1]
    if not shared and e.shape[:-1] != targets.shape:
        of_all, of_each = (*targets.shape[:-1], "D"), (*targets.shape, "D")
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected {of_all} or {of_each} to match targets")
    losses = [
        loss(e if shared else e.select(-2, q), c[q], targets[..., q], reduction=reduction, **options)
        for q in range(len(c))
    ]
    found = torch.stack(losses, -1)
    return found if reduction == "none" else found.mean() if reduction == "mean" else found.sum()


def _ahead(targets: Tensor, by: int, ignore_index: int) -> Tensor:
    """Return ``targets[..., by:]``, padded at the end; only padding for a head that looks beyond the sequence."""
    rest = targets[..., by:]
    return torch.cat([rest, torch.full_like(targets[..., : min(by, targets.shape[-1])], ignore_index)], -1)


def _head_weight(value: Any, e: Tensor, c: Tensor) -> Tensor:
    """Weights of the heads, (H,), in the results' dtype."""
    dtype = torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32)
    if value is None:
        return torch.ones(len(e), dtype=dtype, device=e.device)
    if not isinstance(value, Tensor):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"head_weight: got {describe(value)}, expected H = {len(e)} numbers or a tensor of them")
        for x in value:
            checks.check_number("head_weight", x, "finite numbers", lambda x: True)
        value = torch.tensor(value, dtype=dtype, device=e.device)
    checks.check_floats("head_weight", value, (len(e),), "(H,)", e)
    return value.to(dtype)
