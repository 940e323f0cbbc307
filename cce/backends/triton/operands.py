"""Kernel operands: torch tensors as tensor-map descriptors where the hardware takes them, else as pointers."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce.backends.gpu.sizes import cdiv, power_of_two
from cce.backends.triton.kernels.rows import gather_kernel

_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def tma_ready(x: Tensor) -> bool:
    """Whether rows are contiguous, begin at multiples of 16 bytes, and share no memory.

    Rows of an expanded matrix or of overlapping windows share memory: no tensor map has a stride shorter than a row.
    """
    if x.ndim != 2 or x.numel() == 0:
        return False
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and aligned


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tensor map of ``x`` with boxes of rows x columns; elements outside read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def matrix(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Kernel argument for ``x``: a tensor map if ``tma``, else the tensor."""
    return descriptor(x, rows, columns) if tma else x


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton dtype of the products' factors."""
    return _DOT[dtype]


def needs_wide(x: Tensor) -> bool:
    """Whether an element of ``x`` may lie 2**31 elements or more from its first."""
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31


def gather(x: Tensor, index: Tensor, out: Tensor, keep: Tensor | None = None) -> Tensor:
    """Write ``x[index]`` into the first rows of ``out``, with zeros where ``keep``, if given, is False."""
    rows, d = len(index), x.shape[1]
    block_r, block_d = 16, min(512, power_of_two(d))
    gather_kernel[(cdiv(rows, block_r), cdiv(d, block_d))](
        x, index, keep, out, rows, d, x.stride(0), x.stride(1), KEEP=keep is not None, EVEN_D=d % block_d == 0,
        BLOCK_R=block_r, BLOCK_D=block_d,
    )  # fmt: skip
    return out[:rows]
