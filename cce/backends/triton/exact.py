"""The exact backward: chunks of the vocabulary, recomputed by a kernel and multiplied by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.lent import Stretch, shaped, share_of_chunk, stretches
from cce.backends.gpu.products import product, sums_bytes, write_product
from cce.backends.gpu.sizes import cdiv, pitch, windows
from cce.backends.gpu.used_rows import of_used_rows
from cce.backends.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.backends.triton.call import Call
from cce.backends.triton.forward import weights_of
from cce.backends.triton.gradients import Formula, add_rank_one_dc, add_rank_one_de, finish_de
from cce.backends.triton.kernels.gradient import dense_kernel
from cce.backends.triton.operands import matrix
from cce.backends.triton.repeat import Repeated
from cce.spec import Spec


def exact(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Compute the gradients; rows without a target are left out."""

    def of_rows(
        inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
    ) -> Gradients[Tensor]:
        return _exact(Call.of(inputs, problem, spec), inputs, outputs, upstream)

    return of_used_rows(of_rows, inputs, problem, outputs, upstream)


def _exact(
    call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """Compute the gradients: dE accumulates in float32 over the chunks, dC of a chunk is complete and written once."""
    problem = call.problem
    formula = Formula.of(call, inputs, outputs, upstream)
    s = formula.upstream.s if problem.softcap is None else None  # with a softcap, s is part of dz
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    total = _chunks(call, inputs, formula, dc, dbias)
    de = None
    if total is not None:
        if s is not None:
            add_rank_one_de(call, inputs, s, total)
        de = finish_de(call, total, formula.norm)
    if formula.norm is not None and dbias is not None:
        dbias.mul_(formula.norm)
    if s is not None:
        unscaled = s if formula.norm is None else s * formula.norm
        add_rank_one_dc(call, inputs.logit_weight, unscaled, dc, dbias)
    return Gradients(de, dc, dbias)


def _chunks(
    call: Call, inputs: Inputs[Tensor], formula: Formula, dc: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    """Return the float32 sum of dE; write dC and dbias. The scratch memory is freed before dE is rounded."""
    problem, total = call.problem, None
    launch, sums = _dz(call, inputs, formula), sums_bytes(problem, call.spec)
    own = call.c.dtype == problem.dtype  # else a chunk's rows of c are copied, and must be few
    lending, share = dc if own else None, share_of_chunk(problem.n, problem.d)
    for stretch in stretches(problem.v, lending, call.launch.dense.columns, share, call.spec.scratch_bytes):
        places, memory = _places(call, stretch, sums)
        for v0, v1 in places:
            dz = _chunk(call, launch, memory, v0, v1, None if dbias is None else dbias[v0:v1])
            if problem.grad_e:
                total = product(dz, _rows_of_c(call, v0, v1), torch.float32, total)
            if dc is not None:
                write_product(dz.T, call.e, dc[v0:v1], formula.norm, sums)
    return total


def _places(call: Call, stretch: Stretch, sums: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Places of each chunk of a stretch, and the memory for its dx: lent rows of dC, or the scratch memory."""
    n, size = call.problem.n, call.problem.dtype.itemsize
    room = call.spec.scratch_bytes - sums if stretch.lent is None else stretch.lent.numel()
    places = windows(stretch.v1 - stretch.v0, call.launch.dense.columns, n * size, room)
    memory = stretch.lent
    if memory is None:
        memory = call.empty(n * pitch(places[0][1]) * size, dtype=torch.uint8)
    return [(stretch.v0 + v0, stretch.v0 + v1) for v0, v1 in places], memory


def _dz(call: Call, inputs: Inputs[Tensor], formula: Formula) -> Repeated:
    """Kernel that computes dx of a chunk, with the arguments that are the same for all chunks."""
    problem, launch, tile = call.problem, call.launch, call.launch.dense
    weighted = formula.upstream.s is not None and problem.softcap is not None
    arguments = {
        **call.operands(tile, call.e), **formula.arguments(),
        "weight": weights_of(call, inputs.logit_weight) if weighted else None, "s": formula.upstream.s,
        "N": problem.n, "V": problem.v, "WEIGHTED": weighted, "DBIAS": problem.grad_bias,
        "DZ_TMA": launch.tma, "BLOCK_N": tile.rows, "TILE_V": tile.columns, "BLOCK_D": tile.depth,
        "GROUP_N": launch.group_n, "FLATTEN": tile.flatten,
    }  # fmt: skip
    tiles = cdiv(problem.n, tile.rows) * cdiv(problem.v, tile.columns)
    grid = (min(launch.programs, tiles),)
    return Repeated(dense_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)


def _chunk(call: Call, launch: Repeated, memory: Tensor, v0: int, v1: int, dbias: Tensor | None) -> Tensor:
    """Compute dx of a chunk, (N, v1 - v0); its column sums go into ``dbias`` (v1 - v0,)."""
    tile, n, columns = call.launch.dense, call.problem.n, v1 - v0
    width = pitch(columns)
    dz = shaped(memory, (n, width), call.problem.dtype)
    sums = call.empty(cdiv(n, tile.rows), columns) if dbias is not None else None
    stored = matrix(dz, tile.rows, tile.columns, call.launch.tma)
    launch(dz=stored, dbias=sums, stride_dz=width, v0=v0, columns=columns)
    if dbias is not None and sums is not None:
        torch.sum(sums, 0, out=dbias)
    return dz[:, :columns]


def _rows_of_c(call: Call, v0: int, v1: int) -> Tensor:
    """Rows of ``c`` in the products' dtype, (v1 - v0, D); a view where no copy is needed."""
    return call.c[v0:v1].to(call.problem.dtype)
