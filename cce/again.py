"""A call like an earlier one: what was checked and chosen for that holds for it.

Few rows take a GPU less than a millisecond, and the front end's checks and choices, which look at nothing but types,
shapes, dtypes and options, a quarter of that. They are made once for each kind of call of :func:`cce.loss` that runs in
one pass (``onepass.py``); the values of the targets are checked in every call.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce import ops, registry, transforms
from cce.onepass import Call, weighted_loss
from cce.spec import Spec

_MOST = 256  # kinds kept; a training step has one
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
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
    if torch.compiler.is_compiling() or not _SIMPLE.issuperset(types) or not torch.is_grad_enabled():
        return None
    if transforms.active() or type(e) not in _PLAIN or torch.is_autocast_enabled(e.device.type):
        return None
    found: list[Any] = [registry.generation(), options, types]
    for x in (e, c, targets, bias):
        if x is None:
            found.append(None)
        elif type(x) in _PLAIN:
            found += (x.shape, x.dtype, x.device, x.layout, x.requires_grad)
        else:
            return None
    if spec is not None:
        if type(spec) is not Spec or spec.permutation is not None:
            return None
        found.append(spec.key)
    return tuple(found)


def remember(kind: Kind, call: Call, wide: torch.dtype) -> None:
    """A call of this kind runs so."""
    if len(_known) >= _MOST:
        _known.clear()
    _known[kind] = Known(call, wide)


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
    rows, weights = made or (ops.prepare_targets(targets.reshape(-1, 1), v, ignore_index), None)
    if weights is None:
        weights = call.backend.mean_weights(rows, known.wide) if mean else (rows >= 0).to(known.wide)
    return weighted_loss(e if e.ndim == 2 else e.reshape(-1, d), c, bias, rows, weights, call)
