"""Products by torch of narrow factors into a wide sum."""

from __future__ import annotations

import torch
from torch import Tensor


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


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write out = a b, rounded to the dtype of ``out``."""
    if out.dtype == a.dtype:
        narrow_product(a, b, out)
    else:
        out.copy_(narrow_product(a, b))
