"""The operators under the transforms of ``torch.func``: grad, vjp, jacrev, vmap, and one inside of the other.

An operator of ``torch.library`` with a derivative refuses them (torch 2.13); a ``torch.autograd.Function`` in their
style does not. What is computed is the same, by the same operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from cce.frontend import operators
from cce.frontend.flops import tell_counters

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
    # There is no public question whether a mode of torch.utils._python_dispatch is active.
    if torch._C._len_torch_dispatch_stack() > 0:
        tell_counters()
        return True
    return e.is_meta or type(e) not in PLAIN


def _transformed() -> bool:
    # There is no public question; the first is that of torch.autograd.Function.apply.
    found: bool = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return found


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


def prepare_targets(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """``operators.prepare_targets``."""
    found: tuple[Tensor] = _Targets.apply(targets, v, ignore_index)  # type: ignore[no-untyped-call]
    return found[0]


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """``operators.forward``."""
    found: tuple[Tensor, ...] = _Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Sampled(torch.autograd.Function):
    """Under vmap one sample runs after the other: each has gradients of its own."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], Any]:
        pairs = list(zip(arguments, in_dims, strict=True))
        samples = [
            cls.apply(*(x if dim is None else x.select(dim, i) for x, dim in pairs))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        found = tuple(torch.stack(x) for x in zip(*samples, strict=True))
        return found, (0,) * len(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(
            "cce: forward-mode derivatives (torch.func.jvp, jacfwd, hessian) are not implemented; use torch.func.grad, "
            "vjp or jacrev, or torch.nn.functional.cross_entropy(torch.nn.functional.linear(e, c), targets)"
        )


class _Targets(_Sampled):
    @staticmethod
    def forward(targets: Tensor, v: int, ignore_index: int) -> tuple[Tensor]:
        return (operators.prepare_targets(targets, v, ignore_index),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
        return None, None, None


class _Forward(_Sampled):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return operators.forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operators.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return operators.differentiate(_backward, ctx, *grads)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, saved, upstream = arguments[:8]
    found: tuple[Tensor, ...] = _Backward.apply(len(saved), *tensors, *saved, *upstream, *arguments[8:])  # type: ignore[no-untyped-call]
    return found


class _Backward(_Sampled):
    @staticmethod
    def forward(saved: int, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, saved_tensors, rest = arguments[:6], arguments[6 : 6 + saved], arguments[6 + saved :]
        return operators.backward(*tensors, saved_tensors, rest[:4], *rest[4:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    backward = staticmethod(operators.no_second_derivative)
