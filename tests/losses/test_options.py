"""What all recipes have in common: the import, the options of ``cce.terms``, dtypes, compilation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cce
from cce import losses

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = torch.tensor([[1, 2, 3], [4, 0, -100]])

# Each recipe with what it needs, as a function of e (2, 3, 4), c (6, 4) and options.
RECIPES: dict[str, Callable[..., Tensor]] = {
    "focal": lambda e, c, **o: losses.focal(e, c, TARGETS, **o),
    "comp_sum": lambda e, c, **o: losses.comp_sum(e, c, TARGETS, tau=1.5, **o),
    "gce": lambda e, c, **o: losses.generalized_cross_entropy(e, c, TARGETS, **o),
    "dice": lambda e, c, **o: losses.dice(e, c, TARGETS, **o),
    "ldr": lambda e, c, **o: losses.ldr(e, c, TARGETS, margin=0.1, **o),
    "z_loss": lambda e, c, **o: losses.z_loss(e, c, TARGETS, **o),
    "unlikelihood": lambda e, c, **o: losses.unlikelihood(e, c, TARGETS, negatives=TARGETS[..., None] % 5, **o),
    "distillation": lambda e, c, **o: losses.top_k_distillation(
        e, c, TARGETS[..., None], target_weight=torch.full((2, 3, 1), 0.7), tail="bucket", **o
    ),
    "ppo": lambda e, c, **o: losses.ppo(
        e, c, TARGETS, advantages=torch.tensor([1.0, -1.0]), top_entropy=0.5, entropy_coefficient=0.1, **o
    ),
    "grpo": lambda e, c, **o: losses.grpo(e, c, TARGETS, rewards=torch.tensor([1.0, 0.0]), group_size=2, **o),
    "sequence_log_prob": lambda e, c, **o: losses.sequence_log_prob(e, c, TARGETS, **o).mean(),
    "pass_at_n": lambda e, c, **o: losses.pass_at_n(e, c, TARGETS, n=4, **o),
    "dpo": lambda e, c, **o: losses.dpo(e, c, TARGETS, ref_log_prob=torch.zeros(2), **o),
    "multi_token": lambda e, c, **o: losses.multi_token(e.expand(2, 2, 3, 4), c, TARGETS, **o),
    "multi_codebook": lambda e, c, **o: losses.multi_codebook(e, [c], TARGETS[..., None], **o),
    "evaluate": lambda e, c, **o: losses.evaluate(e, c, TARGETS, **o).loss,
    "clip_contrastive": lambda e, c, **o: losses.clip_contrastive(e.flatten(0, 1), c, **o),
    "nt_xent": lambda e, c, **o: losses.nt_xent(e.flatten(0, 1), c, **o),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
DIFFERENTIABLE = {name: recipe for name, recipe in RECIPES.items() if name != "evaluate"}


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in ((2, 3, 4), (6, 4))]


def test_the_table_has_every_recipe() -> None:
    exported = set(losses.__all__) - {"Evaluation", "Options", "group_advantages"}
    assert len(exported) == len(RECIPES)


def test_cce_losses_is_imported_when_it_is_used() -> None:
    code = "import sys, cce; assert 'cce.losses' not in sys.modules; cce.losses.focal; from cce import losses"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'loses'"):
        _ = cce.loses


@every_recipe
def test_unknown_options_are_errors(recipe: Any) -> None:
    with pytest.raises(TypeError, match=r"^label_smooth: got 0.1, expected an option out of"):
        recipe(*inputs(), label_smooth=0.1)


@every_recipe
def test_options_reach_terms(recipe: Any) -> None:
    """A backend that is not there is missed, and so is the spec's type."""
    with pytest.raises(ValueError, match=r"^backend: got 'none'"):
        recipe(*inputs(), backend="none")
    with pytest.raises(TypeError, match=r"^spec: got 'exact'"):
        recipe(*inputs(), spec="exact")


@every_recipe
def test_bad_tensors_are_errors(recipe: Any) -> None:
    e, c = inputs()
    with pytest.raises(TypeError, match=r"^c: got dtype torch.int64"):
        recipe(e, c.long())


TOKENS = [name for name in RECIPES if name not in ("clip_contrastive", "nt_xent", "multi_codebook")]


@pytest.mark.parametrize("name", TOKENS)
def test_bad_values_are_errors(name: str) -> None:
    for option, value in (("softcap", 0), ("logit_scale", -1.0), ("shift", 1.5), ("ignore_index", None)):
        with pytest.raises((TypeError, ValueError), match=f"^{option}: got"):
            RECIPES[name](*inputs(), **{option: value})


@pytest.mark.parametrize("recipe", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_the_reference_backend_agrees(recipe: Any) -> None:
    """The same recipe by NumPy in float64; float32 results are float32, bfloat16 ones too."""
    found = recipe(*inputs())
    assert found.dtype == torch.float32 and recipe(*inputs(torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(found, recipe(*inputs(), backend="reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_compiled(recipe: Any) -> None:
    """One graph, without a break."""
    torch._dynamo.reset()
    e, c = inputs()
    compiled = torch.compile(recipe, backend="aot_eager", fullgraph=True)
    results = [(x, *torch.autograd.grad(x, [e, c])) for x in (recipe(e, c), compiled(e, c))]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
