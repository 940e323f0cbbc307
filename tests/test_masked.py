"""Tokens that do not count and vocabulary entries that do not exist: as if they were not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cce

pytestmark = pytest.mark.usefixtures("one_thread")
N, D = 12, 5


def draw(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()


# Masked entries of a vocabulary of 700; the backend takes 512 columns at a time on a CPU.
MASKED = {
    "one": slice(7, 8),
    "every-third": slice(None, None, 3),
    "padding": slice(690, None),
    "last-tile": slice(672, None),
    "last-chunk": slice(512, None),
    "first-chunk": slice(0, 512),
    "all-but-one": slice(1, None),
}
EXACT = ("tile", "online")
SPECS = {
    "tile": {"filter": "none"},
    "online": {"filter": "none", "lse_accumulation": "online"},
    "element": {"filter": "element", "threshold": 1e-30, "block_n": 4},
    "mass": {"filter": "tile", "threshold": 1e-30, "block_n": 4, "vocab_order": "natural"},
}


# A filter takes no gradient of lse or entropy.
COMBINATIONS = [(output, name) for name in SPECS for output in ("nll", "lse", "entropy")[: 3 if name in EXACT else 1]]


@pytest.mark.parametrize(
    ("output", "fields"), [(o, SPECS[name]) for o, name in COMBINATIONS], ids=map(str, COMBINATIONS)
)
@pytest.mark.parametrize("where", MASKED.values(), ids=MASKED)
def test_masked_entries(output: str, where: slice, fields: dict[str, Any]) -> None:
    """A bias of -inf is the vocabulary without those entries, for upstream gradients of any size."""
    e, c, open_bias = draw(N, D), draw(700, D), draw(700)
    bias = open_bias.detach().clone()
    bias[where] = -torch.inf
    bias.requires_grad_()
    left = torch.isfinite(bias).nonzero()[:, 0]
    label = torch.arange(N) % len(left)
    spec = cce.Spec(**fields, block_v=32)
    upstream = 100 * torch.linspace(-1, 1, N, dtype=torch.float64)
    found = cce.terms(e, c, left[label], bias, outputs=[output, "prediction"], spec=spec)
    without = cce.terms(
        e, c[left], label, open_bias[left], outputs=[output, "prediction"], spec=cce.Spec(filter="none")
    )
    assert torch.equal(found.prediction, left[without.prediction])
    close(getattr(found, output), getattr(without, output))
    grads = [
        torch.autograd.grad(getattr(x, output), (e, c, b), upstream) for x, b in ((found, bias), (without, open_bias))
    ]
    for x, y in zip(*grads, strict=True):
        close(x, y)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


ROWS_APART: dict[str, Any] = {"threshold": 0.05, "block_n": 1, "block_v": 8, "vocab_order": "natural"}
WEIGHTLESS = {
    "last": slice(-1, None),
    "first": slice(0, 1),
    "tail": slice(N // 2, None),
    "every-other": slice(None, None, 2),
    "all": slice(None),
}


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("filter", ["none", "element", "tile"])
@pytest.mark.parametrize("where", WEIGHTLESS.values(), ids=WEIGHTLESS)
def test_tokens_of_weight_zero(where: slice, filter: str, compensate: bool) -> None:
    """Padding given as ``token_weight``: the sum and its gradients are those of the ignored rows."""
    e, c = draw(N, D), draw(60, D)
    targets = torch.arange(N) * 5
    token_weight = torch.ones(N)
    token_weight[where] = 0
    # Single rows in the order given: what one of them skips does not depend on the others.
    spec = cce.Spec(**ROWS_APART, filter=filter, compensate=compensate)
    weighted = cce.loss(e, c, targets, token_weight=token_weight, spec=spec, reduction="sum")
    ignored = cce.loss(e, c, targets.where(token_weight > 0, -100), spec=spec, reduction="sum")
    close(weighted, ignored)
    for x, y in zip(*(torch.autograd.grad(loss, (e, c)) for loss in (weighted, ignored)), strict=True):
        close(x, y)


@pytest.mark.parametrize("filter", ["none", "element", "tile"])
def test_gradient_of_some_tokens(filter: str) -> None:
    """A loss that uses a few of the tokens' values has gradients for those alone."""
    e, c, targets = draw(N, D), draw(60, D), torch.arange(N) * 5
    spec = cce.Spec(**ROWS_APART, filter=filter)
    used = torch.tensor([1, 2, 5])
    some = torch.autograd.grad(cce.terms(e, c, targets, outputs=["nll"], spec=spec).nll[used].sum(), (e, c))
    alone = torch.autograd.grad(cce.loss(e[used], c, targets[used], spec=spec, reduction="sum"), (e, c))
    for x, y in zip(some, alone, strict=True):
        close(x, y)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_masked_target_costs_infinity(fields: dict[str, Any]) -> None:
    """The likelihood of an entry that cannot occur is 0; the other tokens are not concerned."""
    bias = torch.zeros(60)
    bias[3] = -torch.inf
    e, c = draw(2, D).detach().float(), draw(60, D).detach().float()
    out = cce.terms(e, c, torch.tensor([3, 4]), bias, outputs=["nll", "lse"], spec=cce.Spec(**fields, block_v=32))
    assert out.nll[0] == math.inf and bool(torch.isfinite(out.lse).all()) and math.isfinite(out.nll[1])
