"""A sum of losses whose gradients are computed along with it.

Where the weight of every token is known before the forward (a mean or a sum), the gradients are known up to one
factor when the forward has seen a row's logits: a backend that holds all logits of some rows at once can multiply
them by ``c`` and by ``e`` there and then, and need not make them again. That is three products instead of four.

The gradients wait in the graph and are handed out, scaled in place, by the first backward; should a retained graph
be run again, they are computed anew, by the same code and so to the same bits. So are those of a loss that had to make
room: losses whose backward does not come (a validation without ``no_grad``), or comes late (a sum over micro-batches),
would hold a gradient of the size of ``c`` each (``Held``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cce.backends.base import OnePass
from cce.backends.problem import Gradients
from cce.backends.shared.rows import select
from cce.frontend.decision import Call
from cce.frontend.flatten import Flat
from cce.frontend.held import Held
from cce.frontend.operators import given, no_second_derivative
from cce.frontend.rows import own_dtypes, placed_gradients, zero_gradients


def total_loss(
    flat: Flat, coefficients: Tensor | None, of_tokens: Tensor | None, total: Callable[[], Tensor] | None
) -> Tensor | None:
    """The sum or mean of the losses with their gradients computed along with it; None if that cannot be done.

    The weights must be known before the forward, and the caller may multiply the gradients by one number only.

    Args:
        coefficients: (M, K) weights of the targets, or None.
        of_tokens: (M,) weights of the tokens, or None.
        total: makes the number that a mean divides by; None of a sum.
    """
    call = flat.call
    differentiable = any(x is not None and x.requires_grad for x in (coefficients, of_tokens))
    if call is None or call.one_pass is None or differentiable:
        return None
    weights = flat.mean_weights
    if weights is None:
        weights = flat.targets >= 0 if coefficients is None else coefficients
        if of_tokens is not None:
            weights = weights * of_tokens[:, None]
        # A mean over nothing has weights, too: NaN.
        weights = weights.to(flat.wide) if total is None else weights / total()
    value: Tensor = _WeightedLoss.apply(flat.e, flat.c, flat.bias, flat.targets, weights, call)  # type: ignore[no-untyped-call]
    return value


Found = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _run(
    call: Call, steps: OnePass, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
) -> Found:
    """The weighted sum, and dE, dC and dbias (None where not wanted) for an upstream gradient of 1."""
    made = given(call, e, c, bias, targets, None, None)
    if made is None:  # weights of ignored rows are 0, or NaN in a mean over nothing
        return (weights.sum(), *zero_gradients(e, c, bias, call.grads))
    weights = select(weights, made.rows)
    with own_dtypes(e):
        outputs, found = steps.loss_and_gradients(made.inputs, made.problem, call.spec, weights)
        value = steps.value(outputs, weights)
    return (value, *placed_gradients(found, e, c, bias, made.rows))


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, call: Call
    ) -> Tensor:
        ctx.save_for_backward(e, c, bias, targets, weights)
        ctx.set_materialize_grads(False)
        assert call.one_pass is not None
        ctx.call, ctx.steps = call, call.one_pass
        ctx.held = Held(call.gradient_bytes, call.spec.scratch_bytes, e.device)
        value, *gradients = _run(call, call.one_pass, e, c, bias, targets, weights)
        ctx.held.keep(gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        e, c, bias, targets, weights = ctx.saved_tensors
        gradients = ctx.held.take()
        if gradients is None:
            gradients = list(_run(ctx.call, ctx.steps, e, c, bias, targets, weights)[1:])
        with torch.no_grad():
            _scale(ctx.call, gradients, upstream, targets)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Once.apply(upstream, e, c, bias, *gradients)  # type: ignore[no-untyped-call]
        found = (x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True))
        return (*found, None, None, None)


def _scale(call: Call, gradients: Sequence[Tensor | None], factor: Tensor, targets: Tensor) -> None:
    """Multiply the gradients by ``factor``; rows without a target stay 0 even if the factor or c is NaN or inf."""
    assert call.one_pass is not None
    # A backend that never sees rows without a target multiplies nothing but the factor with them.
    skips = not call.backend.skips_ignored_rows and factor.device.type == "cpu" and bool(factor.isfinite())
    call.one_pass.scale(Gradients(*gradients), factor, None if skips else targets)


class _Once(torch.autograd.Function):
    """The gradients, with a clear error in place of their derivative."""

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, e: Tensor, c: Tensor, bias: Tensor | None, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        no_second_derivative(ctx, *grads)
