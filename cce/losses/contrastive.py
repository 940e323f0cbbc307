"""Contrastive losses: the classifiers are the other embeddings of the batch.

A batch of B pairs is a vocabulary of B entries, and B x B similarities need not be kept either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from cce import checks
from cce.functional import terms
from cce.losses.call import Call, check_options
from cce.reduction import reduce
from cce.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Rows of which the similarities among each other are computed densely, to leave out those with themselves.
_BLOCK = 256
# What is added to a logit that does not count: exp of it is 0, and it is a number of every dtype.
_FAR = 2.0**14


class ContrastiveOptions(TypedDict, total=False):
    """The options of :func:`cce.terms` that a contrastive loss passes on.

    Attributes:
        backend: what computes it.
        spec: how.
    """

    backend: str
    spec: Spec | None


def clip_contrastive(
    e: Tensor,
    c: Tensor,
    *,
    logit_scale: float | Tensor = 1 / 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    **options: Unpack[ContrastiveOptions],
) -> Tensor:
    """Symmetric contrastive loss of B pairs: each ``e_i`` is to find its ``c_i``, and each ``c_i`` its ``e_i``.

    ``(CE(s e c^T) + CE(s c e^T)) / 2`` with the targets 0 to B - 1. Two passes over the similarities, with ``e`` and
    ``c`` in turn as the classifier.

    Args:
        e, c: (B, D) embeddings of images and of their texts, say.
        logit_scale: s; a tensor of one number may be learned.
        normalize: divides every embedding by its norm first.
        reduction: "mean" or "sum" over the pairs, or "none".
        **options: :class:`ContrastiveOptions`.

    Returns:
        Tensor: a scalar, or with "none" (B,).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``e`` and ``c`` are not both (B, D).

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
        arXiv 2103.00020, figure 3.

    >>> clip_contrastive(torch.eye(3), torch.eye(3), logit_scale=1.0)
    tensor(0.5514)
    """
    rows = _check_pairs(e, c, normalize, reduction, options)
    if isinstance(logit_scale, Tensor):
        checks.check_floats("logit_scale", logit_scale, (), "one number", e)
    else:
        checks.check_number("logit_scale", logit_scale, "a finite number > 0", lambda x: x > 0)
    a, b = (_normalized(x) if normalize else x for x in (e, c))
    # Scaled embeddings instead of the option logit_scale, which is no tensor and has no gradient.
    forth = _of_pairs(a * logit_scale, b, rows, options)
    back = _of_pairs(b * logit_scale, a, rows, options)
    return reduce((forth + back) / 2, torch.ones_like(rows, dtype=torch.bool), reduction)


def nt_xent(
    e: Tensor,
    c: Tensor,
    *,
    temperature: float = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    **options: Unpack[ContrastiveOptions],
) -> Tensor:
    """Normalized temperature-scaled cross-entropy (SimCLR) of B pairs of views.

    Each of the 2 B views x_i is to find its other view x_j among all but itself:
    ``-log(exp(x_i . x_j / t) / sum_{k != i} exp(x_i . x_k / t))``.

    The similarity of a view with itself is left out exactly. To subtract it from a finished log-sum-exp would not do:
    it is the largest of its row, and at a small temperature nothing but rounding would be left. Instead the views are
    taken in blocks of 256. Similarities between blocks come from one call of ``cce.terms``, in which a few further
    columns of the embeddings make those inside a block vanish; those inside the blocks, 2 B x 256 of them, are
    computed densely without the diagonal.

    Args:
        e, c: (B, D) the two views of each of B examples.
        temperature: t, above 0.
        normalize: divides every embedding by its norm first.
        reduction: "mean" or "sum" over the 2 B views, or "none".
        **options: :class:`ContrastiveOptions`.

    Returns:
        Tensor: a scalar, or with "none" (2 B,), the views of ``e`` first.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``e`` and ``c`` are not both
            (B, D), or ``temperature`` is not above 0.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
        arXiv 2002.05709, equation 1.

    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    rows = _check_pairs(e, c, normalize, reduction, options)
    checks.check_number("temperature", temperature, "a finite number > 0", lambda x: x > 0)
    x = torch.cat([e, c.to(e.dtype)])
    x = _normalized(x) if normalize else x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    positive = (wide * wide.roll(len(rows), 0)).sum(1) / temperature
    lse = _lse_without_itself(x, wide, temperature, options)
    return reduce(lse - positive, torch.ones_like(lse, dtype=torch.bool), reduction)


def _check_pairs(e: Any, c: Any, normalize: Any, reduction: Any, options: Any) -> Tensor:
    """The targets (B,) 0 to B - 1 of checked pairs."""
    check_options(options, ContrastiveOptions.__annotations__)
    checks.check_float_tensor("e", e)
    if e.ndim != 2 or len(e) < 1:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected (B, D) with B >= 1")
    checks.check_floats("c", c, tuple(e.shape), "e's shape", e)
    checks.check_bool("normalize", normalize)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    return torch.arange(len(e), device=e.device)


def _normalized(x: Tensor) -> Tensor:
    """Rows of norm 1, computed in at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).to(x.dtype)


def _of_pairs(e: Tensor, c: Tensor, targets: Tensor, options: ContrastiveOptions) -> Tensor:
    return Call.of(e, c, targets, options).nll()


def _lse_without_itself(x: Tensor, wide: Tensor, temperature: float, options: ContrastiveOptions) -> Tensor:
    """(M,) log sum_{k != i} exp(x_i . x_k / t) of every row of ``x`` (M, D); ``wide`` is x in at least float32."""
    inside = _lse_inside_blocks(wide, temperature)
    blocks = -(-len(x) // _BLOCK)
    if blocks == 1:
        return inside
    block = torch.arange(len(x), device=x.device) // _BLOCK
    codes = F.one_hot(block, blocks).to(x.dtype)  # x_i . x_k - FAR t [same block] of the concatenated columns
    rows = torch.cat([x, codes * -_FAR], 1)
    outside = terms(rows, torch.cat([x, codes], 1), block, outputs=["lse"], logit_scale=1 / temperature, **options).lse
    assert outside is not None
    return torch.logaddexp(inside, outside)


def _lse_inside_blocks(x: Tensor, temperature: float) -> Tensor:
    """(M,) the same sum over the rows of a row's own block of ``_BLOCK``."""
    m = len(x)
    size = min(m, _BLOCK)
    tiles = F.pad(x, (0, 0, 0, -m % size)).view(-1, size, x.shape[1])
    z = tiles @ tiles.mT / temperature  # (blocks, size, size)
    place = torch.arange(len(tiles) * size, device=x.device).view(-1, 1, size)
    itself = torch.eye(size, dtype=torch.bool, device=x.device)
    # A finite number: the block of one row has nothing else, and the gradient of a sum of -inf alone is NaN.
    z = z.masked_fill(itself | (place >= m), torch.finfo(z.dtype).min)
    return z.logsumexp(-1).flatten()[:m]
