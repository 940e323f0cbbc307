"""A call like an earlier one: what was checked and chosen for that holds for it.

Few rows take a GPU less than a millisecond, and the front end's checks and choices, which look at nothing but types,
shapes, dtypes and options, a quarter of that. They are made once for each kind of call of :func:`cce.loss` that runs in
one pass (``onepass.py``); the values of the targets are checked in every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce import registry
from cce.frontend import operators, transforms
from cce.frontend.flatten import Flat, wanted_gradients
from cce.frontend.one_pass import Call, choose, weighted_loss
from cce.spec import Spec

_MOST = 256  # kinds kept; a training step has one
_SIMPLE = frozenset({int, float, str, type(None)})

Kind = tuple[Any, ...]


class Known(NamedTuple):
    """What an earlier call was found to be.

    Attributes:
        call: how it runs.
        wide: dtype of the loss.
    """

    call: Call
    wide: torch.dtype


_known: dict[Kind, Known] = {}


def kind_of(e: Any, c: Any, targets: Any, bias: Any, spec: Any, options: tuple[Any, ...]) -> Kind | None:
    """All that the checks and choices of a call depend on; None where that is more than can be told from here.

    ``options``: numbers and names.
    """
    types = tuple(map(type, options))
    if not isinstance(e, Tensor) or transforms.traced(e) or not _SIMPLE.issuperset(types):
        return None
    if not torch.is_grad_enabled() or transforms.active() or torch.is_autocast_enabled(e.device.type):
        return None
    found: list[Any] = [registry.generation(), options, types]
    for x in (e, c, targets, bias):
        if x is None:
            found.append(None)
        elif type(x) in transforms.PLAIN:
            found += (x.shape, x.dtype, x.device, x.layout, x.requires_grad)
        else:
            return None
    if spec is not None:
        if type(spec) is not Spec or spec.permutation is not None:
            return None
        found.append(spec.key)
    return tuple(found)


def first(
    flat: Flat,
    coefficients: Tensor | None,
    of_tokens: Tensor | None,
    total: Callable[[], Tensor] | None,
    kind: Kind | None,
) -> Tensor | None:
    """The sum (mean) of the losses with their gradients computed along with it; None where that is not to be had.

    ``total`` makes what a mean divides by. The weights must be known beforehand, and it is the caller's to multiply the
    gradients by one number only. A call of this ``kind`` is remembered.
    """
    grads = wanted_gradients(flat.e, flat.c, flat.bias)
    if flat.part is not None or any(x is not None and x.requires_grad for x in (coefficients, of_tokens)):
        return None
    call = choose(
        flat.e, flat.c, flat.bias, flat.targets, flat.softcap, flat.logit_scale, flat.backend, flat.spec, grads
    )
    if call is None:
        return None
    if kind is not None and not flat.shift:
        _remember(kind, Known(call, flat.wide))
    if total is not None and coefficients is None and of_tokens is None:
        weights = call.backend.mean_weights(flat.targets, flat.wide)
    else:
        weights = flat.targets >= 0 if coefficients is None else coefficients
        if of_tokens is not None:
            weights = weights * of_tokens[:, None]
        # Of a mean over nothing, which is NaN, too.
        weights = weights.to(flat.wide) if total is None else weights / total()
    return weighted_loss(flat.e, flat.c, flat.bias, flat.targets, weights, call)


def _remember(kind: Kind, known: Known) -> None:
    if len(_known) >= _MOST:
        _known.clear()
    _known[kind] = known


def run(
    kind: Kind, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> Tensor | None:
    """The mean or sum of the losses, if there was a call of this kind."""
    known = _known.get(kind)
    if known is None:
        return None
    call, made, (v, d), mean = known.call, None, c.shape, reduction == "mean"
    if targets.is_cuda and os.environ.get("CCE_CHECK_TARGETS") != "1":
        made = call.backend.prepared(targets, v, ignore_index, mean)
    rows, weights = made or (operators.prepare_targets(targets.reshape(-1, 1), v, ignore_index), None)
    if weights is None:
        weights = call.backend.mean_weights(rows, known.wide) if mean else (rows >= 0).to(known.wide)
    return weighted_loss(e if e.ndim == 2 else e.reshape(-1, d), c, bias, rows, weights, call)
