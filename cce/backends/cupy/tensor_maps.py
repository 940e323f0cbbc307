"""Tensor maps, the descriptions of matrices for the copy engine of sm_90, made by the driver without CuPy's help."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

#: Values from cuda.h: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion.
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B = 3
_L2_PROMOTION = 3
_BYTES, _ALIGNMENT = 128, 64


class TensorMap(ctypes.Structure):
    """Struct ``TensorMap`` of sm90/ptx.cuh."""

    _fields_ = [("opaque", ctypes.c_ubyte * _BYTES)]


def boxes(x: Tensor, rows: int) -> TensorMap:
    """Tensor map of a matrix with unit stride along its rows, in boxes of 64 columns; elements outside read as 0.

    Args:
        x: (any, any) bfloat16 or float16, base and pitch multiples of 16 bytes.
        rows: rows of a box, at most 256.

    Returns:
        Struct that a kernel takes by value.

    Raises:
        RuntimeError: the driver refuses the matrix.
    """
    return TensorMap.from_buffer_copy(box_bytes(x, rows))


def box_bytes(x: Tensor, rows: int) -> bytes:
    """Tensor map of :func:`boxes`, as bytes."""
    (height, width), pitch = x.shape, x.stride(0)
    return _encoded(x.data_ptr(), height, width, pitch * x.element_size(), rows, _DTYPES[x.dtype])


@lru_cache(maxsize=1024)  # training steps use the same few matrices again and again
def _encoded(address: int, height: int, width: int, pitch: int, rows: int, dtype: int) -> bytes:
    memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    to = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(to), dtype, 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(width, height),
        (ctypes.c_uint64 * 1)(pitch), (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128B,
        _L2_PROMOTION, 0,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {height} x {width}, {pitch} bytes a row")
    return ctypes.string_at(to, _BYTES)


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
