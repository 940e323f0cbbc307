"""Random inputs of a case of the contract."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from cce.testing.kernels.case import Case


def drawn(case: Case, rng: Generator) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """e, c and the bias; (N,) bool: rows that count, and rows that do so and have no softmax."""
    e = torch.randn(case.n, case.d, generator=rng)
    c = torch.randn(case.v, case.d, generator=rng) * (1.5 / math.sqrt(case.d))
    if case.integers:  # products are exact, and many of them equal
        e, c = (torch.randint(-1, 2, x.shape, generator=rng).float() for x in (e, c))
    bias = _bias(case, rng) if case.bias else None
    counts, odd = torch.ones(case.n, dtype=torch.bool), torch.zeros(case.n, dtype=torch.bool)
    if case.nan_rows:
        counts[3::14] = False
        e[3::14] = torch.nan
    if case.strange:
        odd[1:20:6] = True
        rows = odd.nonzero()[:, 0]
        values = torch.tensor([torch.nan, -torch.inf, torch.inf])[torch.arange(len(rows)) % 3]
        e[rows, 0], c[:, 0] = values, 1
    if case.offset:
        e[::2, 0], c[:, 0] = case.offset, 1
    return e.to(case.e_dtype or case.dtype), c.to(case.c_dtype or case.dtype), bias, counts, odd


def _bias(case: Case, rng: Generator) -> Tensor:
    bias = torch.randn(case.v, generator=rng)
    if case.integers:
        bias = bias.round()
    if case.bias == "large":
        bias += torch.where(torch.rand(case.v, generator=rng) < 0.5, 100.0, -100.0)
    if case.bias.startswith("masked"):
        bias -= 1500.0 if case.bias == "masked low" else 0.0
        bias[::3] = -torch.inf
        bias[40:300] = -torch.inf  # whole tiles
    if case.bias == "few masked":
        bias[15], bias[-1] = -torch.inf, -torch.inf
    return bias
