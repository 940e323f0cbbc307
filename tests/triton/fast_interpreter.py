"""Triton's interpreter without what it does again and again: a plugin, ``pytest -p fast_interpreter``.

Each launch, and each call of a device function, replaces the functions of ``triton.language`` anew; each operation
makes a table of dtypes, each tensor a tuple of its sizes; additions of integers are repeated in 64 bits, for an
assertion that is off. Together that is two thirds of the time; the operations on numbers are as they were.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """What was replaced stays so: the process only interprets."""

    def restore(self) -> None:
        pass


def keep_replaced() -> None:
    replace, modules = interpreter._patch_lang, set[str]()

    def _patch_lang(fn: Any) -> _Kept:
        if fn.__module__ not in modules:
            replace(fn)
            modules.add(fn.__module__)
        return _Kept()

    interpreter._patch_lang = _patch_lang


def keep_dtypes() -> None:
    make, made = interpreter._get_np_dtype, dict[str, Any]()

    def _get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # not all types have a hash
        if name not in made:
            made[name] = make(dtype)
        return made[name]

    interpreter._get_np_dtype = _get_np_dtype


def keep_shapes() -> None:
    made: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in made:
            made[shape] = tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(size) for size in shape])
        self.numel, self.shape = made[shape]

    tl.core.tensor.__init__ = __init__


def leave_out_overflows() -> None:
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # else the assertion was on
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 has to be set before Triton is imported"
keep_replaced()
keep_dtypes()
keep_shapes()
leave_out_overflows()
