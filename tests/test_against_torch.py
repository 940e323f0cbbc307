"""``cce.loss`` is ``F.cross_entropy``: every combination of the options both have, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cce

pytestmark = pytest.mark.usefixtures("one_thread")
V = 11
REDUCTIONS = ["mean", "sum", "none"]
SMOOTHING = [0.0, 0.1, 1.0]
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_smoothing = pytest.mark.parametrize("label_smoothing", SMOOTHING)
with_and_without_weight = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def class_weight() -> Tensor:
    """Weights of very different size, one of them 0."""
    weight = torch.rand(V, generator=rng(), dtype=torch.float64) * 3
    weight[2] = 0
    return weight


def make_logits(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, V, generator=rng(), dtype=torch.float64).mul_(3).requires_grad_()


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, then gradients for an upstream gradient of its own in each element."""
    assert_close(found, expected, "loss")
    upstream = torch.randn(expected.shape, generator=rng(), dtype=torch.float64)
    grads = [torch.autograd.grad(x, inputs, upstream) for x in (found, expected)]
    for i, (x, y) in enumerate(zip(*grads, strict=True)):
        assert_close(x, y, f"gradient of input {i}")


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: {found} is not {expected}"
    found, expected = found.detach(), expected.detach()
    error, norm = float((found - expected).nan_to_num().norm()), float(expected.nan_to_num().norm())
    assert error <= 1e-12 * norm, f"{what}: error {error:.3g} at a norm of {norm:.3g}"


IGNORED = {"none": (-100, []), "default": (-100, [1, 2, 5]), "in-range": (0, [1, 2, 5]), "all": (-100, range(12))}


def make_targets(shape: tuple[int, ...], ignored: str) -> tuple[Tensor, int]:
    """Targets and ignore_index; where the latter is a class, no other target is of that class."""
    ignore_index, where = IGNORED[ignored]
    flat = torch.randint(1, V, (math.prod(shape),), generator=rng())
    flat[0] = 3
    flat[3:4] = 2  # the class of weight 0
    flat[[i for i in where if i < len(flat)]] = ignore_index
    return flat.view(shape), ignore_index


@every_reduction
@every_smoothing
@with_and_without_weight
@pytest.mark.parametrize("ignored", list(IGNORED))
@pytest.mark.parametrize("shape", [(12,), (3, 4), ()], ids=["N", "B-L", "scalar"])
def test_every_combination(
    shape: tuple[int, ...], ignored: str, weighted: bool, label_smoothing: float, reduction: str
) -> None:
    logits = make_logits(shape)
    targets, ignore_index = make_targets(shape, ignored)
    options: dict[str, Any] = dict(
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        weight=class_weight() if weighted else None,
    )
    found = cce.loss(logits, torch.eye(V, dtype=torch.float64), targets, **options)
    expected = F.cross_entropy(logits.movedim(-1, 1) if len(shape) == 2 else logits, targets, **options)
    assert_same(found, expected, [logits])


@every_reduction
@every_smoothing
@with_and_without_weight
@pytest.mark.parametrize("k", [V, 3], ids=["K=V", "K=3"])
@pytest.mark.parametrize("shape", [(12,), (3, 4), ()], ids=["N", "B-L", "scalar"])
def test_probability_targets(
    shape: tuple[int, ...], k: int, weighted: bool, label_smoothing: float, reduction: str
) -> None:
    logits = make_logits(shape)
    scores = torch.rand(*shape, V, generator=rng(), dtype=torch.float64)
    target_weight, targets = scores.topk(k, -1)
    target_weight = target_weight / target_weight.sum(-1, keepdim=True)
    dense = torch.zeros_like(scores).scatter_(-1, targets, target_weight)
    options: dict[str, Any] = dict(
        reduction=reduction, label_smoothing=label_smoothing, weight=class_weight() if weighted else None
    )
    found = cce.loss(logits, torch.eye(V, dtype=torch.float64), targets, target_weight=target_weight, **options)
    pair = (logits.movedim(-1, 1), dense.movedim(-1, 1)) if len(shape) == 2 else (logits, dense)
    assert_same(found, F.cross_entropy(*pair, **options), [logits])


