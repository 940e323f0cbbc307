"""The layout in which the kernels take what is no matrix: contiguous, since they read it without a stride."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from cce.backends.problem import Inputs, Outputs, Upstream

Fields = TypeVar("Fields", Inputs[Tensor], Outputs[Tensor], Upstream[Tensor])
_MATRICES = ("e", "c")  # of which kernels are told the strides


def packed(fields: Fields) -> Fields:
    """The same dataclass with every vector and every (N, K) array contiguous; ``e`` and ``c`` keep their strides.

    All entry points to the kernels (``run.py``) begin with it: a column of a matrix, a number expanded (as what comes
    from autograd often is) or every second element of a vector never gets further.
    """
    changed: dict[str, Any] = {
        name: x.contiguous()
        for name, x in vars(fields).items()
        if x is not None and name not in _MATRICES and not x.is_contiguous()
    }
    return replace(fields, **changed) if changed else fields
