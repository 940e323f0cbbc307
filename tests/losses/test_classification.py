"""Losses of the target's probability: the formulas of their papers on dense logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import cce
from cce import losses
from cce.losses import classification, sequences, slopes


def focal(p: Tensor, z: Tensor, gamma: float) -> Tensor:
    return -((1 - p) ** gamma) * p.log()


def comp_sum(p: Tensor, z: Tensor, tau: float) -> Tensor:
    """By the sum over the other entries, as the paper has it."""
    u = 1 / p - 1
    return torch.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def gce(p: Tensor, z: Tensor, q: float) -> Tensor:
    return (1 - p**q) / q


def dice(p: Tensor, z: Tensor, alpha: float, gamma: float) -> Tensor:
    return 1 - (2 * (1 - p) ** alpha * p + gamma) / ((1 - p) ** alpha * p + 1 + gamma)


def z_loss(p: Tensor, z: Tensor, coefficient: float) -> Tensor:
    return coefficient * z.exp().sum(-1).log() ** 2


RECIPES: list[tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, float]]] = [
    *((losses.focal, focal, {"gamma": gamma}) for gamma in (0, 0.5, 1, 2.0, 5)),
    *((losses.comp_sum, comp_sum, {"tau": tau}) for tau in (0, 0.5, 1, 1.7, 2, 3)),
    *((losses.generalized_cross_entropy, gce, {"q": q}) for q in (0.01, 0.7, 1)),
    *((losses.dice, dice, {"alpha": a, "gamma": g}) for a, g in ((0, 1.0), (0.5, 0.3), (1, 1), (2.5, 0))),
    (losses.z_loss, z_loss, {"coefficient": 0.3}),
]


def each(rows: list[tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, float]]]) -> pytest.MarkDecorator:
    names = [f"{recipe.__name__}-{'-'.join(map(str, own.values()))}" for recipe, _, own in rows]
    return pytest.mark.parametrize(("recipe", "dense", "own"), rows, ids=names)


each_recipe = each(RECIPES)


@each_recipe
def test_formula(recipe: Any, dense: Any, own: dict[str, float], problem: Any, same: Any) -> None:
    found = recipe(problem.e, problem.c, problem.targets, reduction="none", **own, **problem.call)
    expected = problem.reduce(dense(problem.p(), problem.logits(), **own), "none")
    same(found, expected, problem.inputs)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "token_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str, weighted: bool, problem: Any, same: Any) -> None:
    """Those of ``cce.loss``, which a recipe that is the cross-entropy equals."""
    weight = problem.token_weight() if weighted else None
    options = {"reduction": reduction, "token_weight": weight, **problem.call}
    inputs = [*problem.inputs, *([weight] if weighted else [])]
    arguments = (problem.e, problem.c, problem.targets)
    found = losses.focal(*arguments, gamma=0, **options)
    same(found, problem.reduce(-problem.p().log(), reduction, weight), inputs)
    same(found, cce.loss(*arguments, **options), inputs)


@pytest.mark.parametrize(("lam", "margin"), [(1, 0), (0.5, 0.1), (0.05, 0.4), (3, 20.0)])
def test_ldr(lam: float, margin: float, problem: Any, same: Any) -> None:
    found = losses.ldr(problem.e, problem.c, problem.targets, lam=lam, margin=margin, reduction="none", **problem.call)
    z = problem.logits()
    others = torch.ones_like(z).scatter(-1, problem.labels.clamp(min=0)[..., None], 0)
    gaps = z - problem.take(z, problem.labels)[..., None] + margin * others
    same(found, problem.reduce(lam * (gaps / lam).exp().mean(-1).log(), "none"), problem.inputs)


def test_ldr_is_the_hinge_loss_at_a_small_lambda(problem: Any) -> None:
    """From above, within lam log V of it."""
    lam = 2e-3
    found = losses.ldr(problem.e, problem.c, problem.targets, lam=lam, margin=0.05, reduction="none", **problem.call)
    z = problem.logits()
    gaps = z - problem.take(z, problem.labels)[..., None] + 0.05
    gaps = gaps.scatter(-1, problem.labels.clamp(min=0)[..., None], 0).amax(-1)
    error = (gaps - found)[problem.in_use]
    assert (error > 0).all() and (error <= lam * math.log(len(problem.c)) + 1e-9).all()


def test_nothing_in_use_is_nan_without_gradients_that_are(problem: Any) -> None:
    ignored = torch.full_like(problem.targets, problem.ignore_index)
    for recipe, _, own in RECIPES:
        found = recipe(problem.e, problem.c, ignored, **own, **problem.call)
        assert found.isnan(), recipe
        for grad in torch.autograd.grad(found, problem.inputs):
            assert (grad == 0).all(), recipe


# Each function of nll, in 60 digits.
def mp_dice(n: Any, alpha: float, gamma: float) -> Any:
    w = (1 - mpmath.exp(-n)) ** alpha * mpmath.exp(-n)
    return 1 - (2 * w + gamma) / (w + 1 + gamma)


OF_NLL: dict[str, tuple[Any, Any, list[tuple[float, ...]]]] = {
    "focal": (
        classification._focal,
        lambda n, gamma: (1 - mpmath.exp(-n)) ** gamma * n,
        [(0.0,), (0.5,), (2.0,)],
    ),
    "comp_sum": (
        classification._comp_sum,
        lambda n, power: (mpmath.exp(power * n) - 1) / power if power else n,
        [(-1.0,), (-0.3,), (0.0,), (0.5,)],
    ),
    "dice": (classification._dice, mp_dice, [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (2.0, 0.0)]),
    "log_complement": (slopes.log_complement, lambda n: mpmath.log(1 - mpmath.exp(-n)), [()]),
    "coverage": (
        sequences._coverage,
        lambda s, n: -mpmath.log(1 - (1 - mpmath.exp(-s)) ** n),
        [(1,), (2,), (256,)],
    ),
}


@pytest.mark.parametrize(
    ("name", "constants"), [(name, x) for name, (*_, several) in OF_NLL.items() for x in several], ids=str
)
@pytest.mark.parametrize("nll", [1e-13, 1e-5, 0.3, 0.7, 1.0, 5.0, 40.0, 600.0])
def test_values_and_slopes_in_60_digits(name: str, constants: tuple[float, ...], nll: float) -> None:
    """Relative precision from p = 1 - 1e-13 to p = exp(-600), where automatic differentiation has none left."""
    ours, exact, _ = OF_NLL[name]
    found = ours(torch.tensor(nll, dtype=torch.float64), *constants)
    with mpmath.workdps(400):
        at = mpmath.mpf(nll)
        h = at * mpmath.mpf(10) ** -60
        value = exact(at, *constants)
        slope = (exact(at + h, *constants) - exact(at - h, *constants)) / (2 * h)
        for x, y in zip(found, (value, slope), strict=True):
            if abs(y) < 1e-300:
                assert abs(float(x)) < 1e-300
            else:
                assert abs((mpmath.mpf(float(x)) - y) / y) < 2e-13, (float(x), mpmath.nstr(y, 17))


def test_the_slope_of_plain_dice_at_one() -> None:
    """(1 - p)^0 is 1 at p = 1, too: there is a gradient left, of which the logits' others take their share."""
    assert classification._dice(torch.tensor(0.0), 0.0, 1.0)[1].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [100.0, 1e4])
