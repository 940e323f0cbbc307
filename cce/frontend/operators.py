"""The PyTorch operators ``cce::forward`` and ``cce::backward``.

They are what torch.compile sees as one node each. Everything that depends on values or chooses a backend
happens inside them: the check of the targets, the selection of the rows in use, the resolution of the spec.
Optional outputs and maps that were not asked for are empty tensors, since an operator's outputs cannot be None.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from cce import registry
from cce.backends.problem import Inputs, Maps, Outputs, Problem, Upstream
from cce.backends.resolve import resolve
from cce.backends.shared.rows import rows_in_use, select
from cce.backends.shared.weighted_logit import finest_dtype
from cce.distributed import join
from cce.distributed.join import Part
from cce.frontend.mean_logit import mean_logit_order
from cce.frontend.rows import own_dtypes, place_gradients, place_outputs, zero_gradients
from cce.spec import Spec
from cce.torch_private import differentiable, fake, operator

_MAPS = ("tile_mass", "tile_entropy")


def prepare_targets(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """``targets`` as int64 with -1 for ``ignore_index``; an entry outside [0, v) is an error, and never read.

    On a CPU the error is a ValueError here. On a GPU it is a device-side assertion, so that nothing waits;
    with CCE_CHECK_TARGETS=1 in the environment it is a ValueError there too, at the price of a synchronisation.
    """
    checked = targets.device.type == "cpu" or os.environ.get("CCE_CHECK_TARGETS") == "1"
    kernels = sys.modules.get("cce.backends.triton.run")
    if kernels is not None and not checked and targets.is_cuda and type(targets) is Tensor:
        # Triton's kernels are in use here, and one of them does all of this.
        return kernels.prepare_targets(targets, v, ignore_index)
    # Few operations: at a small N their launches take longer than the kernels.
    targets = targets.to(torch.int64)
    inside = targets.clamp(0, v - 1) == targets
    good = inside | (targets == ignore_index)
    if checked:
        if not bool(good.all()):
            where = (~good).nonzero()[0].tolist()
            raise ValueError(
                f"targets: got {int(targets[tuple(where)])} at index {tuple(where)}, "
                f"expected values in [0, {v}) or ignore_index={ignore_index}"
            )
    else:
        torch._assert_async(good.all())
    found = torch.where(inside, targets, -1)
    return found.masked_fill_(targets == ignore_index, -1) if 0 <= ignore_index < v else found


#: The same for compiled code, which cannot look at values.
prepare_targets_op = operator("cce::prepare_targets")(prepare_targets)


@fake("cce::prepare_targets")
def _(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    return torch.empty_like(targets, dtype=torch.int64)


@operator("cce::forward")
def forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    backend: str,
    spec: str,
    softcap: float | None,
    logit_scale: float,
    scale: Tensor | None,
    outputs: str,
    grads: str,
    part: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs per row of ``e`` (0, and -1 for the prediction, where the row is ignored), the maps, the order used.

    Args:
        e: (M, D). c: (V, D). bias, logit_weight, vocab_order: (V,).
        targets: (M, K) from ``prepare_targets``.
        backend: a name, or "auto". spec: its ``key``.
        scale: a number on the CPU that takes the place of ``logit_scale``, where compiled code has it as an input.
        outputs: comma-separated extra outputs. grads: those of "e", "c" and "bias" a gradient may be wanted for.
        part: key of the part of the vocabulary that ``c`` is, or "". Targets are counted over the whole.
    """
    logit_scale = _number(logit_scale, scale)
    problem = Problem.of(e, c, bias, targets, softcap, logit_scale, outputs, grads)
    resolved = _resolved(spec, problem, part)
    empty = _empty_outputs(e, targets, problem, resolved)
    chosen = registry.choose(backend, problem, resolved)
    split = Part.from_key(part)
    rows, used = (None, targets) if chosen.skips_ignored_rows else rows_in_use(targets)
    if len(used) == 0:
        return empty  # type: ignore[return-value]  # nine of them
    problem = replace(problem, n=len(used))
    maps, order = _maps(empty[6:8], problem.n), empty[8]
    with own_dtypes(e):
        if order.numel() and vocab_order is None:
            vocab_order = order.copy_(mean_logit_order(e, c, bias, targets))
        inputs = Inputs(e, c, used, bias, rows, logit_weight, vocab_order)
        if split is None:
            found = chosen.forward(inputs, problem, resolved, maps)
        else:
            found = join.forward(split, chosen, inputs, problem, resolved, maps)
    return (*place_outputs(found, empty[:6], rows), *empty[6:])  # type: ignore[return-value]


