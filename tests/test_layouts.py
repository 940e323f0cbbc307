"""Recipes give the same numbers for tensors in any layout, with NaN around their values; ``cce.loss``: in the kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cce import losses
from cce.testing.layouts import STRIDED, Layout, same_rows

pytestmark = pytest.mark.usefixtures("one_thread")
B, L, D, V, K = 2, 5, 4, 11, 3
Tensors = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def entries(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def tokens(**more: Tensor) -> Tensors:
    """The arguments of a recipe of labelled tokens; every tensor that all of those take."""
    return {"e": draw(B, L, D), "c": draw(V, D), "targets": entries(B, L), "bias": draw(V), **more}


WEIGHTED: Tensors = {"token_weight": draw(B, L, seed=2).abs()}
#: Each recipe, its tensors, and its other arguments.
RECIPES: dict[str, tuple[Callable[..., Tensor], Tensors, dict[str, Any]]] = {
    "focal": (losses.focal, tokens(**WEIGHTED), {}),
    "comp_sum": (losses.comp_sum, tokens(**WEIGHTED), {"tau": 1.5}),
    "gce": (losses.generalized_cross_entropy, tokens(**WEIGHTED), {}),
    "dice": (losses.dice, tokens(**WEIGHTED), {}),
    "ldr": (losses.ldr, tokens(**WEIGHTED), {"margin": 0.1}),
    "z_loss": (losses.z_loss, tokens(**WEIGHTED), {}),
    "unlikelihood": (losses.unlikelihood, tokens(negatives=entries(B, L, K), **WEIGHTED), {}),
    "distillation": (
        losses.top_k_distillation,
        tokens(**WEIGHTED)
        | {
            # The last dimension counts up, so that no entry is named twice.
            "targets": torch.arange(K).expand(B, L, K) + entries(B, L, 1) % (V - K),
            "target_weight": draw(B, L, K).softmax(-1) * 0.9,
        },
        {"tail": "bucket"},
    ),
    "ppo": (
        losses.ppo,
        tokens(advantages=draw(B, L, seed=3), old_log_prob=draw(B, L) - 3, ref_log_prob=draw(B, L) - 3, **WEIGHTED),
        {"kl_coefficient": 0.1, "top_entropy": 0.5, "entropy_coefficient": 0.1},
    ),
    "grpo": (losses.grpo, tokens(rewards=torch.tensor([1.0, 0.25], dtype=torch.float64)), {"group_size": 2}),
    "sequence_log_prob": (losses.sequence_log_prob, tokens(), {}),
    "pass_at_n": (losses.pass_at_n, tokens(), {"n": 4}),
    "dpo": (losses.dpo, tokens(ref_log_prob=draw(B) - 9), {}),
    "multi_token": (losses.multi_token, tokens(head_weight=draw(2).abs()) | {"e": draw(2, B, L, D)}, {}),
    "multi_codebook": (
        losses.multi_codebook,
        {"e": draw(B, L, D), "c": draw(K, V, D), "targets": entries(B, L, K)},
        {},
    ),
    "clip_contrastive": (losses.clip_contrastive, {"e": draw(V, D), "c": draw(V, D, seed=5)}, {}),
    "nt_xent": (losses.nt_xent, {"e": draw(V, D), "c": draw(V, D, seed=5)}, {}),
}


def solved(recipe: Callable[..., Tensor], tensors: Tensors, options: dict[str, Any]) -> Tensors:
    """The value, and the gradients of e and c."""
    leaves = {name: x.detach().requires_grad_() if name in ("e", "c") else x for name, x in tensors.items()}
    value = recipe(**leaves, **options)
    upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    grads = torch.autograd.grad(value, [leaves["e"], leaves["c"]], upstream)
    return {"value": value.detach(), "gradient of e": grads[0], "gradient of c": grads[1]}


@pytest.mark.parametrize("layout", STRIDED, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", RECIPES)
def test_any_strides(name: str, layout: Layout) -> None:
    recipe, tensors, options = RECIPES[name]
    expected = solved(recipe, tensors, options)
    assert all(bool(x.isfinite().all()) for x in expected.values()) and bool(expected["gradient of c"].any())
    found = solved(recipe, {key: layout(x) for key, x in tensors.items()}, options)
    for what, x in expected.items():
        torch.testing.assert_close(
            found[what], x, rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}"
        )


@pytest.mark.parametrize("name", RECIPES)
def test_one_number_for_all(name: str) -> None:
    """Every tensor but e, c and the targets may be expanded from its first row."""
    recipe, tensors, options = RECIPES[name]
    for key in tensors.keys() - {"e", "c", "targets", "rewards", "negatives"}:
        expanded = same_rows(tensors[key])
        found = solved(recipe, {**tensors, key: expanded}, options)
        for what, x in solved(recipe, {**tensors, key: expanded.contiguous()}, options).items():
            torch.testing.assert_close(found[what], x, rtol=1e-12, atol=1e-12)
