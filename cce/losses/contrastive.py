"""Contrastive losses: the classifiers are the other embeddings of the batch.

A batch of B pairs is a vocabulary of B entries, and its B x B similarities need not be kept either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from cce.frontend import checks
from cce.frontend.reduction import reduce
from cce.functional import terms
from cce.losses.call import Call, check_options, divisible
from cce.losses.values import check_positive
from cce.spec import Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Rows whose similarities with each other are computed densely, to leave out those with themselves.
_BLOCK = 256
# A row with larger elements is scaled down before its norm is computed, as their squares would overflow float32.
_LARGE = 1e18


class ContrastiveOptions(TypedDict, total=False):
    """Options of :func:`cce.terms` that a contrastive loss accepts and passes on.

    Attributes:
        backend: name of the backend, as for :func:`cce.loss`.
        spec: a :class:`cce.Spec`, as for :func:`cce.loss`.
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
    """Symmetric contrastive loss of B pairs: each ``e_i`` must find its ``c_i``, and each ``c_i`` its ``e_i``.

    The loss is ``(CE(s e c^T) + CE(s c e^T)) / 2`` with the targets 0 to B - 1, from two passes over the similarities,
    with ``c`` and ``e`` in turn as the classifier.

    Args:
        e, c: (B, D) embeddings, for example of images and of their texts.
        logit_scale: scale s, above 0; a tensor with one element may be learned.
        normalize: divides every embedding by its norm first, as ``torch.nn.functional.normalize``.
        reduction: "mean" or "sum" over the pairs, or "none".
        **options: :class:`ContrastiveOptions`.

    Returns:
        Tensor: a scalar, or with "none" (B,).

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``e`` and ``c`` are not both (B, D), or
            ``logit_scale`` is not a finite number above 0 (a tensor on a GPU as for targets).

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021,
        arXiv 2103.00020, figure 3.

    >>> clip_contrastive(torch.eye(3), torch.eye(3), logit_scale=1.0)
    tensor(0.5514)
    """
    rows = _check_pairs(e, c, normalize, reduction, options)
    a, b = (_normalized(x) if normalize else x for x in (e, c))
    if isinstance(logit_scale, Tensor):
        checks.check_floats("logit_scale", logit_scale, (), "one number", e)
        check_positive("logit_scale", logit_scale)
        # Scale the embeddings instead of using the option logit_scale, which is not a tensor and has no gradient. Use a
        # wide dtype: the scale's gradient is the sum of two that may cancel, and is rounded once.
        logit_scale = logit_scale.to(torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32))
        forth = _of_pairs(_scaled(a, logit_scale, normalize), b, rows, options)
        back = _of_pairs(_scaled(b, logit_scale, normalize), a, rows, options)
    else:
        checks.check_number("logit_scale", logit_scale, "a finite number > 0", lambda x: x > 0)
        forth, back = (_of_pairs(x, y, rows, options, logit_scale=logit_scale) for x, y in ((a, b), (b, a)))
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

    Each of the 2 B views x_i must find its other view x_j among all but itself:
    ``-log(exp(x_i . x_j / t) / sum_{k != i} exp(x_i . x_k / t))``.

    The similarity of a view with itself is left out exactly. Subtracting it from a finished log-sum-exp would not work:
    it is the largest of its row, and at a small temperature only rounding error would be left. Instead the views are
    processed in blocks of 256. Similarities between blocks come from one call of ``cce.terms``, in which a few further
    columns of the embeddings make those inside a block vanish; the 2 B x 256 similarities inside the blocks are
    computed densely without the diagonal. All are relative to the pair's own, which may be large.

    Args:
        e, c: (B, D) each, the two views of B examples.
        temperature: temperature t, above 0.
        normalize: divides every embedding by its norm first, as ``torch.nn.functional.normalize``.
        reduction: "mean" or "sum" over the 2 B views, or "none".
        **options: :class:`ContrastiveOptions`.

    Returns:
        Tensor: a scalar, or with "none" (2 B,), the views of ``e`` first.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; ``e`` and ``c`` are not both
            (B, D), or ``temperature`` is not above 0 or its inverse overflows.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
        arXiv 2002.05709, equation 1.

    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    _check_pairs(e, c, normalize, reduction, options)
    x = torch.cat([e, c])
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = f"a finite number > 0 that has an inverse in {wide}"
    checks.check_number("temperature", temperature, expected, lambda x: x > 0 and divisible(1, x, wide))
    x = _normalized(x) if normalize else x
    nll = _nll_without_itself(x, temperature, options)
    return reduce(nll, torch.ones_like(nll, dtype=torch.bool), reduction)


