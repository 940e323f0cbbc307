"""The PyTorch operators ``cce::forward`` and ``cce::backward``.

They are what torch.compile sees as one node each. Everything that depends on values happens inside them, and what
depends on the backend: the selection of the rows in use, the decision of a call that the front end has not decided.
Optional outputs and maps that were not asked for are empty tensors, since an operator's outputs cannot be None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.shared import targets as shared_targets
from cce.backends.shared.rows import rows_in_use, select
from cce.backends.shared.weighted_logit import finest_dtype
from cce.distributed import join
from cce.frontend.decision import Call, Request, decide, described
from cce.frontend.mean_logit import mean_logit_order
from cce.frontend.rows import own_dtypes, place_gradients, place_outputs, zero_gradients
from cce.spec import Spec
from cce.torch_private import differentiable, fake, operator

_MAPS = ("tile_mass", "tile_entropy")

#: The preparation of targets for compiled code, which cannot look at values.
prepare_targets = operator("cce::prepare_targets")(shared_targets.prepare)


@fake("cce::prepare_targets")
def _(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    return torch.empty_like(targets, dtype=torch.int64)


class Given(NamedTuple):
    """A call's arguments as its backend takes them."""

    inputs: Inputs[Tensor]
    problem: Problem
    rows: Tensor | None  # those in use, where the backend sees no others


class Forward(NamedTuple):
    """A backend's arguments and its results."""

    inputs: Inputs[Tensor]
    problem: Problem
    maps: Maps[Tensor]
    outputs: Outputs[Tensor]


def given(
    call: Call,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    wanted: str | None = None,
) -> Given | None:
    """The backend's arguments for the rows in use; None if there are no such rows.

    ``wanted``: gradients, where these are not all that the call may want.
    """
    rows, used = (None, targets) if call.backend.skips_ignored_rows else rows_in_use(targets)
    n = used.shape[0]
    if n == 0:
        return None
    return Given(Inputs(e, c, used, bias, rows, logit_weight, vocab_order), call.problem_of(n, wanted), rows)


def forward_of(
    call: Call,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
) -> Forward | None:
    """A backend's forward outside of autograd; None if no row is in use."""
    with own_dtypes(e), torch.no_grad():
        if vocab_order is None and call.spec.vocab_order == "mean_logit":
            vocab_order = mean_logit_order(e, c, bias, targets)
        made = given(call, e, c, bias, targets, logit_weight, vocab_order)
        if made is None:
            return None
        shape, dtype = (call.spec.tiles(call.problem.v), made.problem.n), call.problem.map_dtype(call.spec)
        names = made.problem.maps(call.spec)
        maps = Maps(**{name: e.new_empty(shape, dtype=dtype) for name in names})
        return Forward(
            made.inputs, made.problem, maps, call.backend.forward(made.inputs, made.problem, call.spec, maps)
        )


@operator("cce::forward")
def forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    scale: Tensor | None,
    call: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs per row of ``e`` (0, and -1 for the prediction, where the row is ignored), the maps, the order used.

    Args:
        e: (M, D). c: (V, D). bias, logit_weight, vocab_order: (V,).
        targets: (M, K) prepared.
        scale: a number on the CPU that takes the place of ``logit_scale``, where compiled code has it as an input.
        call: key of a request (``decision.py``).
    """
    decided = decide(e, c, bias, targets, _scaled(call, scale))
    empty = _empty_outputs(e, targets, decided.problem, decided.spec)
    order = empty[8]
    if order.numel() and vocab_order is None:
        with own_dtypes(e):
            vocab_order = order.copy_(mean_logit_order(e, c, bias, targets))
    made = given(decided, e, c, bias, targets, logit_weight, vocab_order)
    if made is None:
        return empty  # type: ignore[return-value]  # nine of them
    maps = _maps(empty[6:8], made.problem.n)
    with own_dtypes(e):
        arguments = (decided.backend, made.inputs, made.problem, decided.spec, maps)
        found = arguments[0].forward(*arguments[1:]) if decided.part is None else join.forward(decided.part, *arguments)
    return (*place_outputs(found, empty[:6], made.rows), *empty[6:])  # type: ignore[return-value]


@fake("cce::forward")
def _(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    scale: Tensor | None,
    call: str,
) -> tuple[Tensor, ...]:
    problem, spec, _ = described(e, c, bias, targets, Request.from_key(call))
    return _empty_outputs(e, targets, problem, spec)


@operator("cce::backward")
def backward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor],
    scale: Tensor | None,
    call: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dE (M, D), dC (V, D) and dbias (V,) in their inputs' dtypes; those not ``wanted`` are empty.

    ``saved`` is lse, nll, lse_low, entropy and the maps of the forward; ``upstream`` the gradients of lse, nll, entropy
    and weighted_logit, empty where there is none. ``scale`` and ``call`` are the forward's.
    """
    decided = decide(e, c, bias, targets, _scaled(call, scale))
    made = given(decided, e, c, bias, targets, logit_weight, vocab_order, wanted)
    if made is None:
        return zero_gradients(e, c, bias, wanted)
    if made.problem.maps(decided.spec) - decided.problem.maps(decided.spec):
        raise RuntimeError(
            "cce: backward through a loss that was traced under torch.no_grad, for which nothing was saved; "
            "trace it with gradients enabled, or with cce.Spec(filter='none')"
        )
    lse, nll, lse_low, entropy = (select(x, made.rows) for x in saved[:4])
    with own_dtypes(e):
        arguments = (
            decided.backend,
            made.inputs,
            made.problem,
            decided.spec,
            Outputs(lse, nll, lse_low, entropy if entropy.numel() else None),
            _maps(saved[4:], made.problem.n),
            _upstream(upstream, made.inputs.targets, made.rows, lse),
        )
        part = decided.part
        found = arguments[0].backward(*arguments[1:]) if part is None else join.backward(part, *arguments)
    return place_gradients(found, e, c, bias, made.rows)


