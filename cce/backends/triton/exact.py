"""The exact backward: chunks of the vocabulary, recomputed by a kernel, multiplied by the library."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce.backends.triton.call import Call
from cce.backends.triton.forward import weights_of
from cce.backends.triton.gradients import Formula, add_rank_one_dc, add_rank_one_de, finish_de
from cce.backends.triton.kernels.gradient import dense_kernel
from cce.backends.triton.operands import matrix
from cce.backends.triton.repeat import Repeated
from cce.backends.triton.sizes import cdiv, pitch
from cce.backends.triton.used import rows_with_target
from cce.problem import Gradients, Inputs, Outputs, Problem, Upstream
from cce.rows import rows_of, used_rows
from cce.spec import Spec

#: Bytes of a sum that later kernels find in the L2 cache: half of an H100's.
_CACHED = 25 * 10**6


def exact(
    inputs: Inputs[Tensor], problem: Problem, spec: Spec, outputs: Outputs[Tensor], upstream: Upstream[Tensor]
) -> Gradients[Tensor]:
    """The gradients; rows without a target are left out, which takes one question to the GPU (``used.py``).

    While a CUDA graph is captured nothing can be asked: then such rows are computed as zeros. In what order the
    vocabulary is taken makes no difference here.
    """
    inputs = replace(inputs, vocab_order=None)
    if inputs.e.is_cuda and torch.cuda.is_current_stream_capturing():
        e = torch.where(used_rows(inputs)[:, None], inputs.e, 0)
        inputs = replace(inputs, e=e)
        return _exact(Call.of(inputs, problem, spec), inputs, outputs, upstream)
    rows, targets = rows_with_target(inputs.targets, inputs.in_use)
    if rows is None:
        return _exact(Call.of(inputs, problem, spec), inputs, outputs, upstream)
    if len(rows) == 0:
        return _nothing(inputs, problem)
    used = rows if inputs.rows is None else inputs.rows.index_select(0, rows)
    part = replace(inputs, targets=targets, rows=used, in_use=None)
    part_problem = replace(problem, n=len(targets))
    call = Call.of(part, part_problem, spec)
    found = _exact(call, part, rows_of(outputs, rows), rows_of(upstream, rows))
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
    step, total = _columns(call), None
    scratch = call.empty(problem.n * pitch(min(step, problem.v)), dtype=problem.dtype)
    launch = _dz(call, inputs, formula)
    for v0 in range(0, problem.v, step):
        v1 = min(problem.v, v0 + step)
        sums = None if dbias is None else dbias[v0:v1]
        dz = _chunk(call, launch, scratch, v0, v1, sums)
        if problem.grad_e:
            total = _add_product(dz, _rows_of_c(call, v0, v1), total)
        if dc is not None:
            _write(call, dc, v0, v1, dz)
    return total


def _chunks_of_parts(
    call: Call, inputs: Inputs[Tensor], parts: list[_Part], dc: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """The same, some of the rows at a time and so more columns: the sum of dE passes through memory less often.

    Rows of dC are a sum over the parts, in float32.
    """
    problem, step = call.problem, _columns(parts[0].call)
    total = torch.zeros(problem.n, problem.d, device=call.e.device)
    scratch = call.empty(parts[0].call.problem.n * pitch(min(step, problem.v)), dtype=problem.dtype)
    launches = [_dz(part.call, inputs, part.formula) for part in parts]
    for v0 in range(0, problem.v, step):
        v1, sum_c = min(problem.v, v0 + step), None
        sums = None if dbias is None else dbias[v0:v1].zero_()
        for part, launch in zip(parts, launches, strict=True):
            found = None if sums is None else torch.empty_like(sums)
            dz = _chunk(part.call, launch, scratch, v0, v1, found)
            if sums is not None and found is not None:
                sums += found
            _add_product(dz, _rows_of_c(call, v0, v1), total[part.rows])
            sum_c = _add_product(dz.T, part.call.e, sum_c)
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


def _columns(call: Call) -> int:
    """Of a chunk: what fits into the scratch memory, in chunks of about equal size, whole tiles each."""
    problem, tile = call.problem, call.launch.dense.columns
    fit = max(tile, call.spec.scratch_bytes // (problem.n * problem.dtype.itemsize) // tile * tile)
    chunks = cdiv(problem.v, fit)
    return cdiv(cdiv(problem.v, chunks), tile) * tile


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


def _add_product(dz: Tensor, c: Tensor, total: Tensor | None) -> Tensor:
    """total + dz c in float32."""
    if dz.dtype == torch.float32:
        return torch.mm(dz, c) if total is None else total.addmm_(dz, c)
    if total is None:
        return product(dz, c, torch.float32)
    return product(dz, c, torch.float32, total)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
    """a b, added to ``total`` in place, of a dtype wider than the factors'."""
    if a.device.type == "cpu":  # the interpreter: the library has no such product there
        product = torch.mm(a.to(dtype), b.to(dtype))
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def _write(call: Call, dc: Tensor, v0: int, v1: int, dz: Tensor) -> None:
    """Rows of dC, dz^T e, in the dtype of ``c``."""
    if dc.dtype == call.e.dtype:
        torch.mm(dz.T, call.e, out=dc[v0:v1])
    else:
        dc[v0:v1] = torch.mm(dz.T, call.e)
