"""Inputs of the conformance cases: magnitudes of order 1, and distributions that expose a wrong answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce.backends.problem import Inputs, Problem, Upstream
from cce.testing.cases import Case
from cce.testing.offsets import on_grids, with_offset


def make_problem(case: Case, device: str) -> Problem:
    """The metadata of a case."""
    return Problem(
        n=case.n,
        v=case.v,
        d=case.d,
        k=case.k,
        e_dtype=case.e_dtype,
        c_dtype=case.c_dtype,
        device=device,
        bias=case.bias,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        outputs=frozenset(case.outputs),
        grad_e="e" in case.wanted,
        grad_c="c" in case.wanted,
        grad_bias=case.bias and "bias" in case.wanted,
    )


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs[Tensor]:
    """Tensors of a case, drawn on the CPU so that every device sees the same numbers."""
    rng = torch.Generator().manual_seed(seed)
    m = case.n if case.m is None else case.m
    e, c = _embeddings(case, m, rng)
    bias = _bias(case, rng) if case.bias else None
    if case.offset:
        e, c, bias = on_grids(case, e, c, bias)
    rows = None if case.m is None else torch.randperm(m, generator=rng)[: case.n].sort().values
    used = e if rows is None else e[rows]
    inputs = Inputs(
        e=_view(e.to(case.e_dtype), case.strided, device),
        c=_view(c.to(case.c_dtype), case.strided, device),
        targets=_targets(case, used, c, bias, rng).to(device),
        bias=None if bias is None else bias.to(case.c_dtype).to(device),
        rows=None if rows is None else rows.to(device),
        logit_weight=torch.rand(case.v, generator=rng).to(device) if case.logit_weight else None,
        vocab_order=torch.randperm(case.v, generator=rng).to(device) if case.vocab_order else None,
    )
    return with_offset(case, inputs) if case.offset else inputs


def make_upstream(case: Case, device: str, dtype: torch.dtype, seed: int = 1) -> Upstream[Tensor]:
    """Independent gradients of order 1 for each output; every ninth row gets none at all."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=rng, dtype=torch.float64)
        x[4::9] = 0
        return x.to(dtype).to(device)

    return Upstream(
        a=draw(case.n),
        g=draw(case.n, case.k),
        h=draw(case.n) if "entropy" in case.outputs else None,
        s=draw(case.n) if "weighted_logit" in case.outputs else None,
    )


def _embeddings(case: Case, m: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    e = torch.randn(m, case.d, generator=rng)
    c = torch.randn(case.v, case.d, generator=rng) * (1.5 / math.sqrt(case.d))
    if case.data == "peaked":
        # What a trained head looks like: a large mean row, and logits that fall with the logarithm of the rank.
        mean = torch.randn(case.d, generator=rng)
        mean /= mean.norm()
        rank = torch.arange(1, case.v + 1, dtype=torch.float32).log()[:, None]
        e = e + 4 * mean
        c = c + (1.0 - 0.35 * rank) * mean
    elif case.data == "certain":
        # Of every row one entry stands out by 6 to 14; a column of e says which.
        c[: case.d - 1] += 10 * torch.eye(case.d)[: case.d - 1]
        e = 0.2 * e + torch.eye(case.d)[torch.arange(m) % (case.d - 1)]
    elif case.data == "aligned":
        c[: min(m, case.v)] = e[: min(m, case.v)]
    return e, c


def _bias(case: Case, rng: torch.Generator) -> Tensor:
    bias = torch.randn(case.v, generator=rng)
    if case.data == "large_bias":
        # Far beyond what exp() can take without the maximum's subtraction, in both directions.
        bias += torch.where(torch.rand(case.v, generator=rng) < 0.5, 200.0, -200.0)
    elif case.data in ("masked_low", "masked_high"):
        bias += -300.0 if case.data == "masked_low" else 300.0
    if case.data.startswith("masked"):
        bias[::3] = -torch.inf
        bias[64:128] = -torch.inf  # whole tiles of 32
        bias[256:768] = -torch.inf  # and of 256, where there are so many
    return bias


def _targets(case: Case, e: Tensor, c: Tensor, bias: Tensor | None, rng: torch.Generator) -> Tensor:
    """Sampled from the model where it is peaked, uniform elsewhere; with K > 1 some are missing and some repeated."""
    if case.data == "peaked":
        z = e @ c.T if bias is None else e @ c.T + bias
        targets = torch.multinomial(z.softmax(1), case.k, replacement=True, generator=rng)
    else:
        targets = torch.randint(case.v, (case.n, case.k), generator=rng)
    masked = case.data.startswith("masked")
    if masked:
        open_entries = torch.arange(case.v)[torch.isfinite(bias)] if bias is not None else torch.arange(case.v)
        targets = open_entries[targets % len(open_entries)]
    if not masked:
        targets[-1, -1] = case.v - 1
    if case.k > 1:
        targets[::3, 1] = targets[::3, 0]
        targets[1::4, -1] = -1
    return targets


def _view(x: Tensor, strided: bool, device: str) -> Tensor:
    x = x.to(device)
    return x.T.contiguous().T if strided else x.contiguous()
