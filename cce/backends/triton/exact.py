"""The exact backward: chunks of the vocabulary, recomputed by a kernel, multiplied by the library."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.gpu.products import product, write_product
from cce.backends.gpu.sizes import cdiv, pitch, windows
from cce.backends.gpu.used_rows import of_used_rows
from cce.backends.triton.call import Call
from cce.backends.triton.forward import weights_of
from cce.backends.triton.gradients import Formula, add_rank_one_dc, add_rank_one_de, finish_de
from cce.backends.triton.kernels.gradient import dense_kernel
from cce.backends.triton.operands import matrix
from cce.backends.triton.repeat import Repeated
from cce.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.spec import Spec

#: Bytes of a sum that later kernels find in the L2 cache: half of an H100's.
_CACHED = 25 * 10**6


def exact(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """The gradients; rows without a target are left out."""

    def of_rows(
        inputs: Inputs[Tensor], problem: Problem, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
    ) -> Gradients[Tensor]:
        return _exact(Call.of(inputs, problem, spec), inputs, outputs, upstream)

    return of_used_rows(of_rows, inputs, problem, outputs, upstream)


def _exact(
    call: Call, inputs: Inputs[Tensor], outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """dE accumulates in float32 over the chunks; dC of a chunk is complete at once, and written once."""
    problem = call.problem
    formula = Formula.of(call, inputs, outputs, upstream)
    s = formula.upstream.s if problem.softcap is None else None  # with a softcap it is part of dz
    dc = call.empty(problem.v, problem.d, dtype=problem.c_dtype) if problem.grad_c else None
    dbias = call.empty(problem.v) if problem.grad_bias else None
    total = _chunks(call, inputs, formula, dc, dbias)
    de = None
    if total is not None:
        if s is not None:
            add_rank_one_de(call, inputs.logit_weight, s, total)
        de = finish_de(call, total, None, formula.norm)
    if formula.norm is not None:  # a power of two: exact, but where a float16 leaves its range
        for x in (dc, dbias):
            if x is not None:
                x.mul_(formula.norm)
    if s is not None:
        unscaled = s if formula.norm is None else s * formula.norm
        add_rank_one_dc(call, inputs.logit_weight, unscaled, dc, dbias)
    return Gradients(de, dc, dbias)


def _chunks(
    call: Call, inputs: Inputs[Tensor], formula: Formula, dc: Tensor | None, dbias: Tensor | None
) -> Tensor | None:
    """The float32 sum of dE; writes dC and dbias. The scratch memory is given back before dE is made of the sum."""
    problem = call.problem
    parts = _parts(call, formula)
    if len(parts) > 1:
        return _chunks_of_parts(call, inputs, parts, dc, dbias)
    total, places = None, _places(call)
    scratch = call.empty(problem.n * pitch(places[0][1]), dtype=problem.dtype)
    launch = _dz(call, inputs, formula)
    for v0, v1 in places:
        dz = _chunk(call, launch, scratch, v0, v1, None if dbias is None else dbias[v0:v1])
        if problem.grad_e:
            total = product(dz, _rows_of_c(call, v0, v1), torch.float32, total)
        if dc is not None:
            write_product(dz.T, call.e, dc[v0:v1])
    return total


def _chunks_of_parts(
    call: Call, inputs: Inputs[Tensor], parts: list[_Part], dc: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """The same, some of the rows at a time and so more columns: the sum of dE passes through memory less often.

    Rows of dC are a sum over the parts, in float32.
    """
    problem, largest = call.problem, parts[0].call
    places = _places(largest)
    total = torch.zeros(problem.n, problem.d, dtype=torch.float32, device=call.e.device)
    scratch = call.empty(largest.problem.n * pitch(places[0][1]), dtype=problem.dtype)
    launches = [_dz(part.call, inputs, part.formula) for part in parts]
    for v0, v1 in places:
        sum_c = None
        sums = None if dbias is None else dbias[v0:v1].zero_()
        for part, launch in zip(parts, launches, strict=True):
            found = None if sums is None else torch.empty_like(sums)
            dz = _chunk(part.call, launch, scratch, v0, v1, found)
            if sums is not None and found is not None:
                sums += found
            product(dz, _rows_of_c(call, v0, v1), torch.float32, total[part.rows])
            sum_c = product(dz.T, part.call.e, torch.float32, sum_c)
        assert dc is not None and sum_c is not None
        dc[v0:v1] = sum_c
    return total


@dataclass(frozen=True)
class _Part:
    """Some of the rows, as a problem of their own."""

    rows: slice
    call: Call
    formula: Formula


def _parts(call: Call, formula: Formula) -> list[_Part]:
    """All rows, or several parts of about equal size."""
    problem, tile = call.problem, call.launch.dense.rows
    step = cdiv(cdiv(problem.n, row_parts(call)), tile) * tile
    found = []
    for n0 in range(0, problem.n, step):
        rows = slice(n0, min(problem.n, n0 + step))
        part = replace(call, problem=replace(problem, n=rows.stop - n0), e=call.e[rows])
        found.append(_Part(rows, part, formula.of_rows(rows)))
    return found


def row_parts(call: Call) -> int:
    """1, 2 or 4: with how many the sums of dE and dC move the fewest bytes.

    A chunk reads and writes the sum of dE once, so that wider chunks of fewer rows save on it; with parts, the sum of
    the chunk's rows of dC is read and written, too, at a quarter of the price where it stays in the cache.
    """
    problem = call.problem
    if not problem.grad_e or not problem.grad_c:
        return 1
    columns = call.spec.scratch_bytes / (problem.n * problem.dtype.itemsize)
    if columns >= problem.v:
        return 1

    def moved(parts: int) -> float:
        """Bytes per element of c."""
        of_de = 8 * problem.n / (columns * parts)
        if parts == 1:
            return of_de
        cached = 4 * columns * parts * problem.d <= _CACHED
        return of_de + 8 * parts * (0.25 if cached else 1.0)

    best = min((1, 2, 4), key=moved)
    return best if moved(best) < 0.75 * moved(1) else 1


def _places(call: Call) -> list[tuple[int, int]]:
    """Of the chunks: what fits into the scratch memory."""
    problem = call.problem
    row_bytes = problem.n * problem.dtype.itemsize
    return windows(problem.v, call.launch.dense.columns, row_bytes, call.spec.scratch_bytes)


def _dz(call: Call, inputs: Inputs[Tensor], formula: Formula) -> Repeated:
    """The kernel that makes dx of a chunk, with the arguments that are the same for all chunks."""
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


def _chunk(call: Call, launch: Repeated, scratch: Tensor, v0: int, v1: int, dbias: Tensor | None) -> Tensor:
    """(N, v1 - v0): dx of a chunk; its column sums go into ``dbias`` (v1 - v0,)."""
    tile, n, columns = call.launch.dense, call.problem.n, v1 - v0
    width = pitch(columns)
    dz = scratch[: n * width].view(n, width)
    sums = call.empty(cdiv(n, tile.rows), columns) if dbias is not None else None
    stored = matrix(dz, tile.rows, tile.columns, call.launch.tma)
    launch(dz=stored, dbias=sums, stride_dz=width, v0=v0, columns=columns)
    if dbias is not None and sums is not None:
        torch.sum(sums, 0, out=dbias)
    return dz[:, :columns]


def _rows_of_c(call: Call, v0: int, v1: int) -> Tensor:
    """(v1 - v0, D) rows of ``c`` in the products' dtype; a view where no copy is needed."""
    return call.c[v0:v1].to(call.problem.dtype)
