"""Products of the library, of narrow factors into a wide sum."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
    """a b, added to ``total`` in place, of a dtype not narrower than the factors'."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.device.type == "cpu":  # kernels interpreted or simulated: the library has no such product there
        found = torch.mm(a.to(dtype), b.to(dtype))
        return found if total is None else total.add_(found)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, of a dtype not narrower than the factors'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def narrow_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in the factors' dtype."""
    if a.device.type == "cpu" and a.dtype != torch.float32:
        # oneDNN's bfloat16 products on AMX take up what lies behind a row, padding or the next row, with any NaN in it.
        found = torch.mm(a.float(), b.float()).to(a.dtype)
        return found if out is None else out.copy_(found)
    return torch.mm(a, b, out=out)


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, rounded to the dtype of ``out``."""
    if out.dtype == a.dtype:
        narrow_product(a, b, out)
    else:
        out.copy_(narrow_product(a, b))
