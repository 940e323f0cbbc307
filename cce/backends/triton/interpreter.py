"""Fixes for bfloat16 in Triton's interpreter, which multiplies its bits as integers and truncates instead of rounding.

They apply only with TRITON_INTERPRET=1, for running the kernels without a GPU. Seen in Triton 3.6.0 and 3.9.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def correct_bfloat16() -> None:
    """Make products widen bfloat16 factors, and conversions from float32 round to nearest even."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(self, a), _widened(self, b), d, *options)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def _widened(self: Any, x: Any) -> Any:
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    # Conversions also go through this function, and were bound to the one it replaces.
    builder.create_fp_trunc = lambda self, src, dst_type: self.cast_impl(src, dst_type)


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16).reshape(np.shape(x))
