"""Products by torch of narrow factors into a wide sum."""

from __future__ import annotations

import torch
from torch import Tensor

from cce.backends.gpu.sizes import least_scratch
from cce.backends.problem import Problem
from cce.spec import Spec

#: Least number of rows whose float32 sums are made at once; it keeps their starts aligned to 16 bytes.
_LEAST_ROWS = 16


def product(a: Tensor, b: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
    """Return a b in ``dtype``, or add it to ``total`` in place; neither is narrower than the factors."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.device.type == "cpu":  # kernels interpreted or simulated: torch has no such product on a CPU
        found = torch.mm(a.to(dtype), b.to(dtype))
        return found if total is None else total.add_(found)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def sums_bytes(problem: Problem, spec: Spec) -> int:
    """Bytes of the exact backward's scratch memory for the float32 sums of a float16 dC; 0 for other dtypes."""
    if not problem.grad_c or problem.dtype != torch.float16:
        return 0
    return max(0, min(spec.scratch_bytes // 4, spec.scratch_bytes - least_scratch(problem, spec)))


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write out = a b, in a dtype not narrower than the factors'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def narrow_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a b in the factors' dtype."""
    if a.device.type == "cpu" and a.dtype != torch.float32:
        # oneDNN's bfloat16 products on AMX read beyond the end of a row (padding or the next row), and any NaN there.
        found = torch.mm(a.float(), b.float()).to(a.dtype)
        return found if out is None else out.copy_(found)
    return torch.mm(a, b, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += a b, all in one dtype; the sum is rounded once."""
    if a.device.type == "cpu" and a.dtype != torch.float32:  # as narrow_product does
        out.copy_(out.float().addmm_(a.float(), b.float()))
    else:
        out.addmm_(a, b)


def write_product(a: Tensor, b: Tensor, out: Tensor, norm: Tensor | None = None, room: int = 0) -> None:
    """Write out = a b, times ``norm`` if there is one, rounded to the dtype of ``out``.

    With a ``norm``, sums stay in float32 until they are multiplied by it, some rows at a time. Factors within float16's
    range may have a product outside it, although the product times ``norm`` is within: 12 * 16384, and 1/16 of that.

    Args:
        a: (M, N); b: (N, D); out: (M, D).
        norm: tensor with one element.
        room: bytes that sums may take; those of a few rows they may in any case.
    """
    if norm is not None:
        rows = max(_LEAST_ROWS, room // (4 * b.shape[1]) // _LEAST_ROWS * _LEAST_ROWS)
        sums = out.new_empty(min(rows, len(out)), b.shape[1], dtype=torch.float32)
        for part, of_a in zip(out.split(rows), a.split(rows), strict=True):
            wide_product(of_a, b, sums[: len(part)])
            torch.mul(sums[: len(part)], norm, out=part)
    elif out.dtype == a.dtype:
        narrow_product(a, b, out)
    else:
        out.copy_(narrow_product(a, b))


def scaled_product(a: Tensor, b: Tensor, norm: Tensor | None) -> Tensor:
    """Return a b, times ``norm`` if there is one, in the factors' dtype."""
    if norm is None:
        return narrow_product(a, b)
    out = a.new_empty(len(a), b.shape[1])
    write_product(a, b, out, norm, 4 * out.numel())
    return out