def _check_pairs(e: Any, c: Any, normalize: Any, reduction: Any, options: Any) -> Tensor:
    """Check the pairs, and return their targets (B,), 0 to B - 1."""
    check_options(options, ContrastiveOptions.__annotations__)
    checks.check_float_tensor("e", e)
    if e.ndim != 2 or len(e) < 1:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected (B, D) with B >= 1")
    checks.check_floats("c", c, tuple(e.shape), "e's shape", e)
    checks.check_bool("normalize", normalize)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    return torch.arange(len(e), device=e.device)


def _normalized(x: Tensor) -> Tensor:
    """Normalize rows to norm 1, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.detach().abs().amax(1, keepdim=True)
    return F.normalize(wide / torch.where(largest > _LARGE, largest, 1), dim=1).to(x.dtype)


def _scaled(x: Tensor, scale: Tensor, normalized: bool) -> Tensor:
    """Multiply ``x`` by the scale; in float32 where the range of float16 may be too small."""
    return (x.float() if x.dtype == torch.float16 and not normalized else x) * scale


def _of_pairs(e: Tensor, c: Tensor, targets: Tensor, options: ContrastiveOptions, **others: Any) -> Tensor:
    return Call.of(e, c, targets, {**options, **others}).nll()


def _nll_without_itself(x: Tensor, temperature: float, options: ContrastiveOptions) -> Tensor:
    """Loss log sum_{k != i} exp(x_i . (x_k - x_j) / t) of each row of ``x`` (M, D), with j its other view: (M,)."""
    m, place = len(x), torch.arange(len(x), device=x.device)
    pair, block = place.roll(m // 2), place // _BLOCK
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = _inside_blocks(wide, pair, temperature)
    blocks = -(-m // _BLOCK)
    if blocks == 1:
        return inside
    # Relative to an entry of another block: the pair, or first an entry of the next block and then the pair.
    other = torch.where(block[pair] == block, (block + 1) % blocks * _BLOCK, pair)
    rows, columns = _hiding_blocks(x, wide, F.one_hot(block, blocks), temperature)
    outside = terms(rows, columns, other, outputs=["nll"], logit_scale=1 / temperature, **options).nll
    assert outside is not None
    to_pair = (wide * (wide[other] - wide[pair])).sum(1) / temperature
    return torch.logaddexp(inside, outside + to_pair)


def _hiding_blocks(x: Tensor, wide: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Rows and columns whose product is x_i . x_k, minus, inside a block, a number that makes its exp 0."""
    if x.dtype == torch.float16:
        x = wide  # float16 may not hold the square of a norm
    # |x_i . x_k| is at most the largest squared norm. Another 256 t beyond twice that is a factor e^-256.
    norm = wide.detach().square().sum(1).nan_to_num(0, 0, 0).amax()  # hiding an infinite norm by NaN would be no better
    far = (codes * (4 * norm + 256 * temperature).sqrt()).to(x.dtype)
    return torch.cat([x, -far], 1), torch.cat([x, far], 1)


def _inside_blocks(x: Tensor, pair: Tensor, temperature: float) -> Tensor:
    """The same logarithm over the rows of a row's own block of ``_BLOCK``, relative to ``pair`` in any block: (M,)."""
    m = len(x)
    size = min(m, _BLOCK)
    tiles = F.pad(x, (0, 0, 0, -m % size)).view(-1, size, x.shape[1])
    z = tiles @ tiles.mT / temperature  # (blocks, size, size)
    place = torch.arange(len(tiles) * size, device=x.device).view(-1, size, 1)
    first, pairs = place[:, :1], F.pad(pair, (0, -m % size)).view(-1, size, 1)
    here = pairs // size == first // size
    # Use the same product where available, so that the result is not negative.
    own = z.gather(-1, (pairs - first).clamp(0, size - 1))
    away = (tiles * F.pad(x[pair], (0, 0, 0, -m % size)).view_as(tiles)).sum(-1, keepdim=True) / temperature
    hidden = torch.eye(size, dtype=torch.bool, device=x.device) | (place.mT >= m)
    # With several blocks use a finite number, as a block may have no other term, and the gradient of -inf alone is NaN.
    z = z.masked_fill(hidden, -torch.inf if len(tiles) == 1 else torch.finfo(z.dtype).min)
    largest = z.detach().amax(-1, keepdim=True)
    found = (z - largest).logsumexp(-1, keepdim=True) + (largest - torch.where(here, own, away))
    return found.flatten()[:m]