@fake("cce::forward")
def _(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_weight: Tensor | None,
    vocab_order: Tensor | None,
    backend: str,
    spec: str,
    softcap: float | None,
    logit_scale: float,
    scale: Tensor | None,
    outputs: str,
    grads: str,
    part: str,
) -> tuple[Tensor, ...]:
    problem = Problem.of(e, c, bias, targets, softcap, logit_scale, outputs, grads)
    return _empty_outputs(e, targets, problem, _resolved(spec, problem, part))


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
    backend: str,
    spec: str,
    softcap: float | None,
    logit_scale: float,
    scale: Tensor | None,
    outputs: str,
    grads: str,
    part: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dE (M, D), dC (V, D) and dbias (V,) in their inputs' dtypes; those not ``wanted`` are empty.

    ``saved`` is lse, nll, lse_low, entropy and the maps of the forward; ``upstream`` the gradients of lse, nll, entropy
    and weighted_logit, empty where there is none. ``grads`` is the forward's, from which its choice of backend and
    spec is made again.
    """
    logit_scale = _number(logit_scale, scale)
    problem = Problem.of(e, c, bias, targets, softcap, logit_scale, outputs, grads)
    resolved = _resolved(spec, problem, part)
    chosen = registry.choose(backend, problem, resolved)
    rows, used = (None, targets) if chosen.skips_ignored_rows else rows_in_use(targets)
    if len(used) == 0:
        return zero_gradients(e, c, bias, wanted)
    lse, nll, lse_low, entropy = (select(x, rows) for x in saved[:4])
    asked = Problem.of(e, c, bias, used, softcap, logit_scale, outputs, wanted)
    if asked.maps(resolved) - problem.maps(resolved):
        raise RuntimeError(
            "cce: a gradient is asked of a loss that was traced under torch.no_grad and kept nothing for it; "
            "trace it with gradients enabled, or with cce.Spec(filter='none')"
        )
    with own_dtypes(e):
        arguments = (
            Inputs(e, c, used, bias, rows, logit_weight, vocab_order),
            asked,
            resolved,
            Outputs(lse, nll, lse_low, entropy if entropy.numel() else None),
            _maps(saved[4:], asked.n),
            _upstream(upstream, used, rows, lse),
        )
        split = Part.from_key(part)
        found = chosen.backward(*arguments) if split is None else join.backward(split, chosen, *arguments)
    return place_gradients(found, e, c, bias, rows)


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
    backend: str,
    spec: str,
    softcap: float | None,
    logit_scale: float,
    scale: Tensor | None,
    outputs: str,
    grads: str,
    part: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return zero_gradients(e, c, bias, wanted)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what the gradients are computed from."""
    e, c, bias, targets, logit_weight, vocab_order, backend, spec, softcap, logit_scale, scale, *rest = inputs
    ctx.options = (backend, spec, softcap, logit_scale)
    ctx.rest = rest
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
        e, c, bias, targets, logit_weight, vocab_order, saved, upstream, *ctx.options, scale, *ctx.rest, wanted
    )
    needs = ctx.needs_input_grad
    return (de if needs[0] else None, dc if needs[1] else None, dbias if needs[2] else None, *[None] * 11)


differentiable("cce::forward", partial(differentiate, backward), setup_context)


def no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """What takes the place of the derivative of a gradient: an error that names the alternative."""
    raise RuntimeError(
        "cce: second derivatives are not implemented, since they would need the logits again; "
        "use torch.nn.functional.cross_entropy(torch.nn.functional.linear(e, c), targets) for double backward"
    )


differentiable("cce::backward", no_second_derivative, lambda ctx, inputs, output: None)


def _number(number: float, tensor: Tensor | None) -> float:
    return number if tensor is None else float(tensor)


def _resolved(key: str, problem: Problem, part: str) -> Spec:
    """The spec of a call; its default threshold is that of the whole vocabulary."""
    spec, split = Spec.from_key(key), Part.from_key(part)
    return resolve(spec, problem, None if split is None else split.total)


def _empty_outputs(e: Tensor, targets: Tensor, problem: Problem, spec: Spec) -> tuple[Tensor, ...]:
    """Outputs and maps as they are for ignored rows; the maps are not initialised."""
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
