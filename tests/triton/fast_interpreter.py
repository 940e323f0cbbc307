"""Triton's interpreter without what it does again and again: a plugin, ``pytest -p fast_interpreter --part 0/4``.

Each launch, and each call of a device function, replaces the functions of ``triton.language`` anew; each operation
makes a table of dtypes, and checks a new type of blocks; operands of one type are asked for the type they have in
common; additions of integers are repeated in 64 bits, for an assertion that is off. Together that is three quarters of
the time; the operations on numbers are as they were.
"""

from __future__ import annotations

import dataclasses
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
    hasten()


def hasten() -> None:
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 has to be set before Triton is imported"
    keep_replaced()
    keep_dtypes()
    keep_block_types()
    leave_out_casts()
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

    def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # within a test for the argument that is given here

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_lang, interpreter._patch_attr = _patch_lang, _patch_attr


def keep_dtypes() -> None:
    make, made = interpreter._get_np_dtype, dict[str, Any]()

    def _get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # not all types have a hash
        if name not in made:
            made[name] = make(dtype)
        return made[name]

    interpreter._get_np_dtype = _get_np_dtype


def keep_block_types() -> None:
    """A type is one object, checked once, that equals itself and knows the sizes of its tensors."""
    block_type, made = tl.core.block_type, dict[tuple[Any, ...], Any]()
    fill = block_type.__init__

    def __new__(cls: Any, element_ty: Any, shape: Any) -> Any:
        key = element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape]
        found = made.get(key)
        if found is None:
            found = object.__new__(cls)
            fill(found, element_ty, shape)
            found.sizes = tl.constexpr(found.numel), tl.core.tuple([tl.constexpr(size) for size in found.shape])
            made[key] = found
        return found

    def __init__(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.sizes

    block_type.__new__, block_type.__init__ = __new__, lambda self, element_ty, shape: None
    tl.core.dtype.sizes = tl.constexpr(1), tl.core.tuple([])  # of no block
    compare = tl.core.dtype.__eq__
    tl.core.dtype.__eq__ = lambda self, other: self is other or compare(self, other)
    tl.core.tensor.__init__ = __init__


#: Of two such numbers the result has the same type, whatever the operation. (Quotients of 16 bits are float32.)
_CLOSED = {"fp32", "fp64", "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}


def leave_out_casts() -> None:
    """Operands of one type are neither cast nor broadcast."""
    semantic, tensor = interpreter.TritonSemantic, tl.core.tensor
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *more: Any, **options: Any) -> Any:
        if isinstance(lhs, tensor) and isinstance(rhs, tensor) and lhs.type is rhs.type and lhs.dtype.name in _CLOSED:
            return lhs, rhs
        return check(self, lhs, rhs, *more, **options)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape or (lhs.shape.values and lhs.shape.values == rhs.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    semantic.broadcast_impl_value = broadcast_impl_value


def leave_out_overflows() -> None:
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # else the assertion was on
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
