"""Run by test_row_parts.py in the interpreter: the exact backward in a given number of row parts, against float64."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

import cce
from cce.backends.triton import exact

N, D, V = 300, 40, 700


def gradients(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, ...]:
    """In float64, by definition."""
    leaves = [x.detach().double().requires_grad_() for x in (e, c, bias)]
    z = softcap * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / softcap)
    return torch.autograd.grad(F.cross_entropy(z, targets, label_smoothing=0.1), leaves)


def errors(parts: int, softcap: float | None, dtype: torch.dtype) -> list[float]:
    exact.row_parts = lambda call: parts
    rng = torch.Generator().manual_seed(parts)
    e, c, bias = (torch.randn(*shape, generator=rng).to(dtype) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=rng)
    targets[::7] = -100
    e[0] = torch.nan  # of a row that does not count
    leaves = [x.requires_grad_() for x in (e, c, bias)]
    spec = cce.Spec(filter="none", scratch_bytes=N * 256 * dtype.itemsize)
    loss = cce.loss(*leaves[:2], targets, leaves[2], softcap=softcap, label_smoothing=0.1, backend="triton", spec=spec)
    found = torch.autograd.grad(loss, leaves)
    expected = gradients(torch.where(targets < 0, 0, e.T).T, c, bias, targets, softcap or 1e6)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]


if __name__ == "__main__":
    cases = ((1, None, torch.float32), (2, None, torch.float32), (4, 10.0, torch.float32), (3, None, torch.bfloat16))
    print(json.dumps([errors(*case) for case in cases]))