@every_reduction
@every_smoothing
@with_and_without_weight
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
def test_linear(biased: bool, weighted: bool, label_smoothing: float, reduction: str) -> None:
    """A classifier that is no identity: gradients of ``e``, ``c`` and ``bias`` too."""
    e, c, bias = (
        torch.randn(*s, generator=rng(), dtype=torch.float64).requires_grad_() for s in ((12, 5), (V, 5), (V,))
    )
    targets, ignore_index = make_targets((12,), "default")
    options: dict[str, Any] = dict(
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        weight=class_weight() if weighted else None,
    )
    found = cce.loss(e, c, targets, bias if biased else None, **options)
    expected = F.cross_entropy(F.linear(e, c, bias if biased else None), targets, **options)
    assert_same(found, expected, [e, c, bias] if biased else [e, c])


@every_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("used", ["z_loss", "token_weight", "logit_scale", "weight", "all"])
def test_what_torch_lacks(used: str, shift: int, softcap: float | None, label_smoothing: float, reduction: str) -> None:
    """The other options are the formulas of their documentation, written with ``F.cross_entropy``."""
    have = {"z_loss", "token_weight", "logit_scale", "weight"} if used == "all" else {used}
    logits = make_logits((3, 4))
    targets, _ = make_targets((3, 4), "default")
    z_loss = 0.3 if "z_loss" in have else 0.0
    scale = 0.7 if "logit_scale" in have else 1.0
    weight = class_weight() if "weight" in have else None
    per_token = torch.rand(3, 4, generator=rng(), dtype=torch.float64).requires_grad_()
    token_weight = per_token if "token_weight" in have else None
    found = cce.loss(
        logits,
        torch.eye(V, dtype=torch.float64),
        targets,
        shift=shift,
        softcap=softcap,
        logit_scale=scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        weight=weight,
        token_weight=token_weight,
        reduction=reduction,
    )
    z = scale * logits
    z = (z if softcap is None else softcap * torch.tanh(z / softcap))[:, : 4 - shift]
    t, w = targets[:, shift:], torch.ones(3, 4 - shift, dtype=torch.float64)
    w = w if token_weight is None else token_weight[:, shift:]
    losses = F.cross_entropy(z.mT, t, weight, reduction="none", label_smoothing=label_smoothing)
    losses = w * (losses + z_loss * z.logsumexp(-1).square() * (t >= 0))
    in_use = w * (t >= 0) * (1 if weight is None else weight[t.clamp(min=0)])
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / in_use.sum()}[reduction]
    assert_same(found, expected, [logits, *([] if token_weight is None else [token_weight])])


@every_smoothing
def test_mean_without_any_weight_is_nan(label_smoothing: float) -> None:
    """Targets of class weight 0 alone: nothing to divide by, whatever the smoothing adds above."""
    logits, options = make_logits((3,)), {"weight": class_weight(), "label_smoothing": label_smoothing}
    targets = torch.full((3,), 2)
    assert F.cross_entropy(logits, targets, **options).isnan()
    assert cce.loss(logits, torch.eye(V, dtype=torch.float64), targets, **options).isnan()


def test_sparse_targets_may_repeat_or_be_missing() -> None:
    """A class named twice gets both weights; an ignored entry none, whatever weight stands beside it."""
    logits = make_logits((2,))
    targets = torch.tensor([[3, 3, 5], [7, -100, 0]])
    target_weight = torch.tensor([[0.2, 0.3, 0.5], [0.6, 9.0, 0.4]], dtype=torch.float64)
    dense = torch.zeros(2, V, dtype=torch.float64)
    dense[0, 3], dense[0, 5], dense[1, 7], dense[1, 0] = 0.5, 0.5, 0.6, 0.4
    found = cce.loss(logits, torch.eye(V, dtype=torch.float64), targets, target_weight=target_weight)
    assert_same(found, F.cross_entropy(logits, dense), [logits])
