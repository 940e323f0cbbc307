"""Unlikelihood and distillation against sums over dense log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cce import losses
from cce.functional import nll_of_each

K = 4


def negatives_of(problem: Any) -> Tensor:
    """(B, L, K): with repeats, the target itself, and missing ones."""
    shape = (*problem.targets.shape, K)
    found = torch.randint(1, len(problem.c), shape, generator=torch.Generator().manual_seed(5))
    found[0, :, 1] = found[0, :, 0]
    found[1, :, 2] = problem.targets[1]
    found[2, :, 3] = problem.ignore_index
    found[2, 1] = problem.ignore_index
    return found


@pytest.mark.parametrize("likelihood", [True, False])
def test_unlikelihood(likelihood: bool, problem: Any, same: Any) -> None:
    negatives = negatives_of(problem)
    found = losses.unlikelihood(
        problem.e,
        problem.c,
        problem.targets,
        negatives=negatives,
        alpha=0.7,
        likelihood=likelihood,
        reduction="none",
        **problem.call,
    )
    p = problem.logits().softmax(-1)
    rows = []
    for b in range(p.shape[0]):
        for t in range(p.shape[1]):
            target = int(problem.labels[b, t])
            several = {int(k) for k in negatives[b, t + problem.shift]} - {problem.ignore_index}
            several -= {target} if likelihood else set()
            unlikely = sum((-torch.log(1 - p[b, t, k]) for k in several), torch.zeros((), dtype=p.dtype))
            likely = -p[b, t, target].log() if likelihood and target != problem.ignore_index else 0
            rows.append(likely + 0.7 * unlikely)
    same(found, torch.stack(rows).view(p.shape[:2]) * problem.in_use, problem.inputs)


def test_unlikelihood_of_what_is_certain() -> None:
    """p = 1 and p = 0 in float32, also of a masked negative."""
    e = (100 * torch.eye(4)).requires_grad_()
    c = torch.eye(4).requires_grad_()
    negatives = torch.tensor([[0], [0], [3], [2]])
    bias = torch.tensor([0, 0, 0, -torch.inf])
    targets = torch.tensor([1, 1, 2, 1])
    found = losses.unlikelihood(e, c, targets, negatives=negatives, likelihood=False, bias=bias, reduction="none")
    assert abs(float(found[0].detach()) + math.log(2**7 * torch.finfo(torch.float32).eps)) < 1e-5
    assert (found[1:3] < 1e-6).all()
    for grad in torch.autograd.grad(found.sum(), [e, c]):
        assert grad.isfinite().all()


def nearly_certain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of about 30, entry 0 with 1 - p from 1e-1 to 1e-12, as ``e`` (12, 8) for ``c`` the identity."""
    rest = 10.0 ** -torch.arange(1, 13, dtype=torch.float64)
    others = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = others.logsumexp(1) + torch.log1p(-rest) - rest.log()
    z = torch.cat([first[:, None], others], 1) + 30 - first[:, None]
    return z.to(dtype).requires_grad_(), torch.eye(8, dtype=dtype), rest


@pytest.mark.parametrize("recipe", ["unlikelihood", "bucket"])
def test_gradients_of_what_is_nearly_certain(recipe: str) -> None:
    """In float32: right while 1 - p is larger than its rounding, and no noise beyond."""

    def run(dtype: torch.dtype) -> Tensor:
        e, c, _ = nearly_certain(dtype)
        first = torch.zeros(12, 1, dtype=torch.int64)
        if recipe == "unlikelihood":
            loss = losses.unlikelihood(e, c, first[:, 0], negatives=first, likelihood=False, reduction="sum")
        else:
            q = torch.full((12, 1), 1e-9, dtype=dtype)
            loss = losses.top_k_distillation(e, c, first, target_weight=q, tail="bucket", reduction="sum")
        return torch.autograd.grad(loss, e)[0].double()

    found, exact = run(torch.float32), run(torch.float64)
    size, error = exact.norm(dim=1), (found - exact).norm(dim=1)
    assert (size > 0.9).all() and (size < 2).all()
    assert (error[:3] < 0.01 * size[:3]).all()
    assert (found.norm(dim=1) < 1.2 * size).all()


