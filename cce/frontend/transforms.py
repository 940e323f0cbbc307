"""The operators under the transforms of ``torch.func``: grad, vjp, jacrev, vmap, and one inside of the other.

An operator of ``torch.library`` with a derivative refuses them (torch 2.13); a ``torch.autograd.Function`` in their
style does not. What is computed is the same, by the same operators.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from cce.backends.shared import targets as shared_targets
from cce.frontend import operators


def prepare_targets(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """``shared.targets.prepare`` under a transform."""
    found: tuple[Tensor] = _Targets.apply(targets, v, ignore_index)  # type: ignore[no-untyped-call]
    return found[0]


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """``operators.forward`` under a transform."""
    found: tuple[Tensor, ...] = _Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Sampled(torch.autograd.Function):
    """Base of functions that run one sample after the other under vmap: each has gradients of its own."""

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
        return (shared_targets.prepare(targets, v, ignore_index),)

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
