"""Several heads: the sum of what ``F.cross_entropy`` says of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cce import losses

H, Q = 3, 2


def states(problem: Any, heads: int) -> Tensor:
    """(heads, B, L, D)"""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(heads, *problem.e.shape, generator=rng, dtype=torch.float64).requires_grad_()


def logits(problem: Any, e: Tensor, c: Tensor, biased: bool = True) -> Tensor:
    z = (e @ c.T + (problem.bias if problem.biased and biased else 0)) * problem.options.get("logit_scale", 1.0)
    softcap = problem.options.get("softcap")
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "head_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, None])
def test_multi_token(shift: int | None, reduction: str, weighted: bool, problem: Any, same: Any) -> None:
    e = states(problem, H)
    options = {name: x for name, x in problem.call.items() if name != "shift"}
    if shift is not None:
        options["shift"] = shift
    weight = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64, requires_grad=True) if weighted else None
    found = losses.multi_token(e, problem.c, problem.targets, head_weight=weight, reduction=reduction, **options)
    first = 1 if shift is None else shift
    parts = []
    for h in range(H):
        by, w = first + h, 1 if weight is None else weight[h]
        z = logits(problem, e[h], problem.c)[:, : problem.targets.shape[1] - by]
        each = F.cross_entropy(z.mT, problem.targets[:, by:], reduction=reduction, ignore_index=problem.ignore_index)
        parts.append(w * (F.pad(each, (0, by)) if reduction == "none" else each))
    expected = torch.stack(parts) if reduction == "none" else sum(parts)
    inputs = [e, *problem.inputs[1:], *([weight] if weighted else [])]
    same(found, expected, inputs)


def test_head_weights_may_be_numbers(problem: Any) -> None:
    e, c, t = states(problem, 2), problem.c, problem.targets
    found = losses.multi_token(e, c, t, head_weight=[1, 0.5], **problem.options)
    as_tensor = losses.multi_token(e, c, t, head_weight=torch.tensor([1, 0.5]), **problem.options)
    assert found == as_tensor


def test_a_head_without_tokens_costs_nothing(problem: Any, same: Any) -> None:
    e, options = states(problem, 2), {k: x for k, x in problem.call.items() if k != "shift"}
    targets = torch.full_like(problem.targets, problem.ignore_index)
    targets[:, 0] = 3
    both = losses.multi_token(e, problem.c, targets, shift=0, **options)
    one = losses.multi_token(e[:1], problem.c, targets, shift=0, **options)
    same(both, one, [e, *problem.inputs[1:]])


def test_weights_of_heads_have_the_digits_of_the_classifier() -> None:
    e, c = torch.randn(1, 7, 4), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.arange(7) % 6
    found = losses.multi_token(e, c, targets, shift=0)
    torch.testing.assert_close(found, F.cross_entropy(e[0].double() @ c.T, targets), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [3, 5, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_that_sees_beyond_the_sequence_costs_nothing(reduction: str, shift: int) -> None:
    """As the short sequences of a batch have nothing for the last head to predict."""
    e, c, targets = torch.randn(H, 2, 5, 4), torch.randn(6, 4), torch.randint(6, (2, 5)).to(torch.uint8)
    found = losses.multi_token(e, c, targets, shift=shift, reduction=reduction)
    part = [losses.multi_token(e[h : h + 1], c, targets, shift=shift + h, reduction=reduction) for h in range(H)]
    torch.testing.assert_close(found, torch.cat(part) if reduction == "none" else sum(part))
    assert (found == 0).all() == (shift >= 5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_multi_codebook(reduction: str, shared: bool, problem: Any, same: Any) -> None:
    """Codebooks of different sizes."""
    e = problem.e if shared else states(problem, Q).permute(1, 2, 0, 3)
    c = [problem.c, problem.c[2:].detach().flip(0).requires_grad_()]
    targets = torch.stack([problem.targets, problem.targets.roll(1, 0).clamp(max=8)], -1)
    found = losses.multi_codebook(e, c, targets, reduction=reduction, **problem.options)
    parts = []
    for q in range(Q):
        z = logits(problem, e if shared else e[:, :, q], c[q], biased=False)[:, : targets.shape[1] - problem.shift]
        label = targets[:, problem.shift :, q]
        parts.append(F.cross_entropy(z.mT, label, reduction=reduction, ignore_index=problem.ignore_index))
    expected = {"none": torch.stack(parts, -1), "sum": sum(parts), "mean": sum(parts) / Q}[reduction]
    same(found, expected, [e, *c])


E, C, T = torch.ones(2, 3, 5, 4), torch.ones(6, 4), torch.ones(3, 5, dtype=torch.int64)
BAD_TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("e", {"e": E[0]}),
    ("e", {"e": None}),
    ("shift", {"shift": -1}),
    ("shift", {"shift": 1.0}),
    ("head_weight", {"head_weight": torch.ones(3)}),
    ("head_weight", {"head_weight": [1.0, "2"]}),
    ("head_weight", {"head_weight": 1.0}),
    ("head_weight", {"head_weight": "12"}),
    ("reduction", {"reduction": "sequence"}),
    ("token_weight", {"token_weight": None}),
]


@pytest.mark.parametrize(("name", "given"), BAD_TOKENS)
def test_bad_multi_token(name: str, given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        losses.multi_token(**{"e": E, "c": C, "targets": T, **given})


BAD_CODEBOOKS: list[tuple[str, dict[str, Any]]] = [
    ("c", {"c": "heads"}),
    ("c", {"c": 3}),
    ("targets", {"c": [C]}),
    ("targets", {"targets": T}),
    ("e", {"e": E[0, 0]}),
    ("bias", {"bias": torch.ones(6)}),
    ("reduction", {"reduction": None}),
]


@pytest.mark.parametrize(("name", "given"), BAD_CODEBOOKS)
def test_bad_multi_codebook(name: str, given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        losses.multi_codebook(**{"e": E[0], "c": [C, C], "targets": torch.stack([T, T], -1), **given})
