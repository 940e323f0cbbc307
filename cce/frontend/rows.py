"""The rows of a call that a backend works on: chosen before it runs, put back at their places after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Outputs


def own_dtypes(e: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast: the front end has cast already; a backend's own float32 arithmetic stays float32."""
    device = e.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(e.device.type, enabled=False)


def place_outputs(found: Outputs[Tensor], empty: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    """The outputs at their places among all rows of ``e``."""
    values = (found.lse, found.nll, found.lse_low, found.entropy, found.weighted_logit, found.prediction)
    placed = []
    for value, place in zip(values, empty, strict=True):
        if value is None:
            placed.append(place)
        elif rows is None:
            placed.append(value.to(place.dtype))
        else:
            placed.append(place.index_copy_(0, rows, value.to(place.dtype)))
    return placed


def place_gradients(
    found: Gradients[Tensor], e: Tensor, c: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in their inputs' dtypes, dE at its rows' places; those that were not asked for are empty."""
    de, dc, dbias = (c.new_empty(0) if x is None else x for x in placed_gradients(found, e, c, bias, rows))
    return de, dc, dbias


def placed_gradients(
    found: Gradients[Tensor], e: Tensor, c: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in their inputs' dtypes, dE at its rows' places, with None for those not asked for."""
    de = None if found.de is None else _in(e, found.de)
    if rows is not None and de is not None:
        de = torch.zeros_like(e, memory_format=torch.contiguous_format).index_copy_(0, rows, de)
    dc = None if found.dc is None else _in(c, found.dc)
    dbias = None if found.dbias is None or bias is None else _in(bias, found.dbias)
    return de, dc, dbias


def _in(like: Tensor, x: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``; most often it is, and ``to`` would take a small call's time to find out."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def zero_gradients(e: Tensor, c: Tensor, bias: Tensor | None, wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    """dE, dC and dbias of a call without rows in use; those not ``wanted`` are empty."""
    names = set(wanted.split(","))

    def zero(name: str, x: Tensor | None) -> Tensor:
        if x is None or name not in names:
            return c.new_empty(0)
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    return zero("e", e), zero("c", c), zero("bias", bias)
