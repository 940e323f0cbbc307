"""The exact backward: chunks of the vocabulary, recomputed by a kernel and multiplied by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.arrays import Dense, GradientOfWindow
from cce.backends.gpu.gradients import Scaled, add_mean_logit_to_de, add_mean_logit_to_entries, rounded_de
from cce.backends.gpu.kernels import Kernels
from cce.backends.gpu.lent import shaped, share_of_chunk, stretches
from cce.backends.gpu.operands import Call, Windows
from cce.backends.gpu.products import product, sums_bytes, write_product
from cce.backends.gpu.sizes import cdiv, pitch, windows
from cce.backends.gpu.used_rows import of_used_rows
from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.spec import Spec


def exact(
    kernels: Kernels,
    inputs: Inputs[Tensor],
    problem: Problem,
    spec: Spec,
    outputs: Outputs[Tensor],
    upstream: Upstream[Tensor],
) -> Gradients[Tensor]:
    """The gradients; rows without a target are left out."""

    def of_rows(
        inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
    ) -> Gradients[Tensor]:
        return _exact(Call.of(kernels, inputs, problem, spec), inputs, outputs, upstream)

    return of_used_rows(of_rows, inputs, problem, outputs, upstream)


def _exact(
    call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Compute the gradients: dE accumulates in float32 over the chunks, dC of a chunk is complete and written once."""
    problem, found = call.problem, Scaled.of(call, inputs, outputs, upstream)
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    total = _chunks(call, inputs, found, dc, dbias)
    de = None
    if total is not None:
        if found.s is not None:
            add_mean_logit_to_de(call, inputs, found.s, total)
        de = rounded_de(call, total, found.norm)
    if found.norm is not None and dbias is not None:
        dbias.mul_(found.norm)
    if found.s is not None:
        add_mean_logit_to_entries(call, inputs.logit_weight, found.s, found.norm, dc, dbias)
    return Gradients(de, dc, dbias)


def _chunks(
    call: Call, inputs: Inputs[Tensor], found: Scaled, dc: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    """Return the float32 sum of dE; write dC and dbias. The scratch memory is freed before dE is rounded."""
    problem, total = call.problem, None
    rows_of_c, unit = Windows(call, ordered=False, multiplied=True), call.sizes.gradient_columns
    weight = None if found.rows.s is None else call.weights(inputs.logit_weight)
    dense = Dense(call.e, call.formula, found.rows, weight, dbias is not None)
    gradient = call.kernels.gradient(problem, call.spec, dense)
    lending = None if rows_of_c.copied or problem.c_dtype != problem.dtype else dc  # copies must stay small
    row_bytes, sums = problem.n * problem.dtype.itemsize + rows_of_c.row_bytes, sums_bytes(problem, call.spec)
    for stretch in stretches(problem.v, lending, unit, share_of_chunk(problem.n, problem.d), call.spec.scratch_bytes):
        room = call.spec.scratch_bytes - sums if stretch.lent is None else stretch.lent.numel()
        places = windows(stretch.v1 - stretch.v0, unit, row_bytes, room)
        memory = stretch.lent
        if memory is None:
            memory = call.empty(problem.n * pitch(places[0][1]) * problem.dtype.itemsize, dtype=torch.uint8)
        for v0, v1 in ((stretch.v0 + v0, stretch.v0 + v1) for v0, v1 in places):
            c = rows_of_c.rows(v0, v1)
            dz = _dz(call, gradient, c, v0, memory, dbias)
            if problem.grad_e:
                total = product(dz, c[:, : problem.d], torch.float32, total)
            if dc is not None:
                write_product(dz.T, call.own_e, dc[v0:v1], found.norm, sums)
    return total


def _dz(call: Call, gradient: GradientOfWindow, c: Tensor, v0: int, memory: Tensor, dbias: Tensor | None) -> Tensor:
    """Compute dx of a chunk, (N, columns); its column sums go into ``dbias``."""
    n, columns = call.problem.n, c.shape[0]
    width = pitch(columns)
    dz = shaped(memory, (n, width), call.problem.dtype)[:, :columns]
    sums = None if dbias is None else call.empty(cdiv(n, call.sizes.gradient_rows), columns)
    gradient(c, v0, dz, sums)
    if dbias is not None and sums is not None:
        torch.sum(sums, 0, out=dbias[v0 : v0 + columns])
    return dz
