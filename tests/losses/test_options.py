"""What all recipes have in common: the import, the options of ``cce.terms``, dtypes, compilation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import cce
from cce import losses

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = torch.tensor([[1, 2, 3], [4, 0, -100]])
NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]

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


# Of targets (2, 3), every one a function of e (2, 3, 4), c (200, 4).
OF_TARGETS: dict[str, Callable[..., Tensor]] = {
    "focal": losses.focal,
    "unlikelihood": lambda e, c, t, **o: losses.unlikelihood(e, c, t, negatives=t[..., None], likelihood=False, **o),
    "distillation": lambda e, c, t, **o: losses.top_k_distillation(
        e, c, t[..., None], target_weight=torch.ones(2, 3, 1), **o
    ),
    "grpo": lambda e, c, t, **o: losses.grpo(e, c, t, rewards=torch.tensor([1.0, 0.0]), group_size=2, **o),
    "pass_at_n": lambda e, c, t, **o: losses.pass_at_n(e, c, t, n=2, **o),
    "multi_token": lambda e, c, t, **o: losses.multi_token(e.expand(2, 2, 3, 4), c, t, **o),
    "multi_codebook": lambda e, c, t, **o: losses.multi_codebook(e, [c], t[..., None], **o),
    "evaluate": lambda e, c, t, **o: losses.evaluate(e, c, t, **o).loss,
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("recipe", OF_TARGETS.values(), ids=OF_TARGETS)
def test_targets_of_every_integer_dtype(recipe: Any, dtype: torch.dtype, shift: int) -> None:
    """-100 is 156 in eight bits, which is an entry, not an ignored one."""
    e, c = torch.randn(2, 3, 4), torch.randn(200, 4)
    targets = torch.tensor([[1, 100, 3], [4, 3, 2]] if dtype == torch.int8 else [[156, 156, 3], [4, 3, 156]])
    found = recipe(e, c, targets.to(dtype), shift=shift)
    assert found.isfinite() and torch.equal(found, recipe(e, c, targets, shift=shift))


@pytest.mark.parametrize("shift", [3, 5])
@pytest.mark.parametrize("recipe", OF_TARGETS.values(), ids=OF_TARGETS)
def test_a_shift_beyond_the_sequence(recipe: Any, shift: int) -> None:
    """Nothing is predicted: 0 summed, NaN in the mean, but for the heads that average what there is."""
    e, c, targets = torch.randn(2, 3, 4), torch.randn(6, 4), torch.ones(2, 3, dtype=torch.int64)
    if recipe is not OF_TARGETS["evaluate"]:
        assert recipe(e, c, targets, shift=shift, reduction="sum") == 0
    found = recipe(e, c, targets, shift=shift)
    assert found == 0 if recipe is OF_TARGETS["multi_token"] else found.isnan()


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "temperature": lambda e, c, t: losses.top_k_distillation(
        e, c, TARGETS[..., None], target_weight=torch.full((2, 3, 1), 0.7), temperature=t
    ),
    "lam": lambda e, c, t: losses.ldr(e, c, TARGETS, lam=t, margin=0.1),
    "logit_scale": lambda e, c, t: losses.ppo(e, c, TARGETS, advantages=torch.ones(2, 3), logit_scale=t),
    "nt_xent": lambda e, c, t: losses.nt_xent(e.flatten(0, 1), c, temperature=t),
    "clip_contrastive": lambda e, c, t: losses.clip_contrastive(e.flatten(0, 1), c, logit_scale=t),
}


@pytest.mark.parametrize("recipe", NUMBERS.values(), ids=NUMBERS)
def test_a_changing_temperature_is_compiled_once(recipe: Any) -> None:
    """Once more than that: the first is taken for a constant."""
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(recipe, backend=count, fullgraph=True)
    e, c = inputs()
    for t in (0.5, 0.7, 0.9, 1.1, 1.3):
        torch.testing.assert_close(compiled(e, c, t), recipe(e, c, t))
    assert count.frame_count <= 2


LONG: dict[str, Callable[[Any], Any]] = {
    "c": lambda x: losses.multi_codebook(torch.ones(2, 3), x, TARGETS),
    "head_weight": lambda x: losses.multi_token(torch.ones(2, 2, 3, 4), torch.ones(6, 4), TARGETS, head_weight=x),
    "rewards": lambda x: losses.group_advantages(x, group_size=2),
    "advantages": lambda x: losses.ppo(*inputs(), TARGETS, advantages=x),
    "negatives": lambda x: losses.unlikelihood(*inputs(), TARGETS, negatives=x),
    "target_weight": lambda x: losses.top_k_distillation(*inputs(), TARGETS[..., None], target_weight=x),
    "logit_scale": lambda x: losses.clip_contrastive(torch.ones(2, 3), torch.ones(2, 3), logit_scale=x),
    "n": lambda x: losses.pass_at_n(*inputs(), TARGETS, n=x),
}


@pytest.mark.parametrize("name", LONG)
def test_a_wrong_type_is_described_in_short(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: got an? ndarray of shape \(100, 100\)") as caught:
        LONG[name](np.zeros((100, 100)))
    assert len(str(caught.value)) < 200
