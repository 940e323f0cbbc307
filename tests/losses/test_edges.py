"""Recipes at their edges, in every dtype: p = 0 and 1, one entry, equal, huge and offset logits, no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_formulas import FLOATS, RECIPES, STYLES, Edge, Recipe, teacher
from torch import Tensor

import cce
from cce import losses
from cce.frontend.reduction import total

pytestmark = pytest.mark.usefixtures("one_thread")
short = settings(max_examples=15, deadline=None, derandomize=True)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
EXACT = cce.Spec(filter="none")


@st.composite
def edges(draw: Any) -> Edge:
    return Edge.of(
        draw(st.sampled_from(STYLES)),
        draw(st.sampled_from(FLOATS)),
        n=draw(st.sampled_from([0, 1, 2, 5])),
        v=draw(st.sampled_from([1, 2, 3, 7])),
        d=draw(st.sampled_from([1, 3])),
        ignored=draw(st.sampled_from(["none", "some", "all"])),
        seed=draw(st.integers(0, 1000)),
    )


def run(recipe: Recipe, x: Edge, e: Tensor, c: Tensor, **options: Any) -> Tensor:
    targets = x.targets
    if recipe.recipe is losses.top_k_distillation:
        targets = teacher(x)[0]
    elif recipe.recipe is losses.pass_at_n:
        e, targets = e[:, None], targets[:, None]
    return recipe.recipe(e, c, targets, bias=x.bias, spec=EXACT, **recipe.own(x), **options)


def in_use(recipe: Recipe, x: Edge) -> Tensor:
    return (teacher(x)[0] >= 0).any(1) if recipe.recipe is losses.top_k_distillation else x.targets >= 0


def inputs(x: Edge, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [y.to(dtype or y.dtype, copy=True).requires_grad_() for y in (x.e, x.c)]


def same_pattern(found: Tensor, expected: Tensor) -> Tensor:
    """Where both are numbers; NaN and inf are at the same places."""
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(found), pattern(expected)), f"{pattern.__name__}: {found} instead of {expected}"
    return expected.isfinite()


@every_recipe
@short
@given(x=edges())
def test_values_and_gradients(recipe: Recipe, x: Edge) -> None:
    """Those of the formula in float64, NaN and inf where it has them; gradients where it has finite ones."""
    mine, theirs = inputs(x), inputs(x, torch.float64)
    z = x.logits(*theirs)
    expected = torch.where(in_use(recipe, x), recipe.dense(x, z), 0)
    found = run(recipe, x, *mine, reduction="none")
    assert found.shape == expected.shape and found.dtype == x.wide
    value = expected.detach().to(x.wide).double()  # inf where the dtype has no number for it
    finite = same_pattern(found.detach().double(), value)
    # nll is known to epsilon times the size of the logits; D, V and K are sums of a few terms.
    size = float(z.detach().nan_to_num(0, 0, 0).abs().max()) if z.numel() else 0
    epsilon = 32 * torch.finfo(x.wide).eps
    error = epsilon * (1 + size) * recipe.noise(x, z.detach())
    assert ((found - value).abs() <= error + epsilon * value.abs())[finite].all(), f"{found} instead of {value}"
    if not expected.requires_grad or not finite.all() or not x.targets.numel():
        return
    error_of_rows = len(z) * len(x.c) * float(error.max())
    grads, exact = torch.autograd.grad(found.sum(), mine), torch.autograd.grad(expected.sum(), theirs)
    for i, (g, dense) in enumerate(zip(grads, exact, strict=True)):
        info, largest = torch.finfo(g.dtype), float(dense.abs().max())
        if largest < info.max / 2:  # a number: else autograd of the formula has none
            bound = error_of_rows * float(theirs[1 - i].detach().abs().max()) + 4 * info.eps * largest + info.tiny
            assert (g - dense).abs().max() <= bound, f"input {i}: {g} instead of {dense}"


@every_recipe
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ignored_tokens_cost_nothing(recipe: Recipe, reduction: str, dtype: torch.dtype) -> None:
    """Whatever stands at them: in e, token weights, negatives, advantages and the upstream gradient."""
    x = Edge.of("random", dtype, n=6, v=5, d=3, ignored="some", seed=3)
    ignored = ~in_use(recipe, x)
    assert ignored.any() and not ignored.all()
    results = []
    for bad in (1.0, torch.nan, torch.inf):
        e, c = inputs(x)
        weight = x.draw(1)[:, 0].masked_fill(ignored, bad).requires_grad_()
        weighted = {} if recipe.recipe is losses.pass_at_n else {"token_weight": weight}
        found = run(recipe, x, e.masked_fill(ignored[:, None], bad), c, reduction=reduction, **weighted)
        upstream = torch.ones_like(found)
        if reduction == "none":
            upstream[ignored] = bad
        wanted = [e, c, *weighted.values()]
        results.append([found.detach(), *torch.autograd.grad(found, wanted, upstream)])
    for other in results[1:]:
        for y, expected in zip(other, results[0], strict=True):
            assert expected.isfinite().all() and torch.equal(y, expected)


@every_recipe
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_token_that_is_not_a_number_is_seen(recipe: Recipe, dtype: torch.dtype) -> None:
    """NaN in a row of e that counts makes that token's loss NaN, and no other."""
    x = Edge.of("random", dtype, n=5, v=4, d=3, ignored="none", seed=1)
    x.e[2] = torch.nan
    found = run(recipe, x, x.e, x.c, reduction="none")
    assert found.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("pass_at_n", "distillation"))])
def test_one_token_without_a_dimension(name: str) -> None:
    """e (D,) and a target that is a number."""
    x, recipe = Edge.of("random", torch.float64, n=1, v=4, d=3, ignored="none", seed=2), RECIPES[name]
    own = {key: y[0] if isinstance(y, Tensor) else y for key, y in recipe.own(x).items()}
    found = recipe.recipe(x.e[0], x.c, x.targets[0], bias=x.bias, reduction="none", **own)
    assert found.shape == () and torch.equal(found, run(recipe, x, x.e, x.c, reduction="none")[0])


def test_what_a_mean_divides_by() -> None:
    """The weights in use, whatever the others are."""
    weights, used = torch.tensor([0.5, torch.nan, 2.0, torch.inf]), torch.tensor([True, False, True, False])
    assert total(used, weights, torch.float32) == 2.5
    assert total(used, None, torch.float32) == 2
    assert total(used, weights.masked_fill(used, 0), torch.float32).isnan()