@each([row for row in RECIPES if row[2].get("tau", 1) >= 1])
def test_certain_tokens(recipe: Any, dense: Any, own: dict[str, float], size: float, dtype: torch.dtype) -> None:
    """p = 1 and p = 0 in the dtype: loss and gradients are finite numbers.

    Not of comp-sum losses below tau = 1, which grow like a power of 1 / p.
    """
    e = torch.eye(4, dtype=dtype).mul(size).requires_grad_()
    c = torch.eye(4, dtype=dtype).requires_grad_()
    targets = torch.tensor([0, 0, 2, 2])
    bias = torch.tensor([0, 0, 0, -torch.inf], dtype=dtype)
    found = recipe(e, c, targets, bias=bias, reduction="sum", **own)
    for grad in (found, *torch.autograd.grad(found, [e, c])):
        assert grad.isfinite().all()


@each([row for row in RECIPES if row[2].get("tau", 2) > 1])
def test_a_masked_target(recipe: Any, dense: Any, own: dict[str, float]) -> None:
    """A target of probability 0 costs what the formula has there, which may be infinite; no gradient is NaN."""
    e, c = torch.eye(3).requires_grad_(), torch.eye(3).requires_grad_()
    bias = torch.tensor([0, 0, -torch.inf])
    found = recipe(e, c, torch.tensor([0, 1, 2]), bias=bias, reduction="none", **own)
    z = (e @ c.T + bias)[2].detach()
    torch.testing.assert_close(found[2].detach(), dense(torch.zeros(()), z, **own))
    for grad in torch.autograd.grad(found.sum(), [e, c]):
        assert grad.isfinite().all()


