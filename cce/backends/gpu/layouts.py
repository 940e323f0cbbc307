"""Layouts of tensors: kernels take pointers without strides, and this is the one place that makes tensors fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from cce.backends.problem import Inputs, Outputs, Upstream

Fields = TypeVar("Fields", Inputs[Tensor], Outputs[Tensor], Upstream[Tensor])

#: Names of the matrices, which are copied in pieces where they are not aligned (operands.py).
_MATRICES = ("e", "c")


def contiguous(fields: Fields) -> Fields:
    """Return the fields with every vector and (N, K) table contiguous: a column, or one expanded number, is copied."""
    copies = {
        name: x.contiguous()
        for name, x in vars(fields).items()
        if x is not None and name not in _MATRICES and not x.is_contiguous()
    }
    return replace(fields, **copies) if copies else fields
