"""The rows of a call that count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from cce.backends.problem import Inputs, Outputs, Upstream


def used_rows(inputs: Inputs[Tensor]) -> Tensor:
    """Mask of the rows that count, (N,) bool."""
    return (inputs.targets >= 0).any(1) if inputs.in_use is None else inputs.in_use


def rows_in_use(targets: Tensor, in_use: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """Indices of the rows ``in_use`` (default: those with a target), or None for all rows; and their targets (N, K)."""
    in_use = (targets >= 0).any(1) if in_use is None else in_use
    rows = in_use.nonzero()[:, 0]
    if len(rows) == len(targets):
        return None, targets
    return rows, targets.index_select(0, rows)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``x[rows]``; an empty ``x`` stands for an absent one and is returned as it is."""
    return x if rows is None or x.numel() == 0 else x.index_select(0, rows)


Fields = TypeVar("Fields", Outputs[Tensor], Upstream[Tensor])


def rows_of(fields: Fields, rows: slice | Tensor) -> Fields:
    """The same dataclass with only ``rows`` of every field."""
    taken: dict[str, Any] = {name: None if x is None else x[rows] for name, x in vars(fields).items()}
    return replace(fields, **taken)
