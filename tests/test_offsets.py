"""Only differences of logits count: a large offset of all logits of a row changes neither loss nor gradient.

All logits here are exact in float32, so that the loss and the gradient of the same differences in float64 are what has
to come out, to the few roundings of an exponential and a sum.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce

V = 40
ROUNDINGS = 32 * torch.finfo(torch.float32).eps
BACKENDS = ["torch", "reference"]
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.25, "reduction": "sum"},
    "soft": {"target_weight": True, "reduction": "sum"},
    "filtered": {"spec": cce.Spec(filter="element", threshold=1e-30, block_n=1, block_v=8), "reduction": "none"},
    "online": {"spec": cce.Spec(lse_accumulation="online"), "reduction": "none"},
}


def problem(offset: float, by_bias: bool, confident: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """e (3, 3), c (V, 3), bias, and the logits without the offset, which are eighths (of 8: beyond 2**20)."""
    rng = torch.Generator().manual_seed(0)
    step = 8.0 if offset > 2**20 else 0.125
    c = torch.randint(-8, 8, (V, 2), generator=rng) * step
    e = torch.randint(-2, 3, (3, 2), generator=rng).float()
    if confident:
        c[5] += 64 * step * torch.tensor([1.0, 0.0])
        e[:, 0] = 2.0
    z = (e @ c.T).double()
    if by_bias:
        return e, c, torch.full((V,), offset), z
    return torch.cat([e, torch.full((3, 1), offset)], 1), torch.cat([c, torch.ones(V, 1)], 1), None, z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("by_bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 2.0**10, 2.0**14, 2.0**20, 2.0**26, -(2.0**20)])
def test_an_offset_costs_nothing(offset: float, by_bias: bool, confident: bool, form: str, backend: str) -> None:
    e, c, bias, z = problem(offset, by_bias, confident)
    options = dict(FORMS[form])
    targets = torch.tensor([5, 5, 7] if confident else [1, 7, 30])
    z.requires_grad_()
    if options.pop("target_weight", False):
        targets = torch.stack([targets, targets + 1], 1)
        options["target_weight"] = torch.tensor([[0.75, 0.25]]).expand(3, 2)
        expected = -(z.log_softmax(1).gather(1, targets) * options["target_weight"]).sum()
    else:
        dense = {name: options[name] for name in ("reduction", "label_smoothing") if name in options}
        expected = F.cross_entropy(z, targets, **dense)
    e.requires_grad_()
    found = cce.loss(e, c, targets, bias, backend=backend, **options)
    assert (found.double() - expected).abs().max() <= ROUNDINGS * (1 + expected.abs().max())
    (dz,) = torch.autograd.grad(expected.sum(), z)
    de = torch.autograd.grad(found.sum(), e)[0].double()[:, :2]
    right = dz @ c.double()[:, :2]
    error, size = (de - right).abs().max(), (dz.abs() @ c.double()[:, :2].abs()).max()
    assert error <= ROUNDINGS * max(float(size), float(right.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6, 1e8, -1e8])
def test_equal_logits(offset: float, backend: str) -> None:
    e, c = torch.full((1, 1), offset), torch.ones(2, 1)
    assert cce.loss(e, c, torch.tensor([0]), backend=backend).item() == pytest.approx(math.log(2), rel=1e-6)
    entropy = cce.terms(e, c, torch.tensor([0]), outputs=["entropy"], backend=backend).entropy
    assert entropy is not None and entropy.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [1e4, 1e6, 1e8])
def test_a_large_softcap_is_none(softcap: float, backend: str) -> None:
    rng = torch.Generator().manual_seed(0)
    e, c = torch.randn(6, 8, generator=rng), torch.randn(60, 8, generator=rng)
    targets = torch.randint(60, (6,), generator=rng)
    z = e.double() @ c.double().T
    expected = F.cross_entropy(softcap * torch.tanh(z / softcap), targets)
    found = cce.loss(e, c, targets, softcap=softcap, backend=backend)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
