"""Triton's interpreter without what it does again and again: a plugin, ``pytest -p fast_interpreter --part 0/6``.

Each launch, and each call of a device function, replaces the functions of ``triton.language`` anew; each operation
makes a table of dtypes, each tensor a tuple of its sizes; additions of integers are repeated in 64 bits, for an
assertion that is off. Together that is two thirds of the time; the operations on numbers are as they were.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

#: Tests that between them launch all kernels but three of the loss's small ones.
SMOKE = (
    "test_case[triton-everything]", "test_case[triton-filtered-order]", "test_case[triton-plain-bfloat16]",
    "test_option[triton-float32]", "test_layout[triton-terms, all column]",
    "test_pattern[triton-element, NaN upstream]",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", metavar="I/N", help="each N-th test from the I-th on, or: smoke")


def pytest_configure() -> None:
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 has to be set before Triton is imported"
    keep_replaced()
    keep_dtypes()
    keep_shapes()
    leave_out_overflows()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("part")
    smoke = [item for item in items if item.name in SMOKE]
    rest = [item for item in items if item.name not in SMOKE]
    first, step = (0, 1) if part == "smoke" else map(int, part.split("/"))
    chosen = set(smoke if part == "smoke" else rest[first::step])
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


class _Kept:
    """Functions stay replaced: the process only interprets."""

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