def teacher_of(problem: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """The K largest probabilities of a teacher; one entry is missing, and some tokens have none."""
    q = (problem.logits().detach().flip(-1) / temperature).softmax(-1)
    q, entries = F.pad(q, (0, 0, problem.shift, 0)).topk(K, -1)
    entries = torch.where(entries == problem.ignore_index, 1, entries) if problem.ignore_index == 0 else entries
    entries[0, 2, 1] = problem.ignore_index
    entries[problem.targets == problem.ignore_index] = problem.ignore_index
    q[2, 3, 0] = 0
    return q, entries


@pytest.mark.parametrize("temperature", [1, 2.5])
@pytest.mark.parametrize("tail", ["drop", "renormalize", "bucket"])
def test_distillation(tail: str, temperature: float, problem: Any, same: Any) -> None:
    q, entries = teacher_of(problem, temperature)
    found = losses.top_k_distillation(
        problem.e,
        problem.c,
        entries,
        target_weight=q,
        temperature=temperature,
        tail=tail,
        reduction="none",
        **problem.call,
    )
    p = problem.logits(temperature).softmax(-1)
    rows = []
    for b in range(p.shape[0]):
        for t in range(p.shape[1]):
            entry, weight = entries[b, t + problem.shift], q[b, t + problem.shift]
            kept = [(float(w), p[b, t, k]) for k, w in zip(entry, weight, strict=True) if k != problem.ignore_index]
            if tail == "renormalize":
                kept = [(w / sum(x for x, _ in kept), mine) for w, mine in kept]
            if tail == "bucket" and kept:
                kept.append((1 - sum(w for w, _ in kept), 1 - sum(mine for _, mine in kept)))
            terms = [w * (math.log(w) - mine.log()) for w, mine in kept if w > 0]
            rows.append(temperature**2 * sum(terms, torch.zeros((), dtype=p.dtype)))
    same(found, torch.stack(rows).view(p.shape[:2]), problem.inputs)


def test_distillation_of_every_entry_is_the_kl_divergence(problem: Any, same: Any) -> None:
    """All V entries, so that nothing is left for the tail; mean over the tokens in use."""
    z = problem.logits()
    q = z.detach().flip(-1).softmax(-1)
    whole = F.pad(q, (0, 0, problem.shift, 0))
    entries = torch.arange(len(problem.c)).expand(whole.shape)
    entries = entries.masked_fill((problem.targets == problem.ignore_index)[..., None], -100)
    dense = F.kl_div(z.log_softmax(-1), q, reduction="none").sum(-1)
    found = losses.top_k_distillation(
        problem.e, problem.c, entries, target_weight=whole, **{**problem.call, "ignore_index": -100}
    )
    same(found, problem.reduce(dense, "mean"), problem.inputs)


def test_a_student_that_has_all_its_mass_in_the_teachers_entries() -> None:
    """The bucket's probability is 0 in float32; the loss and its gradients are finite numbers."""
    e = (100 * torch.eye(4)).requires_grad_()
    c = torch.eye(4).requires_grad_()
    entries, q = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]]), torch.full((4, 2), 0.3)
    found = losses.top_k_distillation(e, c, entries, target_weight=q, tail="bucket")
    for x in (found, *torch.autograd.grad(found, [e, c])):
        assert x.isfinite().all()


def test_an_entry_that_neither_teacher_nor_student_has() -> None:
    """Of probability 0 in both: it costs nothing."""
    e, c = torch.eye(3).requires_grad_(), torch.eye(3).requires_grad_()
    entries, q = torch.tensor([[0, 2], [1, 2], [0, 1]]), torch.tensor([[1.0, 0.0], [0.6, 0.0], [0.3, 0.3]])
    options: dict[str, Any] = {"bias": torch.tensor([0, 0, -torch.inf]), "reduction": "none"}
    found = losses.top_k_distillation(e, c, entries, target_weight=q, **options)
    kept = losses.top_k_distillation(e, c, entries[:, :1], target_weight=q[:, :1], **options)
    assert torch.equal(found[:2], kept[:2])
    for grad in torch.autograd.grad(found.sum(), [e, c]):
        assert grad.isfinite().all()