@fake("cce::backward")
def _(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor],
    scale: Tensor | None,
    call: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return zero_gradients(e, c, bias, wanted)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the tensors that the gradients are computed from."""
    e, c, bias, targets, logit_weight, vocab_order, scale, ctx.call = inputs
    lse, nll, lse_low, entropy, _, prediction, *maps, order = output
    ctx.mark_non_differentiable(lse_low, prediction, *maps, order)
    ctx.set_materialize_grads(False)
    if vocab_order is None and order.numel():
        vocab_order = order
    ctx.save_for_backward(e, c, bias, targets, logit_weight, vocab_order, scale, lse, nll, lse_low, entropy, *maps)


def differentiate(operator: Callable[..., Any], ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of ``forward``'s arguments, from what ``setup_context`` saved; ``operator`` is ``backward``."""
    e, c, bias, targets, logit_weight, vocab_order, scale, *saved = ctx.saved_tensors
    wanted = ",".join(name for name, need in zip(("e", "c", "bias"), ctx.needs_input_grad[:3], strict=True) if need)
    of_outputs = (grads[0], grads[1], grads[3], grads[4])  # of lse, nll, entropy and weighted_logit
    upstream = [e.new_empty(0) if grad is None else grad for grad in of_outputs]
    de, dc, dbias = operator(
        e, c, bias, targets, logit_weight, vocab_order, saved, upstream, scale, ctx.call, wanted
    )  # fmt: skip
    needs = ctx.needs_input_grad
    return (de if needs[0] else None, dc if needs[1] else None, dbias if needs[2] else None, *[None] * 5)


differentiable("cce::forward", partial(differentiate, backward), setup_context)


def no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """Raise an error, in place of the derivative of a gradient, that names the alternative."""
    raise RuntimeError(
        "cce: second derivatives are not implemented, since they would need the logits again; "
        "use torch.nn.functional.cross_entropy(torch.nn.functional.linear(e, c), targets) for double backward"
    )


differentiable("cce::backward", no_second_derivative, lambda ctx, inputs, output: None)


def _scaled(call: str, scale: Tensor | None) -> str:
    """The key, with the number that compiled code had as an input."""
    return call if scale is None else Request.from_key(call)._replace(logit_scale=float(scale)).key


def _empty_outputs(e: Tensor, targets: Tensor, problem: Problem, spec: Spec) -> tuple[Tensor, ...]:
    """Outputs and maps filled for ignored rows; the maps are not initialised."""
    m, wide = e.shape[0], getattr(torch, str(spec.accumulate))
    maps, map_dtype = problem.maps(spec), problem.map_dtype(spec)

    def row(name: str, value: int = 0, dtype: torch.dtype = wide) -> Tensor:
        return e.new_full((m if name in problem.outputs else 0,), value, dtype=dtype)

    return (
        e.new_zeros(m, dtype=wide),
        e.new_zeros(targets.shape, dtype=wide),
        e.new_zeros(m, dtype=wide),
        row("entropy"),
        row("weighted_logit", dtype=finest_dtype(e.device)),
        row("prediction", -1, torch.int64),
        *(e.new_empty((spec.tiles(problem.v), m) if name in maps else (0, 0), dtype=map_dtype) for name in _MAPS),
        e.new_empty(problem.v if spec.vocab_order == "mean_logit" else 0, dtype=torch.int64),
    )


def _maps(tensors: Sequence[Tensor], n: int) -> Maps[Tensor]:
    """Views of the first ``n`` columns; a (0, 0) tensor stands for a map that is not kept."""
    views = {name: x[:, :n] if x.numel() else None for name, x in zip(_MAPS, tensors, strict=True)}
    return Maps(**views)


def _upstream(grads: Sequence[Tensor], targets: Tensor, rows: Tensor | None, lse: Tensor) -> Upstream[Tensor]:
    # A row without a target is none, whatever gradient a mean sends to its outputs.
    ignored = (targets < 0).all(1)

    def rows_of(x: Tensor, without: Tensor) -> Tensor | None:
        return select(x, rows).to(lse.dtype).masked_fill(without, 0) if x.numel() else None

    a, h, s = (rows_of(x, ignored) for x in (grads[0], *grads[2:]))
    g = rows_of(grads[1], targets < 0)
    if g is None:
        g = torch.zeros_like(targets, dtype=lse.dtype)
        return Upstream(torch.zeros_like(lse) if a is None else a, g, h, s)
    of_nll = g[:, 0] if g.shape[1] == 1 else g.sum(1)
    return Upstream(of_nll if a is None else a + of_nll, g, h, s)
