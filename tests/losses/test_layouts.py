"""Every tensor of every recipe in every layout: strided, offset, transposed, a column, surrounded by NaN, expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import losses
from cce.losses import contrastive

pytestmark = pytest.mark.usefixtures("one_thread")
B, L, D, V = 2, 3, 4, 6
RNG = torch.Generator().manual_seed(0)
TARGETS = torch.tensor([[1, 2, 3], [4, 0, -100]])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RNG)


def around(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A larger tensor of what must not be read."""
    return torch.full(shape, torch.nan if x.is_floating_point() else 7, dtype=x.dtype)


def inside(big: Tensor, x: Tensor, *index: Any) -> Tensor:
    view = big[index]
    view.copy_(x)
    return view


def strided(x: Tensor) -> Tensor:
    return inside(around(x, (*x.shape[:-1], 2 * x.shape[-1] + 1)), x, ..., slice(1, None, 2)) if x.ndim else column(x)


def offset(x: Tensor) -> Tensor:
    big = around(x, (x.numel() + 5,))
    return inside(big[3 : 3 + x.numel()].view(x.shape), x, ...)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else strided(x)


def column(x: Tensor) -> Tensor:
    return inside(around(x, (*x.shape, 3)), x, ..., 1)


def surrounded(x: Tensor) -> Tensor:
    return inside(around(x, tuple(n + 2 for n in x.shape)), x, *[slice(1, -1)] * x.ndim, ...)


def flipped(x: Tensor) -> Tensor:
    return x.flip(0).clone().flip(0) if x.ndim else x.clone()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (strided, offset, transposed, column, surrounded, flipped)
}
SEQUENCES = {"e": normal(B, L, D), "c": normal(V, D), "targets": TARGETS, "bias": normal(V)}
TOKENS = {**SEQUENCES, "token_weight": normal(B, L).abs()}
PAIRS = {"e": normal(5, D), "c": normal(5, D)}
NEGATIVES = torch.randint(V, (B, L, 3), generator=RNG)
SEVERAL = torch.stack([TARGETS, TARGETS.roll(1, 0)], -1)

# Recipes that make nothing but one number of each nll are one of their kind.
RECIPES: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]] = {
    "focal": (losses.focal, TOKENS, {}),
    "z_loss": (losses.z_loss, TOKENS, {}),
    "unlikelihood": (losses.unlikelihood, {**TOKENS, "negatives": NEGATIVES}, {}),
    "distillation": (
        losses.top_k_distillation,
        {**TOKENS, "targets": SEVERAL, "target_weight": normal(B, L, 2).sigmoid() / 2},
        {"tail": "bucket"},
    ),
    "ppo": (
        losses.ppo,
        {
            **TOKENS,
            "advantages": normal(B, L),
            "old_log_prob": -normal(B, L).abs(),
            "ref_log_prob": -normal(B, L).abs(),
        },
        {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "top_entropy": 0.5},
    ),
    "grpo": (losses.grpo, {**SEQUENCES, "rewards": normal(B)}, {"group_size": 2}),
    "pass_at_n": (losses.pass_at_n, SEQUENCES, {"n": 4}),
    "dpo": (losses.dpo, {**SEQUENCES, "ref_log_prob": -normal(B).abs()}, {}),
    "multi_token": (losses.multi_token, {**SEQUENCES, "e": normal(2, B, L, D), "head_weight": normal(2).abs()}, {}),
    "multi_codebook": (losses.multi_codebook, {"e": normal(B, L, 2, D), "c": normal(2, V, D), "targets": SEVERAL}, {}),
    "clip_contrastive": (losses.clip_contrastive, {**PAIRS, "logit_scale": torch.tensor(3.0)}, {}),
    "nt_xent": (losses.nt_xent, PAIRS, {}),
}
ARGUMENTS = [(name, argument) for name, (_, tensors, _) in RECIPES.items() for argument in tensors]
NOT_DIFFERENTIABLE = ("targets", "negatives", "target_weight", "old_log_prob", "ref_log_prob", "rewards")


def run(name: str, upstream: Callable[[Tensor], Tensor] = torch.ones_like, **others: Tensor) -> list[Tensor]:
    """The losses and all gradients."""
    recipe, tensors, options = RECIPES[name]
    given = {
        key: x if key in NOT_DIFFERENTIABLE else x.detach().requires_grad_() for key, x in {**tensors, **others}.items()
    }
    found = recipe(**given, **options, reduction="none", spec=cce.Spec(filter="none"))
    wanted = [x for x in given.values() if x.requires_grad]
    return [found.detach(), *torch.autograd.grad(found, wanted, upstream(found))]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_layouts(name: str, argument: str, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "_BLOCK", 4)
    x = RECIPES[name][1][argument]
    assert torch.equal(layout(x), x)
    check(run(name, **{argument: layout(x)}), run(name))


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_expanded(name: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride of 0 along each dimension."""
    monkeypatch.setattr(contrastive, "_BLOCK", 4)
    x = RECIPES[name][1][argument]
    for dim in range(x.ndim):
        y = x.select(dim, 0).unsqueeze(dim).expand(x.shape)
        assert y.stride(dim) == 0
        check(run(name, **{argument: y}), run(name, **{argument: y.contiguous()}))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_upstream_gradients(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    def ramp(x: Tensor) -> Tensor:
        return torch.arange(1.0, 1 + x.numel()).view(x.shape)

    check(run(name, lambda x: layout(ramp(x))), run(name, ramp))
    check(run(name, lambda x: torch.ones(()).expand(x.shape)), run(name))
