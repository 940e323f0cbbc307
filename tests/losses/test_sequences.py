"""Losses of whole sequences against products of dense probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cce import losses


def log_prob(problem: Any) -> Tensor:
    return (problem.p().log() * problem.in_use).sum(1)


def test_sequence_log_prob(problem: Any, same: Any) -> None:
    found = losses.sequence_log_prob(problem.e, problem.c, problem.targets, **problem.call)
    same(found, log_prob(problem), problem.inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [1, 2, 64])
def test_pass_at_n(n: int, reduction: str, problem: Any, same: Any) -> None:
    """Two sequences of a batch of three; the third has no token, and does not count."""
    targets = problem.targets.clone()
    targets[2] = problem.ignore_index
    found = losses.pass_at_n(problem.e, problem.c, targets, n=n, reduction=reduction, **problem.call)
    p = log_prob(problem).exp()
    found_first = torch.stack([p * (1 - p) ** k for k in range(n)]).sum(0)  # by the k-th of n samples
    each = -found_first.log() * torch.tensor([1, 1, 0])
    expected = {"mean": each.sum() / 2, "sum": each.sum(), "none": each}[reduction]
    same(found, expected, problem.inputs)


def test_pass_at_n_of_a_long_sequence() -> None:
    """Its probability is 0 in float32; the loss is the cross-entropy less log N, as is the gradient."""
    e = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(500)[None] % 30
    found = losses.pass_at_n(e, torch.ones(30, 8), targets, n=16)
    assert torch.isclose(found, torch.tensor(500 * math.log(30) - math.log(16)), rtol=1e-6)
    c = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(losses.pass_at_n(e, c, targets, n=n), e)[0] for n in (1, 16)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("n", [1, 8])
def test_pass_at_n_of_a_certain_sequence(n: int) -> None:
    e = (100 * torch.eye(4)).view(2, 2, 4).requires_grad_()
    found = losses.pass_at_n(e, torch.eye(4), torch.arange(4).view(2, 2), n=n)
    assert found == 0
    assert (torch.autograd.grad(found, e)[0].abs() < 1e-40).all()


def pairs(problem: Any) -> tuple[Any, Tensor, Tensor]:
    """Two pairs out of four sequences: those of the problem, and its first again."""
    e, targets = problem.e[[0, 1, 2, 0]], problem.targets[[0, 1, 2, 0]]
    targets[3] = targets[3].roll(1)
    return e, targets, torch.tensor([-9.0, -4.0, -6.5, -5.0], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dpo(reduction: str, smoothing: float, problem: Any, same: Any) -> None:
    e, targets, ref = pairs(problem)
    options = dict(beta=0.4, label_smoothing=smoothing, reduction=reduction, **problem.call)
    found = losses.dpo(e, problem.c, targets, ref_log_prob=ref, **options)
    labels = targets[:, problem.shift :]
    log_p = problem.logits()[[0, 1, 2, 0]].log_softmax(-1)
    score = (problem.take(log_p, labels) * (labels != problem.ignore_index)).sum(1) - ref
    chosen = 1 / (1 + torch.exp(-0.4 * (score[:2] - score[2:])))
    each = -(1 - smoothing) * chosen.log() - smoothing * (1 - chosen).log()
    same(found, {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction], problem.inputs)


@pytest.mark.parametrize("empty", [1, 3])
def test_a_pair_with_tokens_on_one_side_counts(empty: int, problem: Any, same: Any) -> None:
    e, targets, ref = pairs(problem)
    targets[empty] = problem.ignore_index
    found = losses.dpo(e, problem.c, targets, ref_log_prob=ref, **problem.call)
    each = losses.dpo(e, problem.c, targets, ref_log_prob=ref, reduction="none", **problem.call)
    assert (each > 0).all()
    same(found, each.sum() / 2, problem.inputs)


def test_a_pair_without_tokens_does_not_count(problem: Any, same: Any) -> None:
    e, targets, ref = pairs(problem)
    targets[[1, 3]] = problem.ignore_index
    found = losses.dpo(e, problem.c, targets, ref_log_prob=ref, **problem.call)
    one = losses.dpo(e[[0, 2]], problem.c, targets[[0, 2]], ref_log_prob=ref[[0, 2]], **problem.call)
    same(found, one, problem.inputs)


E, C, T = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3, dtype=torch.int64)
BAD: list[tuple[Any, str, dict[str, Any]]] = [
    (losses.pass_at_n, "n", {"n": 0}),
    (losses.pass_at_n, "n", {"n": 2.0}),
    (losses.pass_at_n, "n", {"n": 2**53 + 1}),
    (losses.pass_at_n, "reduction", {"reduction": "sequence"}),
    (losses.dpo, "beta", {"beta": 0}),
    (losses.dpo, "label_smoothing", {"label_smoothing": 0.5}),
    (losses.dpo, "ref_log_prob", {"ref_log_prob": torch.ones(2, 3)}),
    (losses.dpo, "ref_log_prob", {"ref_log_prob": torch.ones(2)}),
    (losses.dpo, "targets", {"e": E[:1], "targets": T[:1]}),
    (losses.dpo, "targets", {"e": E[0], "targets": T[0]}),
    (losses.sequence_log_prob, "targets", {"e": E[0, 0], "targets": T[0, 0]}),
]


@pytest.mark.parametrize(("recipe", "name", "given"), BAD)
def test_bad_input(recipe: Any, name: str, given: dict[str, Any]) -> None:
    own = {losses.pass_at_n: {"n": 2}, losses.dpo: {"ref_log_prob": -torch.ones(2)}, losses.sequence_log_prob: {}}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        recipe(**{"e": E, "c": C, "targets": T, **own[recipe], **given})


def test_dpo_of_an_impossible_sequence() -> None:
    """Rejected, it costs nothing; chosen, infinitely much, and its gradient is a number."""
    bias, targets = torch.tensor([0, 0, 0, -torch.inf]), torch.tensor([[0, 1], [0, 3]])
    for order, cost in (([0, 1], 0), ([1, 0], torch.inf)):
        e = torch.eye(4).view(2, 2, 4).clone().requires_grad_()
        found = losses.dpo(e, torch.eye(4), targets[order], ref_log_prob=-torch.ones(2), bias=bias)
        assert found == cost
        assert torch.autograd.grad(found, e)[0].isfinite().all()


def test_references_of_pairs_without_tokens(problem: Any) -> None:
    """May be anything, as may their gradient."""
    e, targets, ref = pairs(problem)
    targets[[1, 3]] = problem.ignore_index
    results = []
    for bad in (-1.0, torch.nan, torch.inf):
        ref = torch.tensor([-9.0, bad, -6.5, bad], dtype=torch.float64, requires_grad=True)
        found = losses.dpo(e, problem.c, targets, ref_log_prob=ref, label_smoothing=0.1, **problem.call)
        results.append((found.detach(), *torch.autograd.grad(found, [ref, *problem.inputs], retain_graph=True)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_the_gradient_of_a_sequence_that_is_impossible() -> None:
    """A masked token makes p = 0: the loss is infinite, with the cross-entropy's gradient."""
    bias, targets = torch.tensor([0, 0, -torch.inf]), torch.tensor([[1, 2]])
    e = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, many = (losses.pass_at_n(e, torch.eye(3), targets, n=n, bias=bias) for n in (1, 16))
    g, exact = (torch.autograd.grad(x, e)[0] for x in (many, one))
    assert one == many == torch.inf and exact.any()
    torch.testing.assert_close(g, exact)
