"""Gradients computed along with a loss: how many wait, that those let go are computed anew, and float16's scale."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cce
from cce.frontend import held, one_pass

N, D, V = 8, 16, 300
SIZE = 4 * D * (N + V)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with an entry for each time that a loss is computed along with its gradients."""
    runs: list[int] = []
    whole = one_pass._run

    def run(*arguments: Any) -> one_pass.Found:
        runs.append(1)
        return whole(*arguments)

    monkeypatch.setattr(one_pass, "_run", run)
    return runs


def waiting() -> int:
    """Bytes of the gradients that wait."""
    gc.collect()
    line = held._waiting.get(torch.device("cpu"), {})
    found = [ref() for ref in line.values()]
    return sum(sum(x.nbytes for x in h._gradients if x is not None) for h in found if h is not None and h._gradients)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    e, c = (torch.randn(*size, generator=rng, requires_grad=True) for size in ((N, D), (V, D)))
    return e, c, torch.randint(V, (N,), generator=rng)


@pytest.mark.parametrize(("room", "kept"), [(1, 1), (2, 2), (10, 4)])
def test_no_more_than_the_budget_wait(room: int, kept: int, counted: list[int]) -> None:
    """The newest waits in any case; a sum over micro-batches has the gradients of the dense formula all the same."""
    e, c, targets = operands()
    spec = cce.Spec(scratch_bytes=max(room * SIZE, 2**17))
    losses = []
    for i in range(4):
        losses.append(cce.loss(e, c, targets.roll(i), spec=spec, backend="torch"))
        assert waiting() <= max(SIZE, spec.scratch_bytes)
    assert len(counted) == 4
    (found,) = torch.autograd.grad(sum(losses), c)
    (expected,) = torch.autograd.grad(sum(F.cross_entropy(e @ c.T, targets.roll(i)) for i in range(4)), c)
    torch.testing.assert_close(found, expected)
    assert waiting() == 0


def test_a_loss_that_is_gone_makes_no_other_wait(counted: list[int]) -> None:
    e, c, targets = operands()
    spec = cce.Spec(scratch_bytes=2**17)
    assert SIZE <= 2**17 < 8 * SIZE
    for _ in range(8):
        loss = cce.loss(e, c, targets, spec=spec, backend="torch")
    loss.backward()
    assert len(counted) == 8  # nothing was computed anew


def test_those_let_go_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    e, c, targets = operands()
    loss = cce.loss(e, c, targets, backend="torch")
    expected = torch.autograd.grad(loss, (e, c))
    first = cce.loss(e, c, targets, backend="torch")
    held.Held(2**40, 1, e.device)  # one that needs all the room
    assert waiting() == 0
    for x, y in zip(torch.autograd.grad(first, (e, c)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("frozen", [False, True])
def test_float16_keeps_what_a_gradient_scaler_brings_back(reduction: str, frozen: bool) -> None:
    """A gradient of 1e-8 is 0 in float16 unless it is scaled before it is rounded: a step computes it scaled."""
    rng, scale = torch.Generator().manual_seed(0), 2.0**14
    n, d, v = 2048, 8, 64
    e = (0.5 * torch.randn(n, d, generator=rng)).half()
    c = (0.02 * torch.randn(v, d, generator=rng)).half().requires_grad_(not frozen)
    bias = torch.zeros(v)
    bias[v // 2 :] = -12.0  # entries that a trained model finds improbable
    targets = torch.randint(v // 2, (n,), generator=rng)
    e.requires_grad_()
    loss = cce.loss(e, c, targets, bias, reduction=reduction, backend="torch")
    weight = scale if reduction == "mean" else scale / n
    (loss * weight).backward()
    x, y = e.detach().double().requires_grad_(), c.detach().double().requires_grad_()
    (F.cross_entropy(x @ y.T + bias.double(), targets, reduction=reduction) * weight).backward()
    # Twice the rounding of float16, and its least subnormal number.
    torch.testing.assert_close(e.grad.double(), x.grad, rtol=2**-9, atol=2**-23)
    if not frozen:
        improbable = y.grad[v // 2 :]
        error = (c.grad.double()[v // 2 :] - improbable).norm() / improbable.norm()
        assert error < 2**-9
