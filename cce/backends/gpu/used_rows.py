"""The exact backward's rows in use; the GPU is asked for them once, but not while a CUDA graph is captured.

The forward should ask before its kernels (:func:`ask`), and the backward read the answer: it arrives long before these
kernels are done, so that the host prepares the backward's launches while the forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.backends.shared.rows import rows_in_use, rows_of, used_rows

#: A backward whose rows are all in use.
Backward = Callable[[Inputs[Tensor], Problem, Outputs[Tensor], Upstream[Tensor]], Gradients[Tensor]]
_LARGEST = 1e30  # a bound on logits
_ASKED = "_cce_rows_in_use"  # attribute of the targets tensor, which autograd keeps unchanged for the backward


def is_captured(x: Tensor) -> bool:
    """Whether what is done with ``x`` is captured into a CUDA graph, so that nothing can be asked."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def ask(targets: Tensor) -> None:
    """Start copying the number of rows with a target to the host; the copy completes later."""
    if not targets.is_cuda or is_captured(targets):
        return
    count = torch.empty((), dtype=torch.int64, pin_memory=True)
    count.copy_((targets >= 0).any(1).sum(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    setattr(targets, _ASKED, (targets._version, event, count))


def rows_with_target(targets: Tensor, in_use: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Like :func:`cce.backends.shared.rows.rows_in_use`; after :func:`ask` it waits for the answer only."""
    asked: tuple[int, torch.cuda.Event, Tensor] | None = getattr(targets, _ASKED, None)
    if asked is None or in_use is not None or asked[0] != targets._version:
        return rows_in_use(targets, in_use)
    _, event, count = asked
    event.synchronize()
    if int(count) == len(targets):
        return None, targets
    rows = (targets < 0).all(1).to(torch.int8).argsort(stable=True)[: int(count)]
    return rows, targets.index_select(0, rows)


def of_used_rows(
    backward: Backward, inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Run ``backward`` without the rows that have no target, which takes one question to the GPU.

    While a CUDA graph is captured nothing can be asked: such rows are then computed as zeros. The order of the
    vocabulary makes no difference to an exact backward, so the natural order is used.
    """
    inputs = replace(inputs, vocab_order=None)
    if is_captured(inputs.e):
        return _as_zeros(backward, inputs, problem, outputs, upstream)
    rows, targets = rows_with_target(inputs.targets, inputs.in_use)
    if rows is None:
        return backward(inputs, problem, outputs, upstream)
    if len(rows) == 0:
        return _nothing(inputs, problem)
    used = rows if inputs.rows is None else inputs.rows.index_select(0, rows)
    part = replace(inputs, targets=targets, rows=used, in_use=None)
    found = backward(part, replace(problem, n=len(targets)), rows_of(outputs, rows), rows_of(upstream, rows))
    if found.de is None:
        return found
    de = found.de.new_zeros(problem.n, problem.d).index_copy_(0, rows, found.de)
    return replace(found, de=de)


def _as_zeros(
    backward: Backward, inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Run ``backward`` on all rows, with zeros and no upstream gradient in rows without a target."""
    used = used_rows(inputs)
    e = inputs.e if inputs.rows is None else inputs.e.index_select(0, inputs.rows)
    e = torch.where(used[:, None], e, 0)
    # The logits of such rows are the bias, which may be large: with this lse, exp(z - lse) is 0 for all of them.
    outputs = replace(outputs, lse=torch.where(used, outputs.lse, _LARGEST))
    found = backward(replace(inputs, e=e, rows=None), problem, outputs, in_rows(upstream, used))
    if found.de is not None:
        found.de.masked_fill_(~used[:, None], 0)  # clears 0 times an entry, which may be NaN
    return found


def in_rows(upstream: Upstream[Tensor], used: Tensor) -> Upstream[Tensor]:
    """Upstream gradients of the rows that are ``used`` (N,), and 0 for the others, whatever they hold."""
    unused = ~used
    kept: dict[str, Any] = {
        name: None if x is None else x.masked_fill(unused if x.ndim == 1 else unused[:, None], 0)
        for name, x in vars(upstream).items()
    }
    return Upstream(**kept)


def _nothing(inputs: Inputs[Tensor], problem: Problem) -> Gradients[Tensor]:
    """Gradients of a problem without any row in use."""
    c = inputs.c
    return Gradients(
        c.new_zeros(problem.n, problem.d) if problem.grad_e else None,
        c.new_zeros(problem.v, problem.d) if problem.grad_c else None,
        c.new_zeros(problem.v, dtype=torch.float32) if problem.grad_bias else None,
    )
