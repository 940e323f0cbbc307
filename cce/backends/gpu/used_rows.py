"""The exact backward's rows: those that count, for which the GPU is asked once, but not while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cce.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.rows import rows_in_use, rows_of, used_rows

#: A backward of rows that all count.
Backward = Callable[[Inputs[Tensor], Problem, Outputs[Tensor], Upstream[Tensor]], Gradients[Tensor]]


def of_used_rows(
    backward: Backward, inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """What ``backward`` gives; rows without a target are left out, which takes one question to the GPU.

    While a CUDA graph is captured nothing can be asked: then such rows are computed as zeros. In what order the
    vocabulary is taken makes no difference to an exact backward, so it comes in its own.
    """
    inputs = replace(inputs, vocab_order=None)
    if inputs.e.is_cuda and torch.cuda.is_current_stream_capturing():
        e = inputs.e if inputs.rows is None else inputs.e.index_select(0, inputs.rows)
        e = torch.where(used_rows(inputs)[:, None], e, 0)
        return backward(replace(inputs, e=e, rows=None), problem, outputs, upstream)
    rows, targets = rows_in_use(inputs.targets, inputs.in_use)
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


def _nothing(inputs: Inputs[Tensor], problem: Problem) -> Gradients[Tensor]:
    """The gradients of no row at all."""
    c = inputs.c
    return Gradients(
        c.new_zeros(problem.n, problem.d) if problem.grad_e else None,
        c.new_zeros(problem.v, problem.d) if problem.grad_c else None,
        c.new_zeros(problem.v, dtype=torch.float32) if problem.grad_bias else None,
    )
