"""The targets of a call as its backend takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.base import Backend
from cce.backends.shared import targets as shared
from cce.frontend import operators, tracing, transforms


def prepare(
    rows: Tensor, v: int, ignore_index: int, backend: Backend | None, mean: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Targets with -1 for ``ignore_index``, values checked, and their weights in a mean if these are wanted.

    Args:
        rows: (M, K) integers.
        v: entries of the whole vocabulary.
        backend: runs the call; None where that is decided later, in compiled or transformed code.
        mean: dtype of the weights, or None.
    """
    if backend is None:
        found = operators.prepare_targets if tracing.traced(rows) else shared.prepare
        return (transforms.prepare_targets if tracing.active() else found)(rows, v, ignore_index), None
    if rows.is_cuda and rows.numel() and not shared.checked_on_host(rows):
        return backend.prepare(rows, v, ignore_index, mean)
    return Backend.prepare(backend, rows, v, ignore_index, mean)