NUMBERS = {
    losses.focal: {"gamma": (-1, math.nan, "2")},
    losses.comp_sum: {"tau": (-0.1, math.inf, None)},
    losses.generalized_cross_entropy: {"q": (0, 1.1, True)},
    losses.dice: {"alpha": (-1, None), "gamma": (-1, "1")},
    losses.ldr: {"lam": (0, -1, None), "margin": (-0.1, 10.1, "0")},
    losses.z_loss: {"coefficient": (math.nan, None)},
}
BAD = [(recipe, name, x) for recipe, all in NUMBERS.items() for name, several in all.items() for x in several]


@pytest.mark.parametrize(("recipe", "name", "value"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_numbers(recipe: Any, name: str, value: Any) -> None:
    own = {"tau": 1.0} if recipe is losses.comp_sum else {}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*expected"):
        recipe(torch.ones(2, 3), torch.ones(4, 3), torch.arange(2), **{**own, name: value})


@pytest.mark.parametrize(("recipe", "own"), [(losses.focal, {"gamma": 2}), (losses.comp_sum, {"tau": 1})])
def test_the_gradient_of_a_masked_target(recipe: Any, own: dict[str, float]) -> None:
    """Where p is 0, focal and logistic losses are the cross-entropy, an infinite one with a finite gradient."""
    bias, targets = torch.tensor([0, 0, -torch.inf]), torch.tensor([2, 2])
    results = []
    for f, options in ((recipe, own), (cce.loss, {})):
        e, c = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.eye(3)
        found = f(e, c, targets, bias=bias, reduction="sum", **options)
        results.append((found.detach(), torch.autograd.grad(found, e)[0]))
    (found, g), (expected, exact) = results
    assert found == expected == torch.inf and exact.any()
    torch.testing.assert_close(g, exact)


@pytest.mark.parametrize("tau", [0, 0.5])
def test_comp_sum_overflows_to_infinity(tau: float) -> None:
    """And its gradient is seen not to be a number, in float32; in float64 both are numbers."""
    for dtype, size in ((torch.float32, torch.inf), (torch.float64, math.exp((1 - tau) * 200) / (1 - tau))):
        e = torch.tensor([[0.0, 200.0]], dtype=dtype, requires_grad=True)
        found = losses.comp_sum(e, torch.eye(2, dtype=dtype), torch.tensor([0]), tau=tau)
        torch.testing.assert_close(float(found.detach()), size, rtol=1e-10, atol=0)
        assert bool(torch.autograd.grad(found, e)[0].isfinite().all()) == (dtype == torch.float64)


@pytest.mark.parametrize(("lam", "softcap"), [(1e-40, None), (1e30, 1e-20)])
def test_a_lambda_that_logits_cannot_be_divided_by(lam: float, softcap: float | None) -> None:
    with pytest.raises(ValueError, match=r"^lam: got .*expected a finite number > 0 by which"):
        losses.ldr(torch.ones(2, 3), torch.ones(4, 3), torch.arange(2), lam=lam, softcap=softcap)
