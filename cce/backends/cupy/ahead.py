"""Kernel arguments for rows to be gathered for the next window (cuda/sm90/ahead.cuh)."""

from __future__ import annotations

from ctypes import c_int, c_longlong, c_void_p

from cce.backends.cupy.launch import Arguments, strided
from cce.backends.gpu.library import Ahead


class AheadArguments(Arguments):
    """Struct ``Ahead`` of sm90/ahead.cuh."""

    _fields_ = (
        ("from_", c_void_p), ("order", c_void_p), ("to", c_void_p), ("pitch", c_longlong), ("rows", c_int),
        ("pieces", c_int),
    )  # fmt: skip

    @classmethod
    def of(cls, ahead: Ahead | None) -> AheadArguments:
        if ahead is None:
            return cls()
        size, width = ahead.c.element_size(), ahead.out.shape[1]
        return cls(
            from_=strided(ahead.c), order=ahead.order, to=ahead.out, pitch=ahead.c.stride(0) * size // 16,
            rows=len(ahead.out), pieces=width * size // 16,
        )  # fmt: skip
