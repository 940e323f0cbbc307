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

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cce import registry
from cce.backends.base import Backend
from cce.backends.problem import Inputs, Problem
from cce.backends.resolve import resolve
from cce.backends.shared.rows import rows_in_use, select
from cce.frontend import transforms
from cce.frontend.held import Held
from cce.frontend.operators import no_second_derivative
from cce.frontend.rows import own_dtypes, placed_gradients, zero_gradients
from cce.spec import Spec


@dataclass(frozen=True)
class Call:
    """What a backend needs beside the tensors.

    Attributes:
        backend: that runs it.
        problem, spec: of all rows; ``spec`` is resolved.
        grads: names of the gradients wanted.
    """

    backend: Backend
    problem: Problem
    spec: Spec
    grads: str

    @property
    def gradient_bytes(self) -> int:
        """Size of all gradients that are computed along with the loss."""
        p = self.problem
        sizes = ((p.grad_e, p.n * p.d * p.e_dtype.itemsize), (p.grad_c, p.v * p.d * p.c_dtype.itemsize))
        return sum(size for wanted, size in sizes if wanted) + 4 * p.v * p.grad_bias

    def run(
        self, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The weighted sum, and dE, dC and dbias (None where not wanted) for an upstream gradient of 1."""
        rows, used = (None, targets) if self.backend.skips_ignored_rows else rows_in_use(targets)
        count = used.shape[0]
        if count == 0:  # weights of ignored rows are 0, or NaN in a mean over nothing
            return (weights.sum(), *zero_gradients(e, c, bias, self.grads))
        problem = self.problem if count == self.problem.n else replace(self.problem, n=count)
        weights = select(weights, rows)
        with own_dtypes(e):
            outputs, found = self.backend.loss_and_gradients(
                Inputs(e, c, used, bias, rows), problem, self.spec, weights
            )
            value = self.backend.value(outputs, weights)
        return (value, *placed_gradients(found, e, c, bias, rows))


def choose(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    spec: Spec,
    grads: str,
) -> Call | None:
    """How to run this call in one pass, if the backend that would run it should; decided from metadata."""
    # Compiled code sees forward and backward as one node each; a transform of torch.func wants no state beside it.
    if not grads or transforms.traced(e) or transforms.active():
        return None
    problem = Problem.of(e, c, bias, targets, softcap, logit_scale, "", grads)
    # In float16, gradients of a mean underflow before a GradScaler's factor is known, which only backward brings.
    if problem.n == 0 or torch.float16 in (problem.e_dtype, problem.c_dtype):
        return None
    resolved = resolve(spec, problem)
    chosen = registry.choose(backend, problem, resolved)
    return Call(chosen, problem, resolved, grads) if chosen.one_pass(problem, resolved) else None


def weighted_loss(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, call: Call) -> Tensor:
    """``sum_ik weights_ik (lse_i - z[i, targets_ik])``, in the dtype of ``weights``.

    Args:
        e: (M, D); c: (V, D); bias: (V,) or None.
        targets: (M, K) from ``prepare_targets``; weights: (M, K), without gradient, of the accumulation dtype.
        call: how.
    """
    value: Tensor = _WeightedLoss.apply(e, c, bias, targets, weights, call)  # type: ignore[no-untyped-call]
    return value


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, call: Call
    ) -> Tensor:
        ctx.save_for_backward(e, c, bias, targets, weights)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.held = call, Held(call.gradient_bytes, call.spec.scratch_bytes, e.device)
        value, *gradients = call.run(e, c, bias, targets, weights)
        ctx.held.keep(gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        e, c, bias, targets, weights = ctx.saved_tensors
        gradients = ctx.held.take()
        if gradients is None:
            gradients = ctx.call.run(e, c, bias, targets, weights)[1:]
        with torch.no_grad():
            _scale(ctx.call.backend, gradients, upstream, targets)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Once.apply(upstream, e, c, bias, *gradients)  # type: ignore[no-untyped-call]
        found = (x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True))
        return (*found, None, None, None)


def _scale(backend: Backend, gradients: list[Tensor | None], factor: Tensor, targets: Tensor) -> None:
    """Multiplies the gradients by ``factor``; those of rows without a target stay 0, though it, or c, be NaN or inf."""
    on_cpu = factor.device.type == "cpu"  # where values may be looked at
    finite = on_cpu and bool(factor.isfinite())
    if on_cpu and not finite and not bool((targets >= 0).any()):
        return
    backend.scale([x for x in gradients if x is not None], factor)
    de = gradients[0]
    # A backend that never sees those rows multiplies nothing but the factor with them.
    if de is None or de.numel() == 0 or (finite and not backend.skips_ignored_rows):
        return
    ignored = targets < 0
    de.masked_fill_(ignored if targets.shape[1] == 1 else ignored.all(1, keepdim=True), 0)


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