def test_nll_of_each(problem: Any, same: Any) -> None:
    entries = negatives_of(problem)
    found = nll_of_each(problem.e, problem.c, entries, **problem.call)
    entries = entries[:, problem.shift :]
    each = -problem.logits().log_softmax(-1).gather(-1, entries.clamp(min=0))
    same(found, each * (entries != problem.ignore_index), problem.inputs)


E, C, T = torch.ones(2, 3), torch.ones(4, 3), torch.arange(2)
BAD = [
    (losses.unlikelihood, "negatives", T),
    (losses.unlikelihood, "negatives", torch.ones(2, 1)),
    (losses.unlikelihood, "negatives", torch.ones(2, 0, dtype=torch.int64)),
    (losses.unlikelihood, "negatives", None),
    (losses.unlikelihood, "alpha", -1),
    (losses.unlikelihood, "likelihood", 1),
    (losses.top_k_distillation, "tail", "none"),
    (losses.top_k_distillation, "tail", None),
    (losses.top_k_distillation, "temperature", 0),
    (losses.top_k_distillation, "target_weight", torch.ones(2, 2)),
    (losses.top_k_distillation, "target_weight", None),
    (losses.top_k_distillation, "target_weight", torch.ones(2, 1, dtype=torch.int64)),
    (losses.top_k_distillation, "target_weight", torch.ones(2, 1, requires_grad=True)),
]


@pytest.mark.parametrize(("recipe", "name", "value"), BAD)
def test_bad_input(recipe: Any, name: str, value: Any) -> None:
    own = {"negatives": T[:, None]} if recipe is losses.unlikelihood else {"target_weight": torch.ones(2, 1)}
    targets = T if recipe is losses.unlikelihood else T[:, None]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        recipe(E, C, targets, **{**own, name: value})


@pytest.mark.parametrize("value", [4, -1, 100])
def test_a_negative_outside_the_vocabulary_is_an_error(value: int) -> None:
    with pytest.raises(ValueError, match=rf"^negatives: got {value} at index \(1, 0\), expected entries in \[0, 4\)"):
        losses.unlikelihood(E, C, T, negatives=torch.tensor([[1], [value]]))


def test_a_negative_of_an_ignored_token_may_be_anything() -> None:
    targets = torch.tensor([0, -100])
    found = losses.unlikelihood(E, C, targets, negatives=torch.tensor([[1], [1000]]))
    assert torch.equal(found, losses.unlikelihood(E, C, targets, negatives=torch.tensor([[1], [2]])))


def test_negatives_of_eight_bits() -> None:
    e, c, targets = torch.randn(2, 3), torch.randn(200, 3), torch.tensor([0, 156])
    negatives = torch.tensor([[156, 3], [156, 7]])
    found = losses.unlikelihood(e, c, targets.to(torch.uint8), negatives=negatives.to(torch.uint8))
    assert torch.equal(found, losses.unlikelihood(e, c, targets, negatives=negatives))


BAD_WEIGHTS = [
    ("drop", [[0.5, 0.2], [0.3, -0.1]], r"target_weight: got -0.1\d* at index \(1, 1\), expected probabilities"),
    ("drop", [[0.5, 0.2], [torch.inf, 0.1]], r"target_weight: got inf at index \(1, 0\)"),
    ("bucket", [[0.5, 0.2], [3.0, 3.0]], r"target_weight.sum\(-1\): got 6.0 at index \(1,\), expected at most 1"),
]


@pytest.mark.parametrize(("tail", "weights", "message"), BAD_WEIGHTS)
def test_bad_probabilities(tail: str, weights: list[list[float]], message: str) -> None:
    targets = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="^" + message):
        losses.top_k_distillation(E, C, targets, target_weight=torch.tensor(weights), tail=tail)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_of_a_rounded_teacher(dtype: torch.dtype) -> None:
    """Of all entries, in any dtype: their sum exceeds 1 by rounding at most."""
    q = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).softmax(-1).to(dtype)
    entries = torch.arange(4).expand(200, 4)
    assert (q.double().sum(-1) > 1).any()
    found = losses.top_k_distillation(torch.ones(200, 3), C, entries, target_weight=q, tail="bucket")
    assert found.isfinite()
