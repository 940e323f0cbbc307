"""Layout of vectors and tables for the kernels: contiguous, since they are read without a stride."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from cce.backends.problem import Inputs, Outputs, Upstream

Fields = TypeVar("Fields", Inputs[Tensor], Outputs[Tensor], Upstream[Tensor])
_MATRICES = ("e", "c")  # kernels take their strides


def packed(fields: Fields) -> Fields:
    """Return the dataclass with every vector and (N, K) array contiguous; ``e`` and ``c`` keep their strides.

    All entry points to the kernels (``run.py``) begin with it, so a column of a matrix, an expanded number (which
    autograd often passes) or every second element of a vector never gets further.
    """
    changed: dict[str, Any] = {
        name: x.contiguous()
        for name, x in vars(fields).items()
        if x is not None and name not in _MATRICES and not x.is_contiguous()
    }
    return replace(fields, **changed) if changed else fields
