"""Who looks on while a call runs: a compiler, a tracer, a transform of ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from cce.frontend.flops import tell_counters
from cce.torch_private import dispatch_depth, forward_ad, transforms_active

_NOT_INSIDE = (
    "transforms of torch.func and forward-mode derivatives inside of torch.compile are not implemented; "
    "transform a compiled function, or leave this one out with torch.compiler.disable"
)

P = ParamSpec("P")
T = TypeVar("T")

#: Types of tensors that hold values here; another may be fake, or stand for a tensor somewhere else.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def traced(e: Tensor) -> bool:
    """Whether values cannot be looked at, or somebody watches the operators: a tracer, fake or meta tensors, a mode.

    Then a call is its operators and nothing else, as under torch.compile.
    """
    if torch.compiler.is_compiling():
        return True
    if dispatch_depth() > 0:
        tell_counters()
        return True
    return e.is_meta or type(e) not in PLAIN


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return transforms_active() or forward_ad._current_level >= 0


def eager_if_transformed(function: Callable[P, T]) -> Callable[P, T]:
    """The decorator of a function into which torch.compile does not look where the compiled code is transformed.

    ``torch.func.grad(torch.compile(f))`` traces f with its transform active, of which the operators know nothing.
    """

    def outside(*arguments: P.args, **options: P.kwargs) -> T:
        return torch.compiler.disable(function)(*arguments, **options)

    # What torch.compiler.disable sets; calling it here would import the compiler.
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside._torchdynamo_disable_msg = f"cce: {_NOT_INSIDE}"  # type: ignore[attr-defined]

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_compiling() and _transformed():
            return outside(*arguments, **options)
        return function(*arguments, **options)

    return run


def symbolic(number: float) -> bool:
    """Whether a number is an input of the code being compiled, not a constant of it."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def active() -> bool:
    """Whether the call is transformed, or differentiated in forward mode, of which the operators know nothing.

    Raises:
        RuntimeError: it is, and torch.compile is about to take the operators as they are.
    """
    found = _transformed()
    if found and torch.compiler.is_compiling():
        raise RuntimeError(f"cce: {_NOT_INSIDE}")
    return found
